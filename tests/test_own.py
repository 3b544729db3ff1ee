"""People's own data sets: the reader, the held-out images, stage 1's table, and all five stages."""

import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path

from common import own_data
from common.datasets import BENCHMARKS, open_split
from common.run import UserError

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

stage1 = importlib.import_module("01_extract")
stage4 = importlib.import_module("04_train")
stage5 = importlib.import_module("05_eval")
ROOT = Path(__file__).parents[1]
CLASSES = "soil\ncrop\n-\nweed\n"


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def label(seed, values=(0, 1, 2, 3, 255)):
    random = np.random.default_rng(seed)
    return random.choice(np.array(values, np.uint8), (8, 12)).repeat(8, 0).repeat(8, 1)


def fields(root, splits=("train", "val"), count=5):
    """Images in sub-folders and two formats. Returns {image's name: label}."""
    found = {}
    for split in splits:
        for i in range(count):
            suffix = ".jpg" if i % 2 else ".PNG"
            stem = f"row{i % 2}/{split}{i}"
            pixels = label(10 * (split == "val") + i)
            image = (60 * (pixels % 4))[..., None] + np.zeros(3, np.uint8)
            save(root / "images" / split / (stem + suffix), image)
            save(root / f"labels/{split}/{stem}.png", pixels)
            found[f"images/{split}/{stem}{suffix}"] = pixels
    (root / "classes.txt").write_text(CLASSES)
    return found


def truth(sample):
    return sample["truth"]["mIoU"]["target"].numpy()


def extract(stage, root, run, *flags, benchmark="own_semantic"):
    words = ("--benchmark", benchmark, "--data", root, "--run", run)
    return stage("01_extract", *words, "--workers", "0", "--limit", "2", *flags)


def open_both(benchmark, root):
    return open_split(benchmark, root, "train"), open_split(benchmark, root, "val")


# ------------------------------------------------------------------ reading
def test_labels_are_lines_of_classes_txt(tmp_path):
    found = fields(tmp_path)
    samples = open_split("own_semantic", tmp_path, "val")
    categories = [tuple(category) for category in samples.categories]
    assert categories == [(0, "soil", False), (1, "crop", False), (3, "weed", False)]
    assert samples.names == sorted(name for name in found if "/val/" in name)
    assert not samples.held_out
    assert samples.names[0] == "images/val/row0/val0.PNG"
    assert "images/val/row1/val1.jpg" in samples.names
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
    for sample, old in zip(samples, before, strict=True):
        np.testing.assert_array_equal(truth(sample), old)
    if form == "16 bits":  # where 255 is a value like any other
        save(file, np.full((64, 96), 255, np.uint16))
        unknown = "holds the unknown label 255: known are 0, 1, 2 and 1 more"
        with pytest.raises(UserError, match=unknown):
            [sample["labels"] for sample in samples]


def test_linked_folders_and_hidden_files(tmp_path):
    found = fields(tmp_path / "far")
    own = tmp_path / "own"
    for folder in ("images", "labels"):
        (own / folder / "train").mkdir(parents=True)
        # A split may be a link, and so may a folder below it.
        (own / folder / "val").symlink_to(tmp_path / "far" / folder / "val")
        for row in ("row0", "row1"):
            link = own / folder / "train" / row
            link.symlink_to(tmp_path / "far" / folder / "train" / row)
    (own / "classes.txt").symlink_to(tmp_path / "far/classes.txt")
    (tmp_path / "far/images/val/._a.png").write_bytes(b"AppleDouble")
    (tmp_path / "far/labels/val/.DS_Store.png").write_bytes(b"")
    train, val = open_both("own_semantic", own)
    assert sorted(train.names + val.names) == sorted(found)
    assert val[0]["image"].shape == (3, 64, 96)


# ------------------------------------------------------------------ held-out images
def test_a_fifth_is_held_out_by_name_whatever_the_process(tmp_path):
    found = fields(tmp_path, ["train"], 10)
    train, val = open_both("own_semantic", tmp_path)
    assert len(val) == 2 and sorted(train.names + val.names) == sorted(found)
    assert set(val.names) == val.held_out
    assert "truth" in val[0] and "truth" not in train[0]
    for samples in (train, val):
        for index, name in enumerate(samples.names):
            assert samples[index]["name"] == name
            labelled = set(np.unique(found[name])) - {2, 255}
            assert {samples.categories[i].id for i in samples[index]["labels"]} == labelled
    code = "from pathlib import Path; from common.datasets import open_split; "
    code += f"print(*open_split('own_semantic', Path({str(tmp_path)!r}), 'val').names)"
    words = [sys.executable, "-c", code]
    printed = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert printed.split() == val.names != train.names[:2]
    save(tmp_path / "images/train/one/more.png", np.zeros((64, 96, 3), np.uint8))
    save(tmp_path / "labels/train/one/more.png", np.zeros((64, 96), np.uint8))
    again = open_split("own_semantic", tmp_path, "val").names
    assert len(set(again) & set(val.names)) >= 1


def coco(root, **splits):
    for split, count in splits.items():
        datasets.coco(root, split, count)


@pytest.mark.parametrize("benchmark", ["own_instance", "own_panoptic"])
def test_coco_s_form_with_and_without_val(tmp_path, benchmark):
    coco(tmp_path / "both", train=3, val=2)
    train, val = open_both(benchmark, tmp_path / "both")
    assert (len(train), len(val), val.held_out) == (3, 2, set())
    assert val.names[0].startswith("val/") and val[0]["image_id"] == 1000

    coco(tmp_path / "alone", train=5)
    train, val = open_both(benchmark, tmp_path / "alone")
    assert len(train) == 4 and len(val) == 1 and not set(train.names) & set(val.names)
    for samples in (train, val):
        for index, name in enumerate(samples.names):
            sample = samples[index]
            assert sample["name"] == name == f"train/{sample['image_id']:012d}.jpg"
    (tmp_path / "alone/val").mkdir()  # there is a val split, then, and it is not whole
    with pytest.raises(UserError, match="_val.json cannot be read as COCO's"):
        open_split(benchmark, tmp_path / "alone", "val")


def test_coco_s_ap_is_of_the_held_out_images_alone(tmp_path):
    coco(tmp_path, train=5)
    samples = open_split("own_instance", tmp_path, "val")
    score = stage5.CocoInstanceScore(samples.coco.file)
    for sample in samples:
        masks = [stage5.rle.decode(mask) for mask in sample["rles"]]
        masks = torch.from_numpy(np.array(masks, bool))
        keep = ~sample["iscrowd"]
        assert keep.any()
        ids = torch.tensor([samples.categories[label].id for label in sample["labels"]])
        score.update(
            **sample["truth"]["AP"],
            masks=masks[keep],
            category_ids=ids[keep],
            scores=torch.ones(int(keep.sum())),
        )
    assert score.result()["AP"] == pytest.approx(100)


# ------------------------------------------------------------------ refusals
def text(content):
    """A change of a data set, to be given its folder: classes.txt holds this text."""
    return lambda root: (root / "classes.txt").write_text(content)


def lose(path):
    return lambda root: (root / path).rename(root / "lost")


def empty(folder):
    def change(root):
        for file in (root / folder).rglob("*.*"):
            file.unlink()

    return change


UNREADABLE = [
    (lose("classes.txt"), "classes.txt cannot be read as a class a line"),
    (text("\n\n"), "classes.txt names no class"),
    (text("-\n-\n"), "classes.txt names no class"),
    (text("soil\ncrop\n-\nsoil\n"), "classes.txt names two classes 'soil'"),
    (text("soil\n\ncrop\nweed"), "classes.txt: expected at most 255 lines, each with a class"),
    (text("a\n" * 256), "classes.txt: expected at most 255 lines"),
    (
        lambda root: (root / "classes.txt").write_bytes(b"\xff\xfes\0o\0"),
        "classes.txt cannot be read as a class a line",
    ),
    (lose("labels/val/row0/val0.png"), "labels/val/row0/val0.png is needed and not there"),
    (lose("labels/val"), "row0/val0.png, .*row0/val2.png, .* and 2 more are needed"),
    (lose("images/val"), "there is no folder .*images/val"),
    (empty("images/val"), "images/val holds no images"),
    (
        lambda root: save(root / "images/val/row1/val1.png", np.zeros((64, 96), np.uint8)),
        "images/val/row1/val1.jpg and images/val/row1/val1.png would share "
        "labels/val/row1/val1.png",
    ),
]


@pytest.mark.parametrize("change, message", UNREADABLE)
def test_what_cannot_be_read_is_named(tmp_path, change, message):
    fields(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        open_split("own_semantic", tmp_path, "val")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_single_image_cannot_be_held_out(tmp_path):
    fields(tmp_path, ["train"], 1)
    alone = "is the only image and there is no val split: expected at least two"
    with pytest.raises(UserError, match=alone):
        open_split("own_semantic", tmp_path, "train")


FORM = "expected a PNG with one channel of 8 or 16 bits or with a palette"
WRONG = [
    (lambda file: save(file, label(0)[:-8]), "is .56, 96., its image .64, 96."),
    (
        lambda file: save(file, label(0) + np.uint8(8)),
        "holds the unknown label (7|8): known are 0, 1, 2 and 1 more",
    ),
    (lambda file: file.write_bytes(file.read_bytes()[:60]), "cannot be read as an image"),
    (lambda file: save(file, np.zeros((64, 96, 3), np.uint8)), f"is PNG of mode RGB: {FORM}"),
    (lambda file: Image.fromarray(label(0)).save(file, "JPEG"), f"is JPEG of mode L: {FORM}"),
    (lambda file: save(file, label(0) > 1), f"is PNG of mode 1: {FORM}"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_labels_that_do_not_fit_are_refused_before_the_extraction(tmp_path, stage, change, message):
    fields(tmp_path / "own")
    change(tmp_path / "own/labels/val/row0/val2.png")
    with pytest.raises(UserError, match=f"val2.png {message}") as error:
        open_split("own_semantic", tmp_path / "own", "val")[1]
    assert "\n" not in str(error.value)
    change(tmp_path / "own/labels/train/row0/train0.png")
    both = f"cannot be used: .*train0.png {message}.*; .*val2.png {message}"
    with pytest.raises(UserError, match=f"2 of 10 images of .* {both}"):
        extract(stage, tmp_path / "own", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_coco_s_form_is_looked_at_too(tmp_path, stage):
    coco(tmp_path / "own", train=4, val=2)
    file = tmp_path / "own/annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 99
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="1 of 6 images .* holds the unknown label 99"):
        extract(stage, tmp_path / "own", tmp_path / "run", benchmark="own_instance")
    content["categories"].reverse()
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="train and val of .* list their classes in different orde"):
        extract(stage, tmp_path / "own", tmp_path / "run", benchmark="own_instance")
    content["categories"][0]["name"] = "unicycle"
    file.write_text(json.dumps(content))
    different = "train and val of .* list different classes: bicycle, unicycle$"
    with pytest.raises(UserError, match=different):
        extract(stage, tmp_path / "own", tmp_path / "run", benchmark="own_instance")
    content["categories"][0]["name"] = content["categories"][1]["name"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="instances_val.json names two classes 'motorcycle'"):
        open_split("own_instance", tmp_path / "own", "val")


# ------------------------------------------------------------------ stage 1's report
def read_table(printed):
    """{first cell: the other cells} of all tables."""
    rows = {}
    for line in printed.splitlines():
        if line.startswith("|"):
            first, *others = [cell.strip() for cell in line.split("|")[1:-1]]
            rows[first] = others
    return rows


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
    rows = read_table(said)
    assert rows["class"] == ["train: % of pixels", "images", "val: % of pixels", "images"]
    assert rows["soil"] == ["66.67", "2", "66.67", "2"]
    assert rows["crop"] == ["33.33", "1", "0.00", "0"]
    assert rows["stone"] == ["0.00", "0", "33.33", "1"] and "-" not in rows
    assert "3 images of" in said and "to train on, 3 to evaluate on" in said
    assert "held out" not in said
    assert "WARNING: 3 classes not in train: weed, stone (but in val), hail\n" in said
    blank = "images/train/row1/train1.jpg, images/val/row1/val1.jpg"
    assert f"WARNING: 2 images without a class: {blank}\n" in said
    assert "WARNING: 1 files unused: labels/train/row0/gone.png\n" in said
    assert json.loads((tmp_path / "run/run.json").read_text())["held_out"] == []
    for file in (own / "labels/train").rglob("*.png"):
        save(file, np.full((64, 96), 2, np.uint8))
    nothing = "no image to train on in .* has a pixel of soil, crop, weed and 2"
    with pytest.raises(UserError, match=nothing):
        extract(stage, own, tmp_path / "run")


@pytest.mark.parametrize("benchmark", ["own_instance", "own_panoptic"])
def test_stage_1_tables_coco_s_form(tmp_path, stage, benchmark):
    """The numbers are those of the annotations, and a file that none lists is named."""
    coco(tmp_path / "own", train=3, val=2)
    save(tmp_path / "own/train/extra.jpg", np.zeros((64, 96, 3), np.uint8))
    said = extract(stage, tmp_path / "own", tmp_path / "run", benchmark=benchmark)
    rows = read_table(said)
    kind = "panoptic" if benchmark == "own_panoptic" else "instances"
    for split, columns in (("train", (0, 1)), ("val", (2, 3))):
        content = json.loads((tmp_path / f"own/annotations/{kind}_{split}.json").read_text())
        entries = []  # (category id, image id, area)
        for annotation in content["annotations"]:
            for segment in annotation.get("segments_info", [annotation]):
                entry = (segment["category_id"], annotation["image_id"], segment["area"])
                entries.append(entry)
        total = sum(area for _, _, area in entries)
        for category in content["categories"]:
            own = [entry for entry in entries if entry[0] == category["id"]]
            share = 100 * sum(area for _, _, area in own) / total
            images = {image_id for _, image_id, _ in own}
            share_column, images_column = columns
            row = rows[category["name"]]
            assert row[share_column] == f"{share:.2f}"
            assert row[images_column] == str(len(images))
    assert "WARNING: 1 files unused: train/extra.jpg\n" in said
    assert "WARNING: 2 images without a class: train/000000001074.jpg, val/000000001037" in said


def test_stage_1_says_what_is_held_out_and_takes_none_of_it(tmp_path, stage):
    fields(tmp_path / "own", ["train"], 10)
    flags = ("--limit", "100", "--encoders", "tiny_vit")
    said = extract(stage, tmp_path / "own", tmp_path / "run", *flags)
    held_out = open_split("own_semantic", tmp_path / "own", "val").names
    run_config = json.loads((tmp_path / "run/run.json").read_text())
    assert run_config["held_out"] == held_out and len(run_config["images"]) == 8
    assert not set(held_out) & set(run_config["images"])
    held = "no val split, so a fifth of train is held out in all stages (run.json lists it): "
    assert f"{held}{', '.join(held_out)}\n" in said
    assert "WARNING" not in said


def test_images_keep_a_small_size_and_large_ones_get_512(tmp_path, stage):
    for side, size, shape in ((64, "original", "16 x 24"), (600, "512", "128 x 192")):
        root = tmp_path / f"{side}"
        fields(root, count=1)
        height, width = side, max(side, 96)
        save(root / "images/val/row0/val0.PNG", np.zeros((height, width, 3), np.uint8))
        save(root / "labels/val/row0/val0.png", np.zeros((height, width), np.uint8))
        run = tmp_path / f"run{side}"
        said = extract(stage, root, run, "--encoders", "tiny_hiera")
        assert json.loads((run / "run.json").read_text())["size"] == size
        assert f"| 4      | 24       | {shape} " in said
    for size, shape in (("32", "8 x 16"), ("original", "16 x 24")):
        run = tmp_path / f"given {size}"
        flags = ("--size", size, "--encoders", "tiny_hiera")
        said = extract(stage, tmp_path / "64", run, *flags)
        assert json.loads((run / "run.json").read_text())["size"] == size
        assert f"| 4      | 24       | {shape} " in said


def test_more_labels_can_be_looked_at_than_files_can_be_open(tmp_path, capsys):
    fields(tmp_path, ["train"], 150)
    train, val = open_both("own_semantic", tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 120), hard))
    try:
        assert own_data.check_labels(train, val, workers=1) == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "120 images of" in capsys.readouterr().out


# ------------------------------------------------------------------ recipe
class Images:
    """So many images of some sizes, and nothing else."""

    root = Path("field")

    def __init__(self, count, *sizes):
        self.count = count
        self.sizes = sizes

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        size = self.sizes[index % len(self.sizes)]
        return {"image": torch.zeros(3, 1, 1).expand(3, *size)}


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
def test_the_recipe_fits_images_and_device(
    capsys, count, size, device, steps, crop, resize, test_size
):
    recipe = stage4.fit_recipe(Images(count, size), device)
    assert (recipe.steps, recipe.batch_size) == (steps, 4)
    assert (recipe.crop, recipe.resize, recipe.test_size) == (crop, resize, test_size)
    decoder = (recipe.hidden_dim, recipe.decoder_layers, recipe.pixel_decoder_layers)
    is_small = (*decoder, recipe.sample_points) == (64, 3, 2, 1024)
    assert is_small == (device == "cpu")
    assert (recipe.hidden_dim == 256) == (device == "cuda")
    assert recipe.learning_rate == (1e-4 if device == "cuda" else 2e-3)
    assert recipe.milestones == ()
    printed = capsys.readouterr().out
    assert f"{count} images of some {size[0]} x {size[1]} pixels, on {device}" in printed


def test_the_median_image_decides():
    recipe = stage4.fit_recipe(Images(9, (64, 96), (64, 96), (640, 960)), "cpu")
    assert recipe.test_size == "64"


def test_only_street_scenes_get_their_recipe():
    streets = {name for name, recipe in stage4.RECIPES.items() if recipe == stage4.Recipe()}
    assert streets == {name for name in BENCHMARKS if "cityscapes" in name}
    assert len(streets) == 5
    assert not any(name.startswith("own_") for name in stage4.RECIPES)


# ------------------------------------------------------------------ all stages
TRAINING = (
    *("--steps", "2", "--hidden-dim", "32", "--queries", "10", "--batch-size", "2"),
    *("--sample-points", "64", "--workers", "0", "--crop", "64x64", "--device", "cpu"),
)


def make_own(root, benchmark):
    if benchmark == "own_semantic":
        fields(root, ["train"], 5)
    else:
        coco(root, train=5)


@pytest.mark.parametrize(
    "benchmark, metric", [("own_semantic", "mIoU"), ("own_instance", "AP"), ("own_panoptic", "PQ")]
)
def test_all_five_stages(tmp_path, stage, benchmark, metric):
    own = tmp_path / "own"
    run = tmp_path / "trained"
    make_own(own, benchmark)
    extract(stage, own, run, "--size", "64", benchmark=benchmark)
    stage("02_metrics", "--run", run)
    chosen = ("--master", "tiny_hiera", "--auxiliary", "tiny_vit", "--stride", "16")
    stage("03_select", "--run", run, *chosen)
    said = stage("04_train", "--run", run, *TRAINING)
    assert "a recipe to 4 images of some " in said and "data        4 images of" in said
    said = stage("05_eval", "--run", run, "--workers", "0", "--device", "cpu")
    assert f"2 steps on {benchmark} train, seed 0, percent\n" in said
    assert f"\n{benchmark}, 1 of 1 images held out of train\n" in said
    results = json.loads((run / "results.json").read_text())
    assert results["benchmark"] == benchmark and results["images"] == 1
    assert metric in results["scores"] and list(results["per_class"]) == [metric]
    categories = open_split(benchmark, own, "val").categories
    assert list(results["per_class"][metric]) == [category.name for category in categories]
    rows = read_table(stage("05_eval", "--compare", run))
    row = dict(zip(rows["run"], rows[run.name], strict=True))
    assert row["benchmark"] == benchmark
    for name in ("mIoU", "AP", "PQ"):
        value = results["scores"][name] if name == metric else None
        assert row[name] == stage5.run.number(value)
