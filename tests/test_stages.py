"""The five stages as a person runs them: in order, out of order, interrupted, and with the mistakes people make."""

import contextlib
import csv
import errno
import importlib
import json
import os
import re
import shlex
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
def pictures(tmp_path_factory):
    """Three pictures of different sizes, one in a sub-folder."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    for i, (name, size) in enumerate({"a.png": (96, 64), "b c.jpg": (64, 128), "sub/a.png": (100, 90)}.items()):
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
def extract(stage, pictures, tmp_path):
    def call(*words, folder="run", images=pictures):
        return stage("01_extract", "--images", images, "--run", tmp_path / folder, "--size", "64", *words)

    return call


def feature_files(folder):
    return sorted(Path(folder).rglob("*.safetensors"))


# ---------------------------------------------------------------------------------------------- in order


def test_the_main_job_on_a_small_toycity(stage, few, tmp_path):
    folder = tmp_path / "run"
    said = stage("01_extract", "--data", few, "--run", folder, "--limit", 4)
    assert "4 pictures" in said and f"next: python 02_metrics.py --run {folder}" in said
    said = stage("02_metrics", "--run", folder)
    assert "shifted" in said and f"next: python 03_select.py --run {folder}" in said and "edges.png" in said
    said = stage("03_select", "--run", folder, "--stride", 8)
    assert f"next: python 04_train.py --run {folder}" in said
    said = stage("04_train", "--run", folder, "--steps", 0, "--accumulate", 2, "--out", tmp_path / "plan")
    assert "16 images of" in said and "900 steps of 2 images, in 2 part(s): 112.5 epochs" in said
    assert "M learn" in said and "next: " not in said and not (tmp_path / "plan").exists()
    said = stage("04_train", "--run", folder, "--steps", 4, "--batch", 2)
    assert f"next: python 05_eval.py --run {folder}" in said and "M are frozen" in said
    stage("05_eval", "--run", folder, "--limit", 1)
    assert not (folder / "results.json").exists() and (folder / "results_limit1.json").is_file()
    said = stage("05_eval", "--run", folder)
    assert all(name in said for name in ("mIoU", "AP50", "PQ_th", "truck"))
    for file in ("run.json", "metrics.csv", "metrics.json", "selection.json", "log.csv", "results.json", "results.md"):
        assert (folder / file).stat().st_size > 100, file
    for file in ("features.png", "metrics.png", "edges.png", "loss.png", "predictions.png"):
        assert Image.open(folder / file).size[0] > 500, file
    results = json.loads((folder / "results.json").read_text())
    assert list(results["benchmarks"]) == ["toycity"] and results["benchmarks"]["toycity"]["images"] == 2
    assert results["benchmarks"]["toycity"]["scores"]["PQ"] == results["benchmarks"]["toycity"]["panoptic"]["PQ"]
    assert not list(folder.rglob("*.tmp"))

    # The same command again finds nothing to do, or says the same.
    before = (folder / "results.json").read_bytes()
    stage("04_train", "--run", folder, "--steps", 4, "--batch", 2)
    stage("05_eval", "--run", folder)
    stage("05_eval", "--run", folder, "--limit", 1)
    assert (folder / "results.json").read_bytes() == before

    # An ablation goes to a folder of its own; other settings in the same folder are refused.
    alone = tmp_path / "alone"
    stage("04_train", "--run", folder, "--out", alone, "--fusion", "none", "--steps", 2, "--batch", 2)
    assert json.loads((alone / "selection.json").read_text())["chosen_by_hand"] == ["stride"]
    stage("05_eval", "--run", alone)
    with pytest.raises(UserError, match='fusion was "none", now "replace"'):
        stage("04_train", "--run", folder, "--out", alone, "--steps", 2, "--batch", 2)
    assert json.loads((alone / "selection.json").read_text())["stride"] == 8
    for flags in (("--stride", 16), ("--fusion", "add"), ("--out", folder / ".", "--aux-mode", "ft")):
        with pytest.raises(UserError, match="its own folder with --out"):
            stage("04_train", "--run", folder, *flags)

    # Both in one table
    said = stage("05_eval", "--compare", folder, alone, tmp_path)
    assert "left out" in said and re.search(r"run +\| toycity +\| tiny_hiera \| tiny_vit", said)

    # And the trained model looks at other pictures.
    (tmp_path / "other").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "other")  # no picture: is passed over
    Image.fromarray(toycity.scene("val", 99)[0]).save(tmp_path / "other/street.png")
    stage("05_eval", "--run", alone, "--images", tmp_path / "other")
    assert [path.name for path in (alone / "predictions").iterdir()] == ["street.png.png"]


def test_pictures_of_any_size_without_labels(stage, extract, pictures, tmp_path):
    said = extract("--encoders", "tiny_vit", "tiny_hiera")
    assert "3 pictures" in said
    names = json.loads((tmp_path / "run/run.json").read_text())["images"]
    assert names == ["a.png", "b c.jpg", "sub/a.png"]
    assert (tmp_path / "run/features/tiny_vit/sub/a.png.safetensors").is_file()
    maps = run.read_features(tmp_path / "run", "tiny_hiera", "a.png", run.fingerprint(pictures / "a.png"))
    assert {s: tuple(m.shape) for s, m in maps.items()} == {
        4: (24, 16, 24),
        8: (48, 8, 12),
        16: (96, 4, 6),
        32: (192, 2, 3),
    }
    stage("02_metrics", "--run", tmp_path / "run")
    with open(tmp_path / "run/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (2 + 3) * 4
    said = stage("03_select", "--run", tmp_path / "run", "--stride", 4)
    assert "04_train.py needs labels" in said and "stride held fixed" in said
    with pytest.raises(UserError, match="without labels"):
        stage("04_train", "--run", tmp_path / "run")


def test_random_weights_are_said_loudly_by_every_stage(stage, few, tmp_path):
    flags = ("--run", tmp_path / "run")
    said = stage("01_extract", *flags, "--data", few, "--limit", 2, "--size", "64x128", "--weights", "none")
    assert "RANDOM WEIGHTS" in said
    assert stage("02_metrics", *flags).count("RANDOM weights") == 2
    choice = ("--master", "tiny_hiera", "--auxiliary", "tiny_vit", "--stride", 8)
    assert stage("03_select", *flags, *choice).count("RANDOM weights") == 2
    assert stage("04_train", *flags, "--steps", 1, "--batch", 1).count("random weights") == 2
    assert "RANDOM WEIGHTS at the start" in stage("05_eval", *flags, "--limit", 1)


def test_weights_are_chosen_one_by_one(extract, tmp_path):
    file = ROOT / "common/tiny_hiera.safetensors"
    extract("--encoders", "tiny_vit", "tiny_hiera", "--weights", f"tiny_hiera={file}", "none")
    weights = json.loads((tmp_path / "run/run.json").read_text())["weights"]
    assert weights == {"tiny_vit": "none", "tiny_hiera": str(file)}
    with pytest.raises(UserError, match="--weights sam2_b=x: expected"):
        extract("--encoders", "tiny_vit", "--weights", "sam2_b=x", folder="other")


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "name, first", [("02_metrics", "01_extract.py"), ("03_select", "02_metrics.py"), ("04_train", "01_extract.py")]
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
    with pytest.raises(UserError, match="pictures without labels, nothing is trained on them"):
        stage("05_eval", "--run", tmp_path / "run")
    with pytest.raises(UserError, match="the run folder .*nowhere is missing: .*--images"):
        stage("02_metrics", "--run", tmp_path / "nowhere")


def test_a_mistake_is_one_line_and_no_stack_trace(tmp_path):
    ended = subprocess.run(
        [sys.executable, "02_metrics.py", "--run", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


def test_unknown_names_are_answered_with_the_known_ones(stage, extract, tmp_path):
    with pytest.raises(UserError, match="unknown encoder 'dinov4'; known are dinov3_s, .*tiny_hiera"):
        extract("--encoders", "dinov4")
    with pytest.raises(UserError, match="unknown benchmark 'toytown'; known are toycity, cityscapes_semantic"):
        stage("01_extract", "--benchmark", "toytown", "--run", tmp_path / "run")


def test_data_that_is_not_there_is_named(stage, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/cityscapes is needed and not there: .*--data"):
        stage("01_extract", "--benchmark", "cityscapes_instance", "--data", tmp_path, "--run", tmp_path / "run")


def test_folders_without_pictures_are_refused(extract, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no pictures"):
        extract(images=tmp_path / "empty")
    with pytest.raises(UserError, match="there is no folder"):
        extract(images=tmp_path / "nowhere")


def test_weights_that_changed_since_stage_1_are_noticed(stage, data, tmp_path):
    file, folder = tmp_path / "mine.safetensors", tmp_path / "run"
    shutil.copy(ROOT / "common/tiny_vit.safetensors", file)
    extract = ["--data", data, "--run", folder, "--limit", 2, "--size", "64x128", "--weights", f"tiny_vit={file}"]
    stage("01_extract", *extract)
    origin = json.loads((folder / "run.json").read_text())["weights_from"]
    assert origin["tiny_vit"].startswith(f"{file} sha256:")
    assert origin["tiny_hiera"].startswith("common/tiny_hiera.safetensors sha256:")
    stage("02_metrics", "--run", folder)
    stage("03_select", "--run", folder, "--stride", 8)
    save_file(load_encoder("tiny_vit", "none").model.state_dict(), file)
    with pytest.raises(UserError, match=r"weights_from was .\"tiny_vit\": [^,]*mine.safetensors"):
        stage("01_extract", *extract)
    with pytest.raises(UserError, match="tiny_vit was measured with other weights"):
        stage("04_train", "--run", folder, "--steps", 2)


def test_other_settings_for_the_same_run_are_refused_by_name(extract, tmp_path):
    extract("--encoders", "tiny_vit")
    with pytest.raises(UserError, match=r'encoders was \["tiny_vit"\], now \["tiny_hiera"\]'):
        extract("--encoders", "tiny_hiera")


def test_an_encoder_added_to_a_run_is_the_only_one_that_runs(stage, extract, tmp_path, monkeypatch):
    extract("--encoders", "tiny_vit")
    times = {path: path.stat().st_mtime_ns for path in feature_files(tmp_path)}
    with pytest.raises(UserError, match='size was "64", now "96"'):
        extract("--encoders", "tiny_vit", "tiny_hiera", "--size", "96")
    with pytest.raises(UserError, match="weights was"):
        extract("--encoders", "tiny_vit", "tiny_hiera", "--weights", "none")
    loaded, load = [], importlib.import_module("01_extract").load_encoder
    monkeypatch.setattr("01_extract.load_encoder", lambda name, *rest: loaded.append(name) or load(name, *rest))
    extract("--encoders", "tiny_vit", "tiny_hiera")
    assert loaded == ["tiny_hiera"] and len(times) == 3 and len(feature_files(tmp_path)) == 6
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
    asked = json.loads((tmp_path / "run/run.json").read_text())
    assert asked["encoders"] == ["tiny_vit", "tiny_hiera"] and asked["left_out"] == {}
    assert "--encoders tiny_vit tiny_hiera" in asked["command"]
    stage("02_metrics", "--run", tmp_path / "run")


def test_a_pass_that_has_not_ended_is_refused_by_stage_2(stage, extract, tmp_path, monkeypatch):
    stage1 = importlib.import_module("01_extract")
    write, count = stage1.write, []

    def interrupted(path, *content):
        count.append(path)
        if len(count) == 3:
            raise KeyboardInterrupt
        write(path, *content)

    monkeypatch.setattr(stage1, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract()
    assert "left_out" not in json.loads((tmp_path / "run/run.json").read_text())
    with pytest.raises(UserError, match="has not ended.*run `python 01_extract.py --images .*` again"):
        stage("02_metrics", "--run", tmp_path / "run")
    extract()
    assert len(feature_files(tmp_path)) == 6
    stage("02_metrics", "--run", tmp_path / "run")


def test_sizes_that_make_no_sense_are_refused(extract):
    for size in ("big", "0", "512x"):
        with pytest.raises(UserError, match="--size"):
            extract("--size", size)


def test_a_full_disk_is_noticed_before_extraction(extract, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10_000))
    with pytest.raises(UserError, match="0.00 GB free, .* GB are needed"):
        extract()
    assert not feature_files(tmp_path)


def test_the_estimate_of_disk_space_is_what_is_written(extract, tmp_path, monkeypatch):
    extract("--size", "256x512", folder="all")
    written = sum(path.stat().st_size for path in feature_files(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    for share, folder in ((0.98, "less"), (1.0, "enough")):  # headers take the rest
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=int(share * written): usage._replace(free=free))
        with pytest.raises(UserError, match="GB are needed") if share < 1 else contextlib.nullcontext():
            extract("--size", "256x512", folder=folder)


def test_a_full_disk_ends_in_one_line_and_the_next_run_goes_on(extract, tmp_path, monkeypatch):
    stage1 = importlib.import_module("01_extract")

    def full(arrays, metadata):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="error: .*No space left on device"):
        patch.setattr(stage1, "save", full)
        run.start(extract)
    assert not list((tmp_path / "run").rglob("*.tmp")) and not feature_files(tmp_path)
    extract()
    assert len(feature_files(tmp_path)) == 6


def test_numbers_names_and_repeats_that_make_no_sense_are_refused(extract, pictures, tmp_path):
    for limit in ("0", "-1", "few"):
        with pytest.raises(SystemExit):
            extract("--limit", limit)
    with pytest.raises(UserError, match="--images and --benchmark are two sources"):
        extract("--benchmark", "toycity")
    with pytest.raises(UserError, match="twice"):
        extract("--encoders", "tiny_vit", "tiny_vit")


# ---------------------------------------------------------------------------------------------- interruptions


def test_a_feature_file_cut_short_is_named_and_made_again(stage, extract, tmp_path):
    extract()
    files = feature_files(tmp_path)
    whole, times = files[0].read_bytes(), [path.stat().st_mtime_ns for path in files]
    files[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{files[0].name} is damaged") as error:
        stage("02_metrics", "--run", tmp_path / "run")
    words = shlex.split(re.search("`(.*)`", str(error.value))[1])  # the command that it names is the one that helps
    assert words[:2] == ["python", "01_extract.py"]
    said = stage("01_extract", *words[2:])
    assert f"{files[0]} is damaged" in said
    assert files[0].read_bytes() == whole
    assert [path.stat().st_mtime_ns for path in files[1:]] == times[1:]  # the others were left alone


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), run.whole_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="signals differ on Windows")
def test_ctrl_c_in_stage_1_and_the_next_run_goes_on(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(200):
        noise = np.random.default_rng(i).integers(0, 255, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{i:03d}.png")
    command = [sys.executable, "01_extract.py", "--images", pictures, "--run", tmp_path / "run"]
    command += ["--encoders", "tiny_vit", "--size", "128"]
    # A background job of a script ignores SIGINT, and its children inherit that.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
