"""Inputs that people are known to meet, which once gave a silent wrong result, a hang or a stack trace."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from common import run, toycity
from common.datasets import encode_mask, list_pictures, open_split, read_image, run_lengths
from common.run import UserError

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
stage1, stage4, stage5 = (importlib.import_module(name) for name in ("01_extract", "04_train", "05_eval"))


def change(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.fixture
def coco(tmp_path):
    datasets.coco(tmp_path / "coco", count=4)
    return tmp_path, tmp_path / "coco/annotations/instances_val2017.json"


# ------------------------------------------------------------------------------------------------- COCO


def perfect_ap(root):
    """AP of predictions that are the truth."""
    samples = open_split("coco_instance", root, "val")
    score = stage5.CocoInstanceScore(samples.coco.file)
    for sample in samples:
        things = ~sample["crowd"]
        masks = torch.from_numpy(np.array([rle.decode(code) for code in sample["rles"]], bool))[things]
        ids = torch.tensor([samples.categories[label].id for label in sample["labels"][things]])
        score.update(sample["image_id"], masks, ids, torch.ones(len(ids)))
    return score.result()["AP"]


def renumber(start, anew):
    def edit(content):
        count = {}
        for i, annotation in enumerate(content["annotations"]):
            image = annotation["image_id"]
            count[image] = count.get(image, start - 1) + 1
            annotation["id"] = count[image] if anew else start + i

    return edit


def spoil(key):
    return lambda content: [annotation.pop(key, None) for annotation in content["annotations"]]


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
    [renumber(1, False), renumber(0, False), renumber(1, True), spoil("id"), spoil("area"), spoil("bbox")]
    + [add([]), add([[]]), add([[0, 0, 5, 5]]), as_text],
)
def test_perfect_predictions_score_100_whatever_the_truth_leaves_out(coco, edit):
    root, file = coco
    change(file, edit)
    assert perfect_ap(root) == pytest.approx(100)


def test_truth_without_crowd_flags_has_no_crowds(coco):
    root, file = coco
    change(file, spoil("iscrowd"))
    assert not any(sample["crowd"].any() for sample in open_split("coco_instance", root, "val"))
    assert perfect_ap(root) == pytest.approx(100)
    panoptic = file.with_name("panoptic_val2017.json")
    change(panoptic, lambda c: [s.pop("iscrowd") for a in c["annotations"] for s in a["segments_info"]])
    assert not open_split("coco_panoptic", root, "val")[0]["crowd"].any()


def twice(key):
    def edit(content):
        content["images"][1][key] = content["images"][0][key]

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (twice("id"), "two images of the id 1000: 000000001000.jpg, 000000001037.jpg"),
        (twice("file_name"), "000000001000.jpg twice, with the ids 1000 and 1037"),
        (lambda content: content["images"].clear(), "lists no image"),
        (lambda content: content["annotations"].append({"image_id": 5}), "annotations of images that it does not list"),
    ],
)
@pytest.mark.parametrize("benchmark", ["coco_instance", "coco_panoptic"])
def test_lists_that_would_shift_pictures_are_refused(coco, benchmark, edit, message):
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
    change(file, lambda c: [image.update(file_name=f"bonn/{image['file_name']}") for image in c["images"]])
    assert open_split("coco_instance", root, "val")[0]["name"] == "val2017/bonn/000000001000.jpg"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # a byte-order mark
    assert len(open_split("coco_instance", root, "val")) == 4
    assert perfect_ap(root) == pytest.approx(100)


def test_run_lengths_are_decoded_as_pycocotools_does():
    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.5, 0.99, 1):
        mask = rng.random((70, 90)) < share
        code = rle.encode(np.asfortranarray(mask, np.uint8))
        counts = run_lengths(code["counts"])
        assert rle.frPyObjects({"size": [70, 90], "counts": counts}, 70, 90)["counts"] == code["counts"]
        for form in (code, code | {"counts": code["counts"].decode()}, {"size": [70, 90], "counts": counts}):
            assert (rle.decode(encode_mask(form, (70, 90))) == mask).all()


@pytest.mark.parametrize(
    "shape",
    [
        {"size": [128, 256], "counts": [100, 200]},  # too short: training would decode whatever memory held
        {"size": [128, 256], "counts": [100, 40_000]},  # too long: scoring would never end
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
    with pytest.raises(UserError, match="instances_val2017.json cannot be read as mask 1 of val2017/000000001000.jpg"):
        open_split("coco_instance", root, "val")[0]
    with pytest.raises(UserError, match="instances_val2017.json cannot be read as a mask of image 1000"):
        stage5.CocoInstanceScore(file)


def test_hidden_files_are_no_samples(data, tmp_path):
    shutil.copytree(data / "toycity", tmp_path / "toycity")
    picture = next((tmp_path / "toycity/leftImg8bit/val/toycity").iterdir())
    (picture.parent / f"._{picture.name}").write_bytes(b"AppleDouble")
    assert len(open_split("toycity", tmp_path, "val")) == 6


# ------------------------------------------------------------------------------------------------- pictures


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
    assert list_pictures(album) == ["a.png", "b.png", "linked/d.png", "sub/c.png"]


def test_a_run_inside_the_folder_is_not_its_own_picture(album, stage):
    words = ("--images", album, "--run", album / "run", "--size", "64")
    stage("01_extract", *words)
    assert "0 are still to be extracted" in stage("01_extract", *words)


def test_a_picture_replaced_under_its_name_is_extracted_again(album, stage, tmp_path):
    words = ("--images", album, "--run", tmp_path / "run", "--size", "64")
    stage("01_extract", *words)
    file = tmp_path / "run/features/tiny_vit/a.png.safetensors"
    before, other = load_file(file)["16"], (tmp_path / "run/features/tiny_vit/b.png.safetensors").stat().st_mtime_ns
    Image.fromarray(toycity.scene("val", 90)[0][150:406, 200:600]).save(album / "a.png")
    with pytest.raises(UserError, match="a.png.safetensors is of another picture than a.png is now: run"):
        stage("02_metrics", "--run", tmp_path / "run")
    said = stage("01_extract", *words)
    assert "a.png is not the picture that" in said and "1 are still to be extracted" in said
    assert not torch.equal(load_file(file)["16"], before)
    assert (tmp_path / "run/features/tiny_vit/b.png.safetensors").stat().st_mtime_ns == other


def test_features_beyond_float16_are_kept_and_flat_maps_counted_aloud(album, stage, tmp_path, monkeypatch):
    load = stage1.load_encoder

    def loud(name, *more):
        encoder = load(name, *more)
        if name == "tiny_vit":
            encoder.model.norm.weight.data *= 17_200
            encoder.model.norm.bias.data *= 17_200
        return encoder

    monkeypatch.setattr(stage1, "load_encoder", loud)
    words = ("--images", album, "--size", "64", "--encoders", "tiny_vit", "tiny_hiera")
    stage("01_extract", *words, "--run", tmp_path / "loud")
    monkeypatch.undo()
    stage("01_extract", *words, "--run", tmp_path / "run")
    features = load_file(tmp_path / "loud/features/tiny_vit/a.png.safetensors")["16"]
    assert features.dtype == torch.float32 and features.isfinite().all() and features.abs().max() > 65_504
    assert load_file(tmp_path / "loud/features/tiny_hiera/a.png.safetensors")["16"].dtype == torch.float16
    scores = []
    for folder in (tmp_path / "loud", tmp_path / "run"):
        assert "score 0" not in stage("02_metrics", "--run", folder)
        scores.append(json.loads((folder / "metrics.json").read_text())["scores"]["tiny_vit"]["16"])
    for name in ("SFC", "EF"):  # neither depends on scale
        assert scores[0][name]["mean"] == pytest.approx(scores[1][name]["mean"], rel=0.02)

    file = tmp_path / "run/features/tiny_vit/a.png.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-2000] + b"\x00\x7c" * 1000)  # infinity
    said = stage("02_metrics", "--run", tmp_path / "run")
    assert "WARNING: 1 maps of tiny_vit at OS 16 are constant or not finite, and score 0" in said
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["degenerate"] == {"tiny_vit": dict.fromkeys(["4", "8", "16", "32"], 1),
                                     "tiny_hiera": dict.fromkeys(["4", "8", "16", "32"], 0)}  # fmt: skip
    said = stage("03_select", "--run", tmp_path / "run")
    assert "[1, 1, 1, 1] of tiny_vit are constant or not finite" in said


def test_a_benchmark_s_pictures_are_read_as_stored(stage, tmp_path):
    datasets.cityscapes(tmp_path / "data/cityscapes", "train")
    words = ("--benchmark", "cityscapes_semantic", "--data", tmp_path / "data", "--size", "64x128")
    stage("01_extract", *words, "--run", tmp_path / "plain")
    stage("02_metrics", "--run", tmp_path / "plain")
    exif = Image.Exif()
    exif[0x0112] = 3
    for path in (tmp_path / "data/cityscapes/leftImg8bit").rglob("*.png"):
        Image.open(path).save(path, exif=exif)
    stage("01_extract", *words, "--run", tmp_path / "marked")
    stage("02_metrics", "--run", tmp_path / "marked")
    one, other = ((tmp_path / folder / "metrics.csv").read_bytes() for folder in ("plain", "marked"))
    assert one == other


# ------------------------------------------------------------------------------------------------- training


def test_a_damaged_checkpoint_is_not_used(tmp_path):
    torch.save({"step": 1, "settings": {"x": 1}, "model": torch.rand(10_000)}, tmp_path / "checkpoint.pt")
    assert run.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 1
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(255 - byte for byte in content[middle : middle + 400])
    (tmp_path / "checkpoint.pt").write_bytes(content)
    torch.load(tmp_path / "checkpoint.pt", weights_only=True)  # torch itself notices nothing
    with pytest.raises(UserError, match="checkpoint.pt cannot be read .ValueError.*: move it away"):
        stage4.load_checkpoint(tmp_path, None)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="is no checkpoint of this project's model .*is damaged"):
        stage5.load_trained(tmp_path)


def test_two_trainings_do_not_share_a_folder(tmp_path):
    hold = f"import fcntl, time; file = open({str(tmp_path / 'log.csv')!r}, 'a'); fcntl.lockf(file, fcntl.LOCK_EX)"
    hold += "; print('one step', file=file, flush=True); print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another training is writing to"):
            stage4.open_log(tmp_path, 0)
        assert (tmp_path / "log.csv").read_text() == "one step\n"  # what the other wrote is left alone
        other.kill()
    stage4.open_log(tmp_path, 0).close()  # the lock is gone with its holder
    assert (tmp_path / "log.csv").read_text() == ",".join(stage4.LOG) + "\n"


def test_pictures_of_one_pixel_can_be_cropped():
    recipe = stage4.RECIPES["toycity"]
    for height, width in ((1, 300), (300, 1), (1, 1)):
        sample = {"image": torch.zeros(3, height, width, dtype=torch.uint8), "name": "thin"}
        sample |= {"segments": torch.ones(height, width, dtype=torch.int32)}
        sample |= {"labels": torch.zeros(1).long(), "crowd": torch.zeros(1).bool()}
        for seed in range(3):
            crop = stage4.augment(sample, recipe, np.random.default_rng(seed))
            assert crop["image"].shape[1:] == recipe.crop and len(crop["masks"]) == 1


def test_seeds_are_whole_numbers(monkeypatch, capsys):
    for seed in ("-1", str(2**32), "x"):
        monkeypatch.setattr(sys, "argv", ["04_train.py", "--seed", seed])
        with pytest.raises(SystemExit):
            run.parse("", stage4.Settings, stage4.Recipe)
        assert "is not a whole number from 0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- helpers


def test_with_too_little_shared_memory_there_are_no_helpers(monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=64 << 20))
    assert run.loader_arguments(8)["num_workers"] == run.loader_arguments(0)["num_workers"] == 0
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
run.start(lambda: print(list(DataLoader(range(8), None, collate_fn=read, **run.loader_arguments(2)))))
"""


RAISES = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError('the real cause')")


@pytest.mark.parametrize("kind, traced", [("RuntimeError", True), ("run.UserError", False)])
def test_an_error_in_a_helper_ends_the_stage_at_once(kind, traced):
    code = RAISES.replace("RuntimeError", kind)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "the real cause" in done.stderr and ("Traceback" in done.stderr) == traced


def test_a_helper_that_is_killed_ends_the_stage_in_one_line():
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: a helper process ended") and done.stderr.count("\n") == 1
    assert "--workers" in done.stderr


# ------------------------------------------------------------------------------------------------- words and ends


def test_relative_and_absolute_folders_are_the_same_one(album, stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage("01_extract", "--images", "album", "--run", "run", "--size", "64")
    assert "0 are still to be" in stage("01_extract", "--images", album, "--run", tmp_path / "run", "--size", "64")
    monkeypatch.chdir(album)  # the pictures are found from anywhere
    assert "means over 3 images" in stage("02_metrics", "--run", tmp_path / "run")


def test_blank_and_smallest_pictures_break_no_chain(stage, tmp_path):
    (tmp_path / "album").mkdir()
    for i, side in enumerate((3, 64, 200)):
        Image.new("RGB", (side, side), "white").save(tmp_path / f"album/{i}.png")
    stage("01_extract", "--images", tmp_path / "album", "--run", tmp_path / "run", "--size", "64")
    assert stage("02_metrics", "--run", tmp_path / "run").count("no contrast") == 3
    said = stage(
        "03_select", "--run", tmp_path / "run", "--master", "tiny_vit", "--auxiliary", "tiny_hiera", "--stride", 8
    )
    assert "WARNING: EF of tiny_hiera at OS 8, 0.00, does not clear" in said


def test_a_full_disk_in_training_is_told_in_one_line(tmp_path, monkeypatch):
    def full(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    training = stage4.Training(*[None] * 13, recipe=stage4.RECIPES["toycity"])
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="no checkpoint could be written to .*is the disk full"):
        stage4.save_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), 1, training)
    assert not list(tmp_path.iterdir())


def test_whatever_a_decoder_raises_names_the_picture(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def damaged(image, mode=None):
        raise RuntimeError("Failed to decode frame 0: Truncated data")

    monkeypatch.setattr(Image.Image, "convert", damaged)
    with pytest.raises(UserError, match="a.png cannot be read as a picture .RuntimeError: Failed to decode frame 0"):
        read_image(tmp_path / "a.png")


def test_a_log_that_is_gone_gets_its_head_again(tmp_path):
    with stage4.open_log(tmp_path, 5) as log:
        for step in (6, 7):
            print(step, *range(len(stage4.LOG) - 1), sep=",", file=log)
    assert stage4.read_log(tmp_path)["step"].tolist() == [6, 7]


def test_the_pictures_folder_cannot_be_the_run(album, stage):
    with pytest.raises(UserError, match="holds the pictures: give another --run"):
        stage("01_extract", "--images", album, "--run", album)


def test_too_long_a_name_is_left_out_each_time(album, stage, tmp_path):
    Image.open(album / "a.png").save(album / f"{'n' * 246}.png")
    for _ in range(2):
        said = stage("01_extract", "--images", album, "--run", tmp_path / "run", "--size", "64")
        assert "left out: " in said and "too long" in said
