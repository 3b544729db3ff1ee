"""Several processes: torchrun with two of them on a CPU, against one."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import losses, train
from two_processes import SMALL

ROOT = Path(__file__).parents[1]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(*words) -> str:
    """Two processes; fails if one of them does, or if they wait for each other for ever."""
    command = [*TORCHRUN, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_as_one(tmp_path):
    torchrun("tests/two_processes.py", tmp_path)
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers["parameters"]) == 2 and len(set(answers["parameters"])) == 1
    assert answers["gradients"] < 1e-6
    assert answers["models"] == 32
    first, second = answers["stopped"]
    assert first == "training stopped in step 1: another process says why"
    assert "cross_entropy loss is nan" in second and "nonfinite_1.pt" in second
    assert answers["kept"] == ["log.csv", "nonfinite_1.pt"]
    # One process with the batch in two parts: the same pictures, the same points, sums in another order
    train(tmp_path / "one", SMALL, accumulate=2)
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def test_stages_share_their_images(stage, data, tmp_path):
    """Features, training and scores from two processes, with the stages' own commands, against one."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ("--data", data, "--limit", 5, "--size", "128x256")
    stage("01_extract", "--run", one, *flags)
    said = torchrun("01_extract.py", "--run", two, *flags)
    assert said.count("5 pictures") == 1 and said.count("next: ") == 1
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(two) for path in two.rglob("*.safetensors")) and len(files) == 10
    for file in files:
        for stride, feature in load_file(one / file).items():
            torch.testing.assert_close(feature, load_file(two / file)[stride], rtol=2e-3, atol=2e-3)

    stage("02_metrics", "--run", two)
    stage("03_select", "--run", two, "--stride", 8)
    said = torchrun("04_train.py", "--run", two, "--steps", 3, "--batch", 2)
    assert "3 steps of 2 images, in 2 parts" in said and said.count("next: ") == 1
    assert torch.load(two / "checkpoint.pt", weights_only=True)["step"] == 3
    shutil.copytree(two, one, dirs_exist_ok=True)
    stage("05_eval", "--run", one, "--limit", 5, "--save-predictions")
    said = torchrun("05_eval.py", "--run", two, "--limit", 5, "--save-predictions")
    assert said.count("next: ") == 1
    results = [json.loads((folder / "results.json").read_text())["benchmarks"]["toycity"] for folder in (one, two)]
    for task in ("semantic", "instance", "panoptic"):
        per_class = [result[task].pop("per_class") for result in results]
        assert per_class[0] == pytest.approx(per_class[1], rel=1e-6, nan_ok=True), task
        assert results[0][task] == pytest.approx(results[1][task], rel=1e-6, nan_ok=True), task
    assert results[0]["semantic"]["mIoU"] > 0 and results[0]["images"] == 5
    names = [sorted(p.name for p in (folder / "submission").rglob("*.png")) for folder in (one, two)]
    assert names[0] == names[1] and len(names[0]) > 10
    entries = [json.loads((folder / "submission/toycity/panoptic.json").read_text()) for folder in (one, two)]
    assert entries[0] == entries[1]

    # A scheduler's SIGTERM ends both after one and the same step, with a checkpoint; one process then goes on.
    flags = ("--run", two, "--out", tmp_path / "ended", "--fusion", "none", "--batch", 2, "--steps", 30)
    process = subprocess.Popen(
        [*TORCHRUN, "04_train.py", *map(str, flags)], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    log, deadline = tmp_path / "ended/log.csv", time.monotonic() + 120
    try:
        while time.monotonic() < deadline and (not log.exists() or len(log.read_text().splitlines()) < 4):
            time.sleep(0.1)
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
    done = torch.load(tmp_path / "ended/checkpoint.pt", weights_only=True)["step"]
    assert 3 <= done < 30 and done == len(losses(tmp_path / "ended"))
    assert f"holds step {done} of 30: going on" in stage("04_train", *flags, "--accumulate", 2)
    assert len(losses(tmp_path / "ended")) == 30


def test_a_mistake_is_still_told(tmp_path):
    with pytest.raises(AssertionError) as told:
        torchrun("05_eval.py", "--run", tmp_path)
    assert re.search(r"error: .*run\.json is missing: run `", str(told.value))
