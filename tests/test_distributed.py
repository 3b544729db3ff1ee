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


def run_two(*words) -> subprocess.CompletedProcess:
    """Two processes; fails if they wait for each other for ever."""
    command = [*TORCHRUN, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def torchrun(*words) -> str:
    """Two processes; fails if one of them does."""
    done = run_two(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """two_processes.py once: the folder with its answers, and how it ended."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_two("tests/two_processes.py", folder)


def test_two_processes_train_as_one(two, tmp_path):
    folder, ended = two
    assert (folder / "answers.json").is_file(), ended.stderr[-3000:]
    answers = json.loads((folder / "answers.json").read_text())
    assert len(answers["parameters"]) == 2 and len(set(answers["parameters"])) == 1
    assert answers["gradients"] < 1e-6
    assert answers["models"] == 32
    # One process with the batch in four: the same pictures, the same points, sums in another order
    train(tmp_path, SMALL, accumulate=4)
    for one, both in zip(losses(tmp_path), losses(folder), strict=True):
        assert one == pytest.approx(both, rel=1e-3)


def test_a_loss_that_is_not_finite_in_one_process_ends_both(two):
    folder, ended = two
    assert ended.returncode != 0 and (folder / "nan").is_dir() and not (folder / "nan/checkpoint.pt").exists()
    told = re.search(r"error: training stopped in step 1.* images \d, \d: the .* loss is nan", ended.stderr)
    assert told, ended.stderr[-3000:]


@pytest.mark.slow
def test_a_signal_ends_both_after_one_step_and_one_goes_on(stage, data, tmp_path):
    two, small = tmp_path / "two", ("--batch", 2, "--crop", "64x96")
    stage("01_extract", "--run", two, "--data", data, "--limit", 2, "--size", "64x128")
    stage("02_metrics", "--run", two)
    stage("03_select", "--run", two, "--stride", 8)
    said = torchrun("04_train.py", "--run", two, "--steps", 3, *small)
    assert "3 steps of 2 images, in 2 part(s)" in said and said.count("next: ") == 1
    assert torch.load(two / "checkpoint.pt", weights_only=True)["step"] == 3

    # A scheduler's SIGTERM ends both after one and the same step, with a checkpoint; one process then goes on.
    flags = ("--run", two, "--out", tmp_path / "ended", "--fusion", "none", "--steps", 30, *small)
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


@pytest.mark.slow
def test_a_mistake_is_still_told(tmp_path):
    with pytest.raises(AssertionError) as told:
        torchrun("04_train.py", "--run", tmp_path)
    assert re.search(r"error: .*run\.json is missing: run `", str(told.value))
