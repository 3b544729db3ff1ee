"""Several processes: torchrun with two of them on a CPU, against one."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
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
    # One process with the batch in four: the same pictures, the same points, sums in another order
    train(tmp_path / "one", SMALL, accumulate=4)
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def test_a_loss_that_is_not_finite_in_one_process_ends_both(tmp_path):
    command = [*TORCHRUN, "tests/two_processes.py", str(tmp_path), "nan"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and not (tmp_path / "checkpoint.pt").exists()
    told = re.search(r"error: training stopped in step 1.* images \d, \d: the .* loss is nan", done.stderr)
    assert told, done.stderr[-3000:]


def test_a_signal_ends_both_after_one_step_and_one_goes_on(stage, data, tmp_path):
    two = tmp_path / "two"
    stage("01_extract", "--run", two, "--data", data, "--limit", 2, "--size", "64x128")
    stage("02_metrics", "--run", two)
    stage("03_select", "--run", two, "--stride", 8)
    said = torchrun("04_train.py", "--run", two, "--steps", 3, "--batch", 2)
    assert "3 steps of 2 images, in 2 part(s)" in said and said.count("next: ") == 1
    assert torch.load(two / "checkpoint.pt", weights_only=True)["step"] == 3

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
        torchrun("04_train.py", "--run", tmp_path)
    assert re.search(r"error: .*run\.json is missing: run `", str(told.value))
