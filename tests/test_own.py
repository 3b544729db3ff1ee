"""Own data sets: what is read, what is held out, what stage 1 says of the labels, and all five stages."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

from common.datasets import BENCHMARKS, open_split
from common.run import UserError

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

stage1, stage4, stage5 = (importlib.import_module(name) for name in ("01_extract", "04_train", "05_eval"))
ROOT = Path(__file__).parents[1]
CLASSES = "soil\ncrop\n-\nweed\n"


def save(path, pixels, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


def label(seed, values=(0, 1, 2, 3, 255)):
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), (8, 12)).repeat(8, 0).repeat(8, 1)


def fields(root, splits=("train", "val"), count=5, size=(64, 96)):
    """Pictures in sub-folders and two formats; returns {picture's name: label}."""
    found = {}
    for split in splits:
        for i in range(count):
            name = f"row{i % 2}/{split}{i}" + (".jpg" if i % 2 else ".PNG")
            found[f"images/{split}/{name}"] = pixels = label(10 * (split == "val") + i)
            save(root / "images" / split / name, (60 * (pixels % 4))[..., None] + np.zeros(3, np.uint8))
            save(root / f"labels/{split}/{name[:-4]}.png", pixels)
    (root / "classes.txt").write_text(CLASSES)
    return found


def truth(sample):
    return sample["truth"]["semantic"][0].numpy()


def extract(stage, root, run, *flags, benchmark="own_semantic"):
    words = ("--benchmark", benchmark, "--data", root, "--run", run, "--workers", "0", "--limit", "2")
    return stage("01_extract", *words, *flags)


# ------------------------------------------------------------------------------------------------- reading


def test_labels_are_lines_of_classes_txt(tmp_path):
    found = fields(tmp_path)
    samples = open_split("own_semantic", tmp_path, "val")
    assert [tuple(c) for c in samples.categories] == [(0, "soil", False), (1, "crop", False), (3, "weed", False)]
    assert samples.names == sorted(name for name in found if "/val/" in name) and not samples.held_out
    assert samples.names[0] == "images/val/row0/val0.PNG" and "images/val/row1/val1.jpg" in samples.names
    lookup = np.full(256, 255)
    lookup[[0, 1, 3]] = 0, 1, 2
    for sample in samples:
        np.testing.assert_array_equal(truth(sample), lookup[found[sample["name"]]])
    assert len(open_split("own_semantic", tmp_path, "train")) == 5


@pytest.mark.parametrize("form", ["16 bits", "palette"])
def test_labels_in_other_forms_hold_the_same_values(tmp_path, form):
    fields(tmp_path)
    samples = open_split("own_semantic", tmp_path, "val")
    before = [truth(sample) for sample in samples]
    for file in (tmp_path / "labels/val").rglob("*.png"):
        pixels = np.array(Image.open(file)).astype(np.uint16)
        if form == "16 bits":
            save(file, np.where(pixels == 255, np.uint16(65535), pixels))
        else:
            image = Image.fromarray(pixels.astype(np.uint8))
            image.putpalette(bytes(255 - i // 3 for i in range(768)))
            image.save(file)
        assert Image.open(file).mode == ("P" if form == "palette" else "I;16")
    assert all((truth(sample) == old).all() for sample, old in zip(samples, before, strict=True))
    if form == "16 bits":  # where 255 is a value like any other
        save(file, np.full((64, 96), 255, np.uint16))
        with pytest.raises(UserError, match="holds the unknown label 255: known are 0, 1, 2 and 1 more"):
            [sample["labels"] for sample in samples]


def test_linked_folders_and_hidden_files(tmp_path):
    found = fields(tmp_path / "far")
    own = tmp_path / "own"
    for place in ("images", "labels"):
        (own / place).mkdir(parents=True)
        (own / place / "val").symlink_to(tmp_path / "far" / place / "val")  # a split, and below a folder of it
        (own / place / "train").mkdir()
        for row in ("row0", "row1"):
            (own / place / "train" / row).symlink_to(tmp_path / "far" / place / "train" / row)
    (own / "classes.txt").symlink_to(tmp_path / "far/classes.txt")
    (tmp_path / "far/images/val/._a.png").write_bytes(b"AppleDouble")
    (tmp_path / "far/labels/val/.DS_Store.png").write_bytes(b"")
    names = [name for part in ("train", "val") for name in open_split("own_semantic", own, part).names]
    assert sorted(names) == sorted(found)
    assert open_split("own_semantic", own, "val")[0]["image"].shape == (3, 64, 96)


# ------------------------------------------------------------------------------------------------- held out


def test_a_fifth_is_held_out_by_name_whatever_the_process(tmp_path):
    found = fields(tmp_path, ["train"], 10)
    train, val = (open_split("own_semantic", tmp_path, part) for part in ("train", "val"))
    assert len(val) == 2 and sorted(train.names + val.names) == sorted(found)
    assert set(val.names) == val.held_out and "truth" in val[0] and "truth" not in train[0]
    for samples in (train, val):
        for index, name in enumerate(samples.names):
            assert samples[index]["name"] == name
            present = set(np.unique(found[name])) - {2, 255}
            assert {samples.categories[i].id for i in samples[index]["labels"]} == present
    ask = "from pathlib import Path; from common.datasets import open_split; "
    ask += f"print(*open_split('own_semantic', Path({str(tmp_path)!r}), 'val').names)"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=ROOT, check=True)
    assert told.stdout.split() == val.names != train.names[:2]
    save(tmp_path / "images/train/one/more.png", np.zeros((64, 96, 3), np.uint8))
    save(tmp_path / "labels/train/one/more.png", np.zeros((64, 96), np.uint8))
    assert len(set(open_split("own_semantic", tmp_path, "val").names) & set(val.names)) >= 1


def coco(root, **splits):
    for split, count in splits.items():
        datasets.coco(root, split, count)


@pytest.mark.parametrize("benchmark", ["own_instance", "own_panoptic"])
def test_coco_s_form_with_and_without_val(tmp_path, benchmark):
    coco(tmp_path / "both", train=3, val=2)
    train, val = (open_split(benchmark, tmp_path / "both", part) for part in ("train", "val"))
    assert (len(train), len(val), val.held_out) == (3, 2, set()) and val.names[0].startswith("val/")
    assert val[0]["image_id"] == 1000

    coco(tmp_path / "alone", train=5)
    train, val = (open_split(benchmark, tmp_path / "alone", part) for part in ("train", "val"))
    assert len(train) == 4 and len(val) == 1 and not set(train.names) & set(val.names)
    for samples in (train, val):
        for index, name in enumerate(samples.names):
            assert samples[index]["name"] == name == f"train/{samples[index]['image_id']:012d}.jpg"
    (tmp_path / "alone/val").mkdir()  # there is a val split, then, and it is not whole
    with pytest.raises(UserError, match="_val.json cannot be read as COCO's"):
        open_split(benchmark, tmp_path / "alone", "val")


def test_coco_s_ap_is_of_the_held_out_pictures_alone(tmp_path):
    coco(tmp_path, train=5)
    samples = open_split("own_instance", tmp_path, "val")
    score = stage5.CocoInstanceScore(samples.coco.file)
    for sample in samples:
        masks = torch.from_numpy(np.array([stage5.rle.decode(code) for code in sample["rles"]], bool))
        keep = ~sample["crowd"]
        assert keep.any()
        ids = torch.tensor([samples.categories[label].id for label in sample["labels"]])
        score.update(sample["image_id"], masks[keep], ids[keep], torch.ones(int(keep.sum())))
    assert score.result()["AP"] == pytest.approx(100)


# ------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_read_is_named(tmp_path):
    cases = [
        (lambda r: (r / "classes.txt").unlink(), "classes.txt cannot be read as a class a line"),
        (lambda r: (r / "classes.txt").write_text("\n\n"), "classes.txt names no class"),
        (lambda r: (r / "classes.txt").write_text("-\n-\n"), "classes.txt names no class"),
        (lambda r: (r / "classes.txt").write_text("soil\ncrop\n-\nsoil\n"), "classes.txt names two classes 'soil'"),
        (lambda r: (r / "classes.txt").write_text("soil\n\ncrop\nweed"), "classes.txt: expected at most 255 lines, a"),
        (lambda r: (r / "classes.txt").write_text("a\n" * 256), "classes.txt: expected at most 255 lines"),
        (lambda r: (r / "classes.txt").write_bytes(b"\xff\xfes\0o\0"), "classes.txt cannot be read as a class a line"),
        (lambda r: (r / "labels/val/row0/val0.png").unlink(), "labels/val/row0/val0.png is needed and not there"),
        (lambda r: (r / "labels/val").rename(r / "lost"), "row0/val0.png, .*row0/val2.png, .* and 2 more are needed"),
        (lambda r: (r / "images/val").rename(r / "lost"), "there is no folder .*images/val"),
        (lambda r: [p.unlink() for p in (r / "images/val").rglob("*.*")], "images/val holds no pictures"),
        (lambda r: save(r / "images/val/row1/val1.png", np.zeros((64, 96), np.uint8)),
         "images/val/row1/val1.jpg and images/val/row1/val1.png would share labels/val/row1/val1.png"),
    ]  # fmt: skip
    for i, (change, message) in enumerate(cases):
        fields(tmp_path / f"{i}")
        change(tmp_path / f"{i}")
        with pytest.raises(UserError, match=message) as error:
            open_split("own_semantic", tmp_path / f"{i}", "val")
        assert "\n" not in str(error.value) and str(tmp_path / f"{i}") in str(error.value)
    fields(tmp_path / "one", ["train"], 1)
    with pytest.raises(UserError, match="only picture, without a val split: expected at least two"):
        open_split("own_semantic", tmp_path / "one", "train")


WRONG = [
    (lambda file: save(file, label(0)[:-8]), "is .56, 96., its picture .64, 96."),
    (lambda file: save(file, label(0) + np.uint8(8)), "holds the unknown label (7|8): known are 0, 1, 2 and 1 more"),
    (lambda file: file.write_bytes(file.read_bytes()[:60]), "cannot be read as a picture"),
    (lambda file: save(file, np.zeros((64, 96, 3), np.uint8)),
     "is PNG of mode RGB: expected a PNG of one channel, 8 or 16 bits, or with a palette"),
    (lambda file: Image.fromarray(label(0)).save(file, "JPEG"), "is JPEG of mode L: expected a PNG of one channel"),
    (lambda file: save(file, label(0) > 1), "is PNG of mode 1: expected a PNG of one channel"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG)
def test_labels_that_do_not_fit_are_refused_before_anything_is_extracted(tmp_path, stage, change, message):
    fields(tmp_path / "own")
    change(tmp_path / "own/labels/val/row0/val2.png")
    with pytest.raises(UserError, match=f"val2.png {message}") as error:
        open_split("own_semantic", tmp_path / "own", "val")[1]
    assert "\n" not in str(error.value)
    change(tmp_path / "own/labels/train/row0/train0.png")
    both = f"cannot be used: .*train0.png {message}.*; .*val2.png {message}"
    with pytest.raises(UserError, match=f"2 of 10 pictures of .* {both}"):
        extract(stage, tmp_path / "own", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_coco_s_form_is_looked_at_too(tmp_path, stage):
    coco(tmp_path / "own", train=4, val=2)
    file = tmp_path / "own/annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 99
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="1 of 6 pictures .* holds the unknown label 99"):
        extract(stage, tmp_path / "own", tmp_path / "run", benchmark="own_instance")
    content["categories"].reverse()
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="train and val of .* list other classes, or in another order"):
        extract(stage, tmp_path / "own", tmp_path / "run", benchmark="own_instance")
    content["categories"][0]["name"] = content["categories"][1]["name"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="instances_val.json names two classes 'motorcycle'"):
        open_split("own_instance", tmp_path / "own", "val")


# ------------------------------------------------------------------------------------------------- stage 1's report


def test_stage_1_tables_the_labels_and_warns(tmp_path, stage):
    own = tmp_path / "own"
    fields(own, count=3)
    (own / "classes.txt").write_text("soil\ncrop\n-\nweed\nstone\nhail\n")
    for split in ("train", "val"):
        for i, file in enumerate(sorted((own / "labels" / split).rglob("*.png"))):
            pixels = np.full((64, 96), 255, np.uint8)
            pixels[: 16 * (2 - i)] = 0  # 32 lines, 16, none
            pixels[16 : 32 if i == 0 else 16] = 1 if split == "train" else 4
            save(file, pixels)
    save(own / "labels/train/row0/gone.png", label(0))
    said = extract(stage, own, tmp_path / "run")
    rows = {
        row[0]: row[1:] for row in ([c.strip() for c in line.split("|")[1:-1]] for line in said.splitlines()) if row
    }
    assert rows["soil"] == ["66.67", "2", "66.67", "2"] and rows["crop"] == ["33.33", "1", "0.00", "0"]
    assert rows["stone"] == ["0.00", "0", "33.33", "1"] and "-" not in rows
    assert "3 pictures of" in said and "to train on, 3 to evaluate on" in said and "held out" not in said
    assert "WARNING: 3 classes not in train: weed, stone (but in val), hail\n" in said
    blank = "images/train/row1/train1.jpg, images/val/row1/val1.jpg"
    assert f"WARNING: 2 pictures without a class: {blank}\n" in said
    assert "WARNING: 1 files unused: labels/train/row0/gone.png\n" in said
    assert json.loads((tmp_path / "run/run.json").read_text())["held_out"] == []
    for file in (own / "labels/train").rglob("*.png"):
        save(file, np.full((64, 96), 2, np.uint8))
    with pytest.raises(UserError, match="no picture to train on in .* has a pixel of soil, crop, weed and 2"):
        extract(stage, own, tmp_path / "run")


def test_stage_1_says_what_is_held_out_and_takes_none_of_it(tmp_path, stage):
    fields(tmp_path / "own", ["train"], 10)
    said = extract(stage, tmp_path / "own", tmp_path / "run", "--limit", "100", "--encoders", "tiny_vit")
    held_out = open_split("own_semantic", tmp_path / "own", "val").names
    asked = json.loads((tmp_path / "run/run.json").read_text())
    assert asked["held_out"] == held_out and len(asked["images"]) == 8 and not set(held_out) & set(asked["images"])
    assert f"no val split: a fifth of train is held out, in all stages (see run.json): {', '.join(held_out)}\n" in said
    assert "WARNING" not in said


def test_pictures_keep_a_small_size_and_large_ones_get_512(tmp_path, stage):
    for side, size, shape in ((64, "own", "16 x 24"), (600, "512", "128 x 192")):
        root = tmp_path / f"{side}"
        fields(root, count=1)
        save(root / "images/val/row0/val0.PNG", np.zeros((side, max(side, 96), 3), np.uint8))
        save(root / "labels/val/row0/val0.png", np.zeros((side, max(side, 96)), np.uint8))
        said = extract(stage, root, tmp_path / f"run{side}", "--encoders", "tiny_hiera")
        assert json.loads((tmp_path / f"run{side}/run.json").read_text())["size"] == size
        assert f"| 4      | 24       | {shape} " in said
    extract(stage, tmp_path / "64", tmp_path / "given", "--size", "32", "--encoders", "tiny_hiera")
    assert json.loads((tmp_path / "given/run.json").read_text())["size"] == "32"


# ------------------------------------------------------------------------------------------------- recipe


class Pictures:
    """Only as many pictures, of two sizes."""

    root = Path("field")

    def __init__(self, count, *sizes):
        self.count, self.sizes = count, sizes

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"image": torch.zeros(3, 1, 1).expand(3, *self.sizes[index % len(self.sizes)])}


@pytest.mark.parametrize(
    "count, size, device, steps, crop, resize, test_size",
    [
        (367, (360, 480), "cpu", 917, (256, 352), (270, 540), "360"),  # 10 epochs of four
        (367, (360, 480), "cuda", 13_762, (256, 352), (270, 540), "360"),
        (20, (1000, 1000), "cpu", 400, (384, 384), (384, 768), "512"),
        (20, (4096, 4096), "cuda", 5000, (768, 768), (768, 1536), "1024"),
        (100_000, (512, 2048), "cpu", 2000, (192, 768), (192, 384), "256"),
        (100_000, (64, 96), "cuda", 180_000, (64, 64), (48, 96), "64"),
        (9, (20, 30), "cpu", 400, (32, 32), (24, 48), "32"),
    ],
)
def test_the_recipe_fits_pictures_and_device(capsys, count, size, device, steps, crop, resize, test_size):
    recipe = stage4.fit_recipe(Pictures(count, size), device)
    assert (recipe.steps, recipe.batch) == (steps, 4)
    assert (recipe.crop, recipe.resize, recipe.test_size) == (crop, resize, test_size)
    small = (recipe.width, recipe.decoder_layers, recipe.encoder_layers, recipe.points) == (64, 3, 2, 1024)
    assert small == (device == "cpu") and (recipe.width == 256) == (device == "cuda")
    assert recipe.learning_rate == (1e-4 if device == "cuda" else 2e-3) and recipe.drops == ()
    assert f"{count} pictures of some {size[0]} x {size[1]} pixels, on {device}" in capsys.readouterr().out


def test_the_median_picture_decides():
    recipe = stage4.fit_recipe(Pictures(9, (64, 96), (64, 96), (640, 960)), "cpu")
    assert recipe.test_size == "64"


def test_only_street_scenes_get_their_recipe():
    streets = {name for name, recipe in stage4.RECIPES.items() if recipe == stage4.Recipe()}
    assert streets == {name for name in BENCHMARKS if "cityscapes" in name} and len(streets) == 5
    assert not any(name.startswith("own_") for name in stage4.RECIPES)


# ------------------------------------------------------------------------------------------------- all stages


@pytest.mark.parametrize(
    "benchmark, measure", [("own_semantic", "mIoU"), ("own_instance", "AP"), ("own_panoptic", "PQ")]
)
def test_all_five_stages(tmp_path, stage, benchmark, measure):
    own, run = tmp_path / "own", tmp_path / "run"
    if benchmark == "own_semantic":
        fields(own, ["train"], 5)
    else:
        coco(own, train=5)
    extract(stage, own, run, "--size", "64", benchmark=benchmark)
    stage("02_metrics", "--run", run)
    stage("03_select", "--run", run, "--master", "tiny_hiera", "--auxiliary", "tiny_vit", "--stride", "16")
    flags = ("--steps", "2", "--width", "32", "--queries", "10", "--batch", "2", "--points", "64", "--workers", "0")
    flags += ("--crop", "64x64", "--device", "cpu")
    said = stage("04_train", "--run", run, *flags)
    assert "a recipe for 4 pictures of some " in said and "data        4 images of" in said
    said = stage("05_eval", "--run", run, "--workers", "0", "--save-predictions", "--device", "cpu")
    assert f"2 steps on {benchmark} train, seed 0; percent\n\n{benchmark}, 1 of 1 images held out of train" in said
    assert f"the paper: {measure} -" in said
    entry = json.loads((run / "results.json").read_text())["benchmarks"][benchmark]
    assert entry["images"] == 1 and measure in entry["scores"]
    said = stage("05_eval", "--compare", run)
    value = stage5.run.number(entry["scores"][measure])
    (row,) = [line for line in said.splitlines() if line.startswith(f"| {benchmark}")]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [benchmark, measure, "-", value]
