"""The five stages as a person runs them: in order, out of order, interrupted, with mistakes."""

import csv
import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import run, toycity
from common.encoders import load_encoder
from common.run import UserError

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three images of different sizes, one in a sub-folder."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    sizes = {"a.png": (96, 64), "b c.jpg": (64, 128), "sub/a.png": (100, 90)}
    for i, (name, size) in enumerate(sizes.items()):
        image = toycity.scene("val", 50 + i)[0][150:400, 300:700]
        Image.fromarray(image).resize(size).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def few(data, tmp_path_factory):
    """The small toycity with all of its training scenes, and two of its validation scenes."""
    root = tmp_path_factory.mktemp("few")
    shutil.copytree(data / "toycity", root / "toycity")
    for index in range(2, 6):
        for path in root.rglob(f"val/toycity/toycity_000000_{index:06d}_*"):
            path.unlink()
    return root


@pytest.fixture
def extract(stage, photos, tmp_path):
    def call(*words, folder="run", images=photos):
        flags = ("--images", images, "--run", tmp_path / folder, "--size", "64")
        return stage("01_extract", *flags, *words)

    return call


def feature_files(folder):
    return sorted(Path(folder).rglob("*.safetensors"))


# ------------------------------------------------------------------ in order


def test_the_main_job_on_a_small_toycity(stage, few, tmp_path):
    folder = tmp_path / "run"
    said = stage("01_extract", "--data", few, "--run", folder, "--limit", 4)
    assert "4 images of" in said and f"next: python 02_metrics.py --run {folder}" in said
    said = stage("02_metrics", "--run", folder)
    assert "shifted" in said and "edges.png" in said
    assert f"next: python 03_select.py --run {folder}" in said
    said = stage("03_select", "--run", folder, "--stride", 8)
    assert f"next: python 04_train.py --run {folder}" in said
    plan = ("--steps", 0, "--accumulate", 2, "--out", tmp_path / "plan")
    said = stage("04_train", "--run", folder, *plan)
    assert "16 images of" in said
    assert "900 steps of 2 images, in 2 part(s): 112.5 epochs" in said
    assert "M learn" in said and "next: " not in said and not (tmp_path / "plan").exists()
    said = stage("04_train", "--run", folder, "--steps", 4, "--batch-size", 2)
    assert f"next: python 05_eval.py --run {folder}" in said and "M are frozen" in said
    stage("05_eval", "--run", folder, "--limit", 1)
    assert not (folder / "results.json").exists()
    assert (folder / "results_limit1.json").is_file()
    said = stage("05_eval", "--run", folder)
    assert all(name in said for name in ("mIoU", "AP50", "PQ_th", "truck"))
    texts = ("run.json", "metrics.csv", "metrics.json", "selection.json", "log.csv")
    for file in (*texts, "results.json", "results.md"):
        assert (folder / file).stat().st_size > 100, file
    for file in ("features.png", "metrics.png", "edges.png", "loss.png", "predictions.png"):
        assert Image.open(folder / file).size[0] > 500, file
    results = json.loads((folder / "results.json").read_text())
    assert results["benchmark"] == "toycity" and results["images"] == 2
    assert results["model"]["stride"] == 8 and results["model"]["steps"] == 4
    assert list(results["per_class"]) == ["mIoU", "AP", "PQ"]
    for metric, per_class in results["per_class"].items():
        values = [value for value in per_class.values() if value is not None]
        assert results["scores"][metric] == pytest.approx(np.mean(values)), metric
    assert not list(folder.rglob("*.tmp"))

    # The same command again finds nothing to do, or says the same.
    before = (folder / "results.json").read_bytes()
    stage("04_train", "--run", folder, "--steps", 4, "--batch-size", 2)
    stage("05_eval", "--run", folder)
    stage("05_eval", "--run", folder, "--limit", 1)
    assert (folder / "results.json").read_bytes() == before

    # An ablation goes to a folder of its own. Other settings in the same folder are refused.
    alone = tmp_path / "alone"
    steps = ("--steps", 2, "--batch-size", 2)
    stage("04_train", "--run", folder, "--out", alone, "--fusion", "none", *steps)
    selection = (alone / "selection.json").read_text()
    assert json.loads(selection)["master"] == "tiny_hiera"
    assert json.loads(selection)["auxiliary"] is None
    stage("05_eval", "--run", alone)
    with pytest.raises(UserError, match=r"made with other settings \(auxiliary, stride, fusion"):
        stage("04_train", "--run", folder, "--out", alone, *steps)
    assert (alone / "selection.json").read_text() == selection
    refused = [
        ("--stride", 16),
        ("--fusion", "add"),
        ("--fusion", "none"),
        ("--master-mode", "frozen"),
        ("--out", folder / ".", "--aux-mode", "finetuned"),
    ]
    for flags in refused:
        with pytest.raises(UserError, match="its own folder with --out"):
            stage("04_train", "--run", folder, *flags)

    added = tmp_path / "added"
    stage("04_train", "--run", folder, "--out", added, "--fusion", "add", "--steps", 1)
    assert json.loads((added / "selection.json").read_text())["chosen_by_hand"] == ["stride"]

    # Both in one table
    said = stage("05_eval", "--compare", folder, alone, tmp_path)
    assert "left out" in said
    assert re.search(r"run +\| toycity +\| tiny_hiera \| tiny_vit +\| 8 ", said)
    assert re.search(r"alone +\| toycity +\| tiny_hiera \| - +\| - ", said)

    # And the trained model looks at other images.
    (tmp_path / "other").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "other")  # no image: is passed over
    Image.fromarray(toycity.scene("val", 99)[0]).save(tmp_path / "other/street.png")
    stage("05_eval", "--run", alone, "--images", tmp_path / "other")
    assert [path.name for path in (alone / "predictions").iterdir()] == ["street.png.png"]


def test_images_of_any_size_without_labels(stage, extract, tmp_path):
    said = extract("--encoders", "tiny_vit", "tiny_hiera")
    assert "3 images" in said
    names = json.loads((tmp_path / "run/run.json").read_text())["images"]
    assert names == ["a.png", "b c.jpg", "sub/a.png"]
    assert (tmp_path / "run/features/tiny_vit/sub/a.png.safetensors").is_file()
    maps = run.read_features(tmp_path / "run", "tiny_hiera", "a.png")
    shapes = {stride: tuple(features.shape) for stride, features in maps.items()}
    assert shapes == {4: (24, 16, 24), 8: (48, 8, 12), 16: (96, 4, 6), 32: (192, 2, 3)}
    stage("02_metrics", "--run", tmp_path / "run")
    with open(tmp_path / "run/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (2 + 3) * 4
    said = stage("03_select", "--run", tmp_path / "run", "--stride", 4)
    assert "training needs labels" in said and "stride held fixed" in said
    with pytest.raises(UserError, match="without labels"):
        stage("04_train", "--run", tmp_path / "run")


def test_random_weights_are_said_loudly_by_every_stage(stage, few, tmp_path):
    flags = ("--run", tmp_path / "run")
    size = ("--limit", 2, "--size", "64x128")
    said = stage("01_extract", *flags, "--data", few, *size, "--weights", "none")
    assert "RANDOM WEIGHTS" in said
    assert stage("02_metrics", *flags).count("RANDOM weights") == 2
    choice = ("--master", "tiny_hiera", "--auxiliary", "tiny_vit", "--stride", 8)
    assert stage("03_select", *flags, *choice).count("RANDOM weights") == 2
    said = stage("04_train", *flags, "--steps", 1, "--batch-size", 1)
    assert said.count("random weights") == 2
    assert "RANDOM WEIGHTS at the start" in stage("05_eval", *flags, "--limit", 1)


# ------------------------------------------------------------------ one encoder


def extract_toycity(stage, data, folder, *encoders):
    size = ("--limit", 2, "--size", "64x128")
    return stage("01_extract", "--data", data, "--run", folder, *size, "--encoders", *encoders)


def test_a_run_s_only_encoder_is_trained_from_run_json_alone(stage, few, tmp_path):
    folder = tmp_path / "run"
    said = extract_toycity(stage, few, folder, "tiny_vit")
    train_alone = f"python 04_train.py --run {folder} --fusion none"
    assert train_alone in said
    alone = ("--fusion", "none", "--steps", 2, "--batch-size", 2)
    for flags in (("--stride", 8), ("--auxiliary", "tiny_hiera")):
        with pytest.raises(UserError, match="--fusion none has no auxiliary"):
            stage("04_train", "--run", folder, *alone, *flags)
    assert not (folder / "checkpoint.pt").exists()

    said = stage("04_train", "--run", folder, *alone)
    assert re.search(r"^master +tiny_vit, finetuned$", said, re.M)
    assert not re.search(r"^auxiliary", said, re.M) and "tiny_hiera" not in said
    training = run.read_checkpoint(folder / "checkpoint.pt")["training"]
    assert (training["master"], training["fusion"]) == ("tiny_vit", "none")
    assert training["auxiliary"] is None and training["stride"] is None
    assert "nothing is left to train" in stage("04_train", "--run", folder, *alone)

    said = stage("05_eval", "--run", folder)
    assert "tiny_vit, alone, 2 steps" in said
    model = json.loads((folder / "results.json").read_text())["model"]
    assert (model["master"], model["auxiliary"], model["stride"]) == ("tiny_vit", None, None)
    assert not (folder / "metrics.json").exists() and not (folder / "selection.json").exists()

    # The encoder can be scored all the same, but stage 3 has nothing to choose.
    stage("02_metrics", "--run", folder)
    with pytest.raises(UserError, match="a pair needs two encoders") as error:
        stage("03_select", "--run", folder)
    assert f"`{train_alone}`" in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "selection.json").exists()


def test_of_two_encoders_one_is_trained_alone_when_it_is_named(stage, few, tmp_path):
    folder = tmp_path / "run"
    said = extract_toycity(stage, few, folder, "tiny_vit", "tiny_hiera")
    assert "--fusion none" not in said
    alone = ("--run", folder, "--fusion", "none", "--steps", 1, "--batch-size", 1)
    with pytest.raises(UserError, match="choose one of tiny_vit, tiny_hiera with --master"):
        stage("04_train", *alone)
    for flags in (("--stride", 8), ("--auxiliary", "tiny_vit")):
        with pytest.raises(UserError, match="--fusion none has no auxiliary"):
            stage("04_train", *alone, "--master", "tiny_hiera", *flags)
    with pytest.raises(UserError, match="selection.json is missing: run `python 03_select.py"):
        stage("04_train", "--run", folder, "--master", "tiny_hiera")
    assert not (folder / "checkpoint.pt").exists()
    said = stage("04_train", *alone, "--master", "tiny_hiera", "--master-mode", "frozen")
    assert re.search(r"^master +tiny_hiera, frozen$", said, re.M)
    assert "tiny_hiera, alone" in stage("05_eval", "--run", folder, "--limit", 1)

    # Beside a selection it is an ablation, in a folder of its own.
    stage("02_metrics", "--run", folder)
    stage("03_select", "--run", folder, "--stride", 8)
    with pytest.raises(UserError, match="--fusion none needs its own folder with --out"):
        stage("04_train", *alone, "--master", "tiny_hiera")
    other = tmp_path / "vit"
    stage("04_train", *alone, "--master", "tiny_vit", "--out", other)
    selection = json.loads((other / "selection.json").read_text())
    assert selection["master"] == "tiny_vit" and selection["chosen_by_hand"] == ["master"]
    assert selection["auxiliary"] is None and selection["stride"] is None
    assert "tiny_vit, alone" in stage("05_eval", "--run", other, "--limit", 1)


def test_a_folder_of_an_encoder_alone_is_not_trained_with_fusion(stage, few, tmp_path):
    folder, alone = tmp_path / "run", tmp_path / "alone"
    extract_toycity(stage, few, folder, "tiny_vit")
    steps = ("--steps", 1, "--batch-size", 1)
    stage("04_train", "--run", folder, "--out", alone, "--fusion", "none", *steps)
    for flags in ((), ("--out", tmp_path / "other"), ("--fusion", "add"), ("--stride", 8)):
        with pytest.raises(UserError, match="--fusion none|its own folder with --out"):
            stage("04_train", "--run", alone, *steps, *flags)
    # What is selected there is the encoder alone.
    said = stage("04_train", "--run", alone, "--fusion", "none", *steps)
    assert "nothing is left to train" in said


# ------------------------------------------------------------------ weights


def test_weights_are_chosen_one_by_one(extract, tmp_path):
    file = ROOT / "common/tiny_hiera.safetensors"
    extract("--encoders", "tiny_vit", "tiny_hiera", "--weights", f"tiny_hiera={file}", "none")
    weights = json.loads((tmp_path / "run/run.json").read_text())["weights"]
    assert weights == {"tiny_vit": "none", "tiny_hiera": str(file)}
    with pytest.raises(UserError, match="--weights sam2_b=x: expected"):
        extract("--encoders", "tiny_vit", "--weights", "sam2_b=x", folder="other")


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "name, first",
    [
        ("02_metrics", "01_extract.py"),
        ("03_select", "02_metrics.py"),
        ("04_train", "01_extract.py"),
        ("05_eval", "01_extract.py"),
    ],
)
def test_a_stage_before_its_predecessor_names_the_command(stage, tmp_path, name, first):
    with pytest.raises(UserError, match=f"run `python {first} --run {tmp_path}.*` first"):
        stage(name, "--run", tmp_path)


def test_training_and_evaluation_too_early_name_the_command(stage, extract, data, tmp_path):
    stage("01_extract", "--run", tmp_path / "toy", "--data", data, "--limit", 1, "--size", "32")
    with pytest.raises(UserError, match="selection.json is missing: run `python 03_select.py"):
        stage("04_train", "--run", tmp_path / "toy")
    with pytest.raises(UserError, match="checkpoint.pt is missing: run `python 04_train.py"):
        stage("05_eval", "--run", tmp_path / "toy")
    extract()
    with pytest.raises(UserError, match="images without labels, so nothing is trained on them"):
        stage("05_eval", "--run", tmp_path / "run")
    nowhere = tmp_path / "nowhere"
    missing = f"the run folder {nowhere} is missing: run `python 01_extract.py --run {nowhere} …`"
    with pytest.raises(UserError, match=missing):
        stage("02_metrics", "--run", nowhere)


def test_a_mistake_is_one_line_and_no_stack_trace(tmp_path):
    command = [sys.executable, "02_metrics.py", "--run", tmp_path]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


def test_unknown_names_are_answered_with_the_known_ones(stage, extract, tmp_path):
    with pytest.raises(
        UserError, match="unknown encoder 'dinov4': known are dinov3_s, .*tiny_hiera"
    ):
        extract("--encoders", "dinov4")
    known = "unknown benchmark 'toytown': known are toycity, cityscapes_semantic"
    with pytest.raises(UserError, match=known):
        stage("01_extract", "--benchmark", "toytown", "--run", tmp_path / "run")


def test_data_that_is_not_there_is_named(stage, tmp_path):
    flags = ("--benchmark", "cityscapes_instance", "--data", tmp_path, "--run", tmp_path / "run")
    with pytest.raises(UserError, match=f"{tmp_path}/cityscapes is needed and not there: .*--data"):
        stage("01_extract", *flags)


def test_folders_without_images_are_refused(extract, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        extract(images=tmp_path / "empty")
    with pytest.raises(UserError, match="there is no folder"):
        extract(images=tmp_path / "nowhere")


def test_weights_that_changed_since_stage_1_are_noticed(stage, data, tmp_path):
    file, folder = tmp_path / "mine.safetensors", tmp_path / "run"
    shutil.copy(ROOT / "common/tiny_vit.safetensors", file)
    extract = ["--data", data, "--run", folder, "--limit", 2, "--size", "64x128"]
    extract += ["--weights", f"tiny_vit={file}"]
    stage("01_extract", *extract)
    origin = json.loads((folder / "run.json").read_text())["weights_from"]
    assert origin["tiny_vit"].startswith(f"{file} sha256:")
    assert origin["tiny_hiera"].startswith("common/tiny_hiera.safetensors sha256:")
    stage("02_metrics", "--run", folder)
    stage("03_select", "--run", folder, "--stride", 8)
    save_file(load_encoder("tiny_vit", "none").model.state_dict(), file)
    with pytest.raises(UserError, match=r"made with other settings \(weights_from.tiny_vit\)"):
        stage("01_extract", *extract)
    measured = f"tiny_vit was measured with other weights .{file} sha256:.* than these .{file} sha"
    with pytest.raises(UserError, match=measured):
        stage("04_train", "--run", folder, "--steps", 2)


def test_other_settings_for_the_same_run_are_refused_by_name(extract, tmp_path):
    extract("--encoders", "tiny_vit")
    with pytest.raises(UserError, match=r"made with other settings \(encoders, weights"):
        extract("--encoders", "tiny_hiera")


def test_an_encoder_added_to_a_run_is_the_only_one_that_runs(stage, extract, tmp_path, monkeypatch):
    extract("--encoders", "tiny_vit")
    times = {path: path.stat().st_mtime_ns for path in feature_files(tmp_path)}
    with pytest.raises(UserError, match=r"made with other settings \(size\)"):
        extract("--encoders", "tiny_vit", "tiny_hiera", "--size", "96")
    with pytest.raises(UserError, match=r"other settings \(weights.tiny_vit, weights_from.ti"):
        extract("--encoders", "tiny_vit", "tiny_hiera", "--weights", "none")
    loaded = []
    load = importlib.import_module("01_extract").load_encoder

    def load_and_note(name, *options):
        loaded.append(name)
        return load(name, *options)

    monkeypatch.setattr("01_extract.load_encoder", load_and_note)
    extract("--encoders", "tiny_vit", "tiny_hiera")
    assert loaded == ["tiny_hiera"] and len(times) == 3 and len(feature_files(tmp_path)) == 6
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
    run_config = json.loads((tmp_path / "run/run.json").read_text())
    assert run_config["encoders"] == ["tiny_vit", "tiny_hiera"] and run_config["left_out"] == {}
    assert (
        set(run_config["weights"]) == set(run_config["weights_from"]) == {"tiny_vit", "tiny_hiera"}
    )
    stage("02_metrics", "--run", tmp_path / "run")


def test_a_pass_that_has_not_ended_is_refused_by_stage_2(stage, extract, tmp_path, monkeypatch):
    stage1 = importlib.import_module("01_extract")
    write = stage1.write_features
    count = []

    def interrupted(path, *content):
        count.append(path)
        if len(count) == 3:
            raise KeyboardInterrupt
        write(path, *content)

    monkeypatch.setattr(stage1, "write_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract()
    assert "left_out" not in json.loads((tmp_path / "run/run.json").read_text())
    with pytest.raises(UserError, match="has not ended: start 01_extract.py again with the flags"):
        stage("02_metrics", "--run", tmp_path / "run")
    extract()
    assert len(feature_files(tmp_path)) == 6
    stage("02_metrics", "--run", tmp_path / "run")


def test_sizes_that_make_no_sense_are_refused(extract):
    for size in ("big", "0", "512x"):
        with pytest.raises(UserError, match="--size"):
            extract("--size", size)


def test_a_full_disk_ends_in_one_line_and_the_next_run_goes_on(extract, tmp_path, monkeypatch):
    stage1 = importlib.import_module("01_extract")

    def full(arrays, metadata):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match="error: .*No space left on device"),
    ):
        patch.setattr(stage1, "save", full)
        run.start(extract)
    assert not list((tmp_path / "run").rglob("*.tmp")) and not feature_files(tmp_path)
    extract()
    assert len(feature_files(tmp_path)) == 6


def test_numbers_names_and_repeats_that_make_no_sense_are_refused(extract):
    for limit in ("0", "-1", "few"):
        with pytest.raises(SystemExit):
            extract("--limit", limit)
    with pytest.raises(UserError, match="--images and --benchmark are two sources"):
        extract("--benchmark", "toycity")
    with pytest.raises(UserError, match="twice"):
        extract("--encoders", "tiny_vit", "tiny_vit")


# ------------------------------------------------------------------ interruptions


def test_a_truncated_feature_file_is_named_and_made_again(stage, extract, tmp_path):
    extract()
    files = feature_files(tmp_path)
    whole = files[0].read_bytes()
    times = [path.stat().st_mtime_ns for path in files]
    files[0].write_bytes(whole[: len(whole) // 2])
    damaged = f"{files[0]} cannot be read .*: start 01_extract.py again with the flags it had"
    with pytest.raises(UserError, match=damaged):
        stage("02_metrics", "--run", tmp_path / "run")
    said = extract()  # what the message says helps
    assert f"extracting {files[0]} again: it is damaged" in said
    assert files[0].read_bytes() == whole
    # The others were left alone.
    assert [path.stat().st_mtime_ns for path in files[1:]] == times[1:]
    files[1].unlink()
    with pytest.raises(UserError, match=f"{files[1]} cannot be read .*: start 01_extract.py again"):
        stage("02_metrics", "--run", tmp_path / "run")


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), run.whole_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="signals differ on Windows")
def test_ctrl_c_in_stage_1_and_the_next_run_goes_on(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(200):
        noise = np.random.default_rng(i).integers(0, 255, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"{i:03d}.png")
    command = [sys.executable, "01_extract.py", "--images", photos, "--run", tmp_path / "run"]
    command += ["--encoders", "tiny_vit", "--size", "128"]
    # A background job of a script ignores SIGINT, and its children inherit that.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.time() + 120
    while not feature_files(tmp_path) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    done = feature_files(tmp_path)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    assert 0 < len(done) < 200 and not list((tmp_path / "run").rglob("*.tmp"))
    for path in done:
        load_file(path)
    times = {path: path.stat().st_mtime_ns for path in done}
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert len(feature_files(tmp_path)) == 200
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
