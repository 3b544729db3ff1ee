"""Inputs that people meet, which once gave a silent wrong result, a hang or a stack trace."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from common import run, toycity
from common.datasets import encode_mask, open_split, run_lengths
from common.images import list_images, read_image
from common.run import UserError

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
stage1 = importlib.import_module("01_extract")
stage4 = importlib.import_module("04_train")
stage5 = importlib.import_module("05_eval")


def change(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.fixture
def coco(tmp_path):
    datasets.coco(tmp_path / "coco", count=4)
    return tmp_path, tmp_path / "coco/annotations/instances_val2017.json"


# ------------------------------------------------------------------ COCO


def perfect_ap(root):
    """AP of predictions that are the truth."""
    samples = open_split("coco_instance", root, "val")
    score = stage5.CocoInstanceScore(samples.coco.file)
    for sample in samples:
        things = ~sample["iscrowd"]
        masks = np.array([rle.decode(code) for code in sample["rles"]], bool)
        ids = [samples.categories[label].id for label in sample["labels"][things]]
        score.update(
            **sample["truth"]["AP"],
            masks=torch.from_numpy(masks)[things],
            category_ids=torch.tensor(ids),
            scores=torch.ones(len(ids)),
        )
    return score.result()["AP"]


def renumber(start, anew):
    """Number the annotations from `start` on, of each image anew or of all together."""

    def edit(content):
        count = {}
        for i, annotation in enumerate(content["annotations"]):
            image = annotation["image_id"]
            count[image] = count.get(image, start - 1) + 1
            annotation["id"] = count[image] if anew else start + i

    return edit


def spoil(key):
    def edit(content):
        for annotation in content["annotations"]:
            annotation.pop(key, None)

    return edit


def add(shape):
    def edit(content):
        first = content["annotations"][0]
        content["annotations"].append(first | {"segmentation": shape, "id": 10_000})

    return edit


def as_text(content):
    for image in content["images"]:
        image["id"] = f"photo {image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"photo {annotation['image_id']}"


@pytest.mark.parametrize(
    "edit",
    [
        renumber(1, anew=False),
        renumber(0, anew=False),
        renumber(1, anew=True),
        spoil("id"),
        spoil("area"),
        spoil("bbox"),
        add([]),
        add([[]]),
        add([[0, 0, 5, 5]]),
        as_text,
    ],
)
def test_perfect_predictions_score_100_whatever_the_truth_leaves_out(coco, edit):
    root, file = coco
    change(file, edit)
    assert perfect_ap(root) == pytest.approx(100)


def test_truth_without_crowd_flags_has_no_crowds(coco):
    root, file = coco
    change(file, spoil("iscrowd"))
    for sample in open_split("coco_instance", root, "val"):
        assert not sample["iscrowd"].any()
    assert perfect_ap(root) == pytest.approx(100)

    def spoil_segments(content):
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                segment.pop("iscrowd")

    change(file.with_name("panoptic_val2017.json"), spoil_segments)
    assert not open_split("coco_panoptic", root, "val")[0]["iscrowd"].any()


def twice(key):
    def edit(content):
        content["images"][1][key] = content["images"][0][key]

    return edit


def unlist_images(content):
    content["images"].clear()


def annotate_unlisted_image(content):
    content["annotations"].append({"image_id": 5})


SAME_ID = "two images of the same id: 000000001000.jpg and 000000001037.jpg, ids 1000 and 1000"
SAME_NAME = (
    "two images of the same file_name: 000000001000.jpg and 000000001000.jpg, ids 1000 and 1037"
)


@pytest.mark.parametrize(
    "edit, message",
    [
        (twice("id"), SAME_ID),
        (twice("file_name"), SAME_NAME),
        (unlist_images, "lists no image"),
        (annotate_unlisted_image, "annotations of images that it does not list"),
    ],
)
@pytest.mark.parametrize("benchmark", ["coco_instance", "coco_panoptic"])
def test_lists_that_would_shift_images_are_refused(coco, benchmark, edit, message):
    root, file = coco
    if benchmark == "coco_panoptic":
        file = file.with_name("panoptic_val2017.json")
    change(file, edit)
    with pytest.raises(UserError, match=message):
        open_split(benchmark, root, "val")


def test_file_names_with_a_folder_are_found(coco):
    root, file = coco
    (root / "coco/val2017/bonn").mkdir()
    for path in list((root / "coco/val2017").glob("*.jpg")):
        path.rename(path.parent / "bonn" / path.name)

    def add_folder(content):
        for image in content["images"]:
            image["file_name"] = f"bonn/{image['file_name']}"

    change(file, add_folder)
    samples = open_split("coco_instance", root, "val")
    assert samples[0]["name"] == "val2017/bonn/000000001000.jpg"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # a byte-order mark
    assert len(open_split("coco_instance", root, "val")) == 4
    assert perfect_ap(root) == pytest.approx(100)


def test_run_lengths_are_decoded_as_pycocotools_does():
    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.5, 0.99, 1):
        mask = rng.random((70, 90)) < share
        code = rle.encode(np.asfortranarray(mask, np.uint8))
        counts = run_lengths(code["counts"])
        uncompressed = {"size": [70, 90], "counts": counts}
        assert rle.frPyObjects(uncompressed, 70, 90)["counts"] == code["counts"]
        as_text = {"size": [70, 90], "counts": code["counts"].decode()}
        for form in (code, as_text, uncompressed):
            assert (rle.decode(encode_mask(form, (70, 90))) == mask).all()


@pytest.mark.parametrize(
    "shape",
    [
        # too short: training would decode whatever memory held
        {"size": [128, 256], "counts": [100, 200]},
        # too long: scoring would never end
        {"size": [128, 256], "counts": [100, 40_000]},
        {"size": [128, 256], "counts": [-5, 128 * 256 + 5]},
        {"size": [128, 256], "counts": "PPYo1"},  # damaged
        {"size": [256, 128], "counts": [128 * 256]},
        [[0, 0, 5, float("nan"), 5, 5]],
        [["a", 0, 5, 0, 5, 5]],
    ],
)
def test_masks_that_are_none_are_named(coco, shape):
    root, file = coco
    change(file, lambda content: content["annotations"][0].update(segmentation=shape))
    unreadable = "instances_val2017.json cannot be read as"
    mask = "mask 1 of .*val2017/000000001000.jpg"
    with pytest.raises(UserError, match=f"{unreadable} {mask}"):
        open_split("coco_instance", root, "val")[0]
    with pytest.raises(UserError, match=f"{unreadable} a mask of image 1000"):
        stage5.CocoInstanceScore(file)


def test_hidden_files_are_no_samples(data, tmp_path):
    shutil.copytree(data / "toycity", tmp_path / "toycity")
    image = next((tmp_path / "toycity/leftImg8bit/val/toycity").iterdir())
    (image.parent / f"._{image.name}").write_bytes(b"AppleDouble")
    assert len(open_split("toycity", tmp_path, "val")) == 6


# ------------------------------------------------------------------ images


@pytest.fixture
def album(tmp_path):
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.png")):
        Image.fromarray(toycity.scene("val", 70 + i)[0][150:406, 200:600]).save(folder / name)
    return folder


def test_links_are_followed_and_not_in_circles(album, tmp_path):
    (tmp_path / "far").mkdir()
    Image.open(album / "a.png").save(tmp_path / "far/d.png")
    (album / "linked").symlink_to(tmp_path / "far")
    (album / "sub/circle").symlink_to(album)
    (album / ".hidden").mkdir()
    Image.open(album / "a.png").save(album / ".hidden/e.png")
    assert list_images(album) == ["a.png", "b.png", "linked/d.png", "sub/c.png"]


def test_a_run_inside_the_folder_is_none_of_its_images(album, stage):
    words = ("--images", album, "--run", album / "run", "--size", "64")
    stage("01_extract", *words)
    assert "0 are to be extracted" in stage("01_extract", *words)


def test_an_image_replaced_under_its_name_is_extracted_again(album, stage, tmp_path):
    words = ("--images", album, "--run", tmp_path / "run", "--size", "64")
    stage("01_extract", *words)
    file = tmp_path / "run/features/tiny_vit/a.png.safetensors"
    other = tmp_path / "run/features/tiny_vit/b.png.safetensors"
    before = load_file(file)["16"]
    times = [path.stat().st_mtime_ns for path in (file, other)]
    assert "0 are to be extracted" in stage("01_extract", *words)
    Image.fromarray(toycity.scene("val", 90)[0][150:406, 200:600]).save(album / "a.png")
    said = stage("01_extract", *words)
    assert f"extracting {file} again: {album / 'a.png'} has changed since" in said
    assert "1 are to be extracted" in said
    assert not torch.equal(load_file(file)["16"], before)
    assert other.stat().st_mtime_ns == times[1]
    stage("02_metrics", "--run", tmp_path / "run")


def test_an_image_of_the_same_size_and_another_time_is_extracted_again(album, stage, tmp_path):
    words = ("--images", album, "--run", tmp_path / "run", "--size", "64")
    stage("01_extract", *words)
    status = (album / "a.png").stat()
    os.utime(album / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    assert "1 are to be extracted" in stage("01_extract", *words)
    assert "0 are to be extracted" in stage("01_extract", *words)


def test_features_beyond_float16_are_kept_and_flat_maps_counted_aloud(
    album, stage, tmp_path, monkeypatch
):
    load = stage1.load_encoder

    def load_loud(name, *options):
        encoder = load(name, *options)
        if name == "tiny_vit":
            encoder.model.norm.weight.data *= 17_200
            encoder.model.norm.bias.data *= 17_200
        return encoder

    monkeypatch.setattr(stage1, "load_encoder", load_loud)
    words = ("--images", album, "--size", "64", "--encoders", "tiny_vit", "tiny_hiera")
    stage("01_extract", *words, "--run", tmp_path / "loud")
    monkeypatch.undo()
    stage("01_extract", *words, "--run", tmp_path / "run")
    features = load_file(tmp_path / "loud/features/tiny_vit/a.png.safetensors")["16"]
    assert features.dtype == torch.float32 and features.isfinite().all()
    assert features.abs().max() > 65_504
    features = load_file(tmp_path / "loud/features/tiny_hiera/a.png.safetensors")["16"]
    assert features.dtype == torch.float16
    scores = []
    for folder in (tmp_path / "loud", tmp_path / "run"):
        assert "score 0" not in stage("02_metrics", "--run", folder)
        metrics = json.loads((folder / "metrics.json").read_text())
        scores.append(metrics["scores"]["tiny_vit"]["16"])
    for name in ("SFC", "EF"):  # neither depends on scale
        assert scores[0][name]["mean"] == pytest.approx(scores[1][name]["mean"], rel=0.02)

    file = tmp_path / "run/features/tiny_vit/a.png.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-2000] + b"\x00\x7c" * 1000)  # infinity
    said = stage("02_metrics", "--run", tmp_path / "run")
    assert "WARNING: 1 maps of tiny_vit at OS 16 are constant or not finite, and score 0" in said
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["degenerate"]["tiny_vit"] == {"4": 1, "8": 1, "16": 1, "32": 1}
    assert metrics["degenerate"]["tiny_hiera"] == {"4": 0, "8": 0, "16": 0, "32": 0}
    said = stage("03_select", "--run", tmp_path / "run")
    everywhere = "1 at OS 4, 1 at OS 8, 1 at OS 16, 1 at OS 32"
    assert f"tiny_vit: {everywhere} of 3 maps are constant or not finite, and score 0" in said


def test_a_benchmark_s_images_are_read_as_stored(stage, tmp_path):
    datasets.cityscapes(tmp_path / "data/cityscapes", "train")
    words = ("--benchmark", "cityscapes_semantic", "--data", tmp_path / "data")
    words += ("--size", "64x128")
    stage("01_extract", *words, "--run", tmp_path / "plain")
    stage("02_metrics", "--run", tmp_path / "plain")
    exif = Image.Exif()
    exif[0x0112] = 3
    for path in (tmp_path / "data/cityscapes/leftImg8bit").rglob("*.png"):
        Image.open(path).save(path, exif=exif)
    stage("01_extract", *words, "--run", tmp_path / "marked")
    stage("02_metrics", "--run", tmp_path / "marked")
    marked = (tmp_path / "marked/metrics.csv").read_bytes()
    assert marked == (tmp_path / "plain/metrics.csv").read_bytes()


# ------------------------------------------------------------------ training


def test_a_damaged_checkpoint_is_not_used(tmp_path):
    file = tmp_path / "checkpoint.pt"
    torch.save({"step": 1, "training": {"x": 1}, "model": torch.rand(10_000)}, file)
    assert run.read_checkpoint(file)["step"] == 1
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(255 - byte for byte in content[middle : middle + 400])
    file.write_bytes(content)
    torch.load(file, weights_only=True)  # torch itself notices nothing
    with pytest.raises(UserError, match="checkpoint.pt cannot be read .ValueError.*: move it away"):
        stage4.load_checkpoint(tmp_path, None)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="is no checkpoint of this project's model .*is damaged"):
        stage5.load_trained(tmp_path)


def test_images_of_one_pixel_can_be_cropped():
    recipe = stage4.RECIPES["toycity"]
    for height, width in ((1, 300), (300, 1), (1, 1)):
        sample = {
            "image": torch.zeros(3, height, width, dtype=torch.uint8),
            "name": "thin",
            "segments": torch.ones(height, width, dtype=torch.int32),
            "labels": torch.zeros(1).long(),
            "iscrowd": torch.zeros(1).bool(),
        }
        for seed in range(3):
            crop = stage4.augment(sample, recipe, np.random.default_rng(seed))
            assert crop["image"].shape[1:] == recipe.crop and len(crop["masks"]) == 1


def test_seeds_are_whole_numbers(monkeypatch, capsys):
    for seed in ("-1", str(2**32), "x"):
        monkeypatch.setattr(sys, "argv", ["04_train.py", "--seed", seed])
        with pytest.raises(SystemExit):
            run.parse("", stage4.Settings, overrides=stage4.Recipe)
        assert "is not a whole number from 0" in capsys.readouterr().err


# ------------------------------------------------------------------ workers


def test_with_too_little_shared_memory_there_are_no_workers(monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=64 << 20))
    for workers in (8, 0):
        assert run.loader_arguments(workers)["num_workers"] == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "/dev/shm has 64 MB free" in said and "--shm-size" in said
    monkeypatch.undo()
    assert run.loader_arguments(1)["num_workers"] == 1


KILLED = """
import os, signal
from torch.utils.data import DataLoader
from common import run
def read(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item
loader = DataLoader(range(8), None, collate_fn=read, **run.loader_arguments(2))
run.start(lambda: print(list(loader)))
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
RAISES = KILLED.replace(KILL, "raise RuntimeError('the real cause')")


def run_code(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind, traced", [("RuntimeError", True), ("run.UserError", False)])
def test_an_error_in_a_worker_ends_the_stage_at_once(kind, traced):
    done = run_code(RAISES.replace("RuntimeError", kind))
    assert done.returncode == 1 and "the real cause" in done.stderr
    assert ("Traceback" in done.stderr) == traced
    if not traced:
        assert done.stderr == "error: the real cause\n"


def test_a_worker_that_is_killed_ends_the_stage_in_one_line():
    done = run_code(KILLED)
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith("error: a worker process has died") and done.stderr.count("\n") == 1
    )
    assert "--workers" in done.stderr


# ------------------------------------------------------------------ words and ends


def test_relative_and_absolute_folders_are_the_same_one(album, stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage("01_extract", "--images", "album", "--run", "run", "--size", "64")
    words = ("--images", album, "--run", tmp_path / "run", "--size", "64")
    assert "0 are to be extracted" in stage("01_extract", *words)
    monkeypatch.chdir(album)  # the images are found from anywhere
    assert "means over 3 images" in stage("02_metrics", "--run", tmp_path / "run")


def test_blank_and_smallest_images_break_no_chain(stage, tmp_path):
    (tmp_path / "album").mkdir()
    for i, side in enumerate((3, 64, 200)):
        Image.new("RGB", (side, side), "white").save(tmp_path / f"album/{i}.png")
    stage("01_extract", "--images", tmp_path / "album", "--run", tmp_path / "run", "--size", "64")
    assert stage("02_metrics", "--run", tmp_path / "run").count("no contrast") == 3
    choice = ("--master", "tiny_vit", "--auxiliary", "tiny_hiera", "--stride", 8)
    said = stage("03_select", "--run", tmp_path / "run", *choice)
    assert "WARNING: EF of tiny_hiera at OS 8, 0.00, does not clear" in said


def test_a_full_disk_in_training_is_told_in_one_line(tmp_path, monkeypatch):
    def full(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match="no checkpoint could be written to .*is the disk full"):
        stage4.save_checkpoint(tmp_path, model, optimiser, 1, {"seed": 0})
    assert not list(tmp_path.iterdir())


def test_whatever_a_decoder_raises_names_the_image(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def damaged(image, mode=None):
        raise RuntimeError("Failed to decode frame 0: Truncated data")

    monkeypatch.setattr(Image.Image, "convert", damaged)
    unreadable = "a.png cannot be read as an image .RuntimeError: Failed to decode frame 0"
    with pytest.raises(UserError, match=unreadable):
        read_image(tmp_path / "a.png")


def test_a_log_that_is_gone_gets_its_head_again(tmp_path):
    with stage4.open_log(tmp_path, 5) as log:
        for step in (6, 7):
            print(step, *range(len(stage4.LOG_COLUMNS) - 1), sep=",", file=log)
    assert stage4.read_log(tmp_path)["step"].tolist() == [6, 7]
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == ",".join(stage4.LOG_COLUMNS)


def test_the_images_folder_cannot_be_the_run(album, stage):
    with pytest.raises(UserError, match="holds the images: give another --run"):
        stage("01_extract", "--images", album, "--run", album)


def test_too_long_a_name_is_left_out_each_time(album, stage, tmp_path):
    Image.open(album / "a.png").save(album / f"{'n' * 246}.png")
    for _ in range(2):
        said = stage("01_extract", "--images", album, "--run", tmp_path / "run", "--size", "64")
        assert "left out: " in said and "too long" in said
