"""Several processes: torchrun with two of them on a CPU, against one."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from common.run import UserError

import pytest
from test_train import build, logged_step, losses, record_losses, saved_step, train, training_for
from two_processes import SMALL

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1")


def run_two(*words) -> subprocess.CompletedProcess:
    """Run two processes. It fails if they wait for each other for ever."""
    command = [*TORCHRUN, "--", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def torchrun(*words) -> str:
    """What two processes print. It fails if one of them does."""
    ended = run_two(*words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


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

    # One process with the batch in four parts has the same images and the same points, and sums
    # in another order.
    model = build(training_for(SMALL))
    alone = record_losses(model)
    train(tmp_path, SMALL, model=model, accumulate=4)
    of_first, of_second = answers["losses"]
    assert len(alone) == 4 * SMALL.steps
    for step in range(SMALL.steps):
        both = of_first[2 * step : 2 * step + 2] + of_second[2 * step : 2 * step + 2]
        for one, other in zip(alone[4 * step : 4 * step + 4], both, strict=True):
            assert one == pytest.approx(other, rel=1e-3)

    # The log holds the first process's losses, each the mean of its two parts.
    log = losses(folder)
    assert len(log) == SMALL.steps
    for step, (number, loss, *terms) in enumerate(log):
        one, other = of_first[2 * step : 2 * step + 2]
        assert number == step + 1 and loss == pytest.approx(sum(terms))
        means = [(one[name] + other[name]) / 2 for name in one]
        assert terms == pytest.approx(means)


def test_a_loss_that_is_not_finite_in_one_process_ends_both(two):
    folder, ended = two
    assert ended.returncode != 0 and (folder / "nan").is_dir()
    assert not (folder / "nan/checkpoint.pt").exists()
    error = r"error: training stopped in step 1.* images \d, \d: the .* loss is nan"
    assert re.search(error, ended.stderr), ended.stderr[-3000:]


@pytest.mark.slow
def test_a_signal_ends_both_and_one_goes_on(stage, data, tmp_path):
    folder = tmp_path / "two"
    small = ("--batch-size", 2, "--crop", "64x96")
    stage("01_extract", "--run", folder, "--data", data, "--limit", 2, "--size", "64x128")
    stage("02_metrics", "--run", folder)
    stage("03_select", "--run", folder, "--stride", 8)
    printed = torchrun("04_train.py", "--run", folder, "--steps", 3, *small)
    assert "3 steps of 2 images, in 2 part(s)" in printed and printed.count("next: ") == 1
    assert saved_step(folder) == 3

    # A scheduler's SIGTERM ends both, with a checkpoint. One process then goes on.
    out = tmp_path / "ended"
    flags = ("--run", folder, "--out", out, "--fusion", "none", "--steps", 30, *small)
    flags += ("--save-every", 1)
    command = [*TORCHRUN, "--", "04_train.py", *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline and logged_step(out) < 3:
            time.sleep(0.1)
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
    step = saved_step(out)
    # One process may end a step before the other, which then cannot finish its own.
    assert 3 <= step < 30 and step <= logged_step(out) <= step + 1
    # Alone it needs the same parts.
    with pytest.raises(UserError, match=r"other settings \(parts\)"):
        stage("04_train", *flags)
    assert f"holds step {step} of 30: going on" in stage("04_train", *flags, "--accumulate", 2)
    assert [row[0] for row in losses(out)] == list(range(1, 31))


@pytest.mark.slow
def test_a_mistake_is_still_told(tmp_path):
    with pytest.raises(AssertionError) as told:
        torchrun("04_train.py", "--run", tmp_path)
    assert re.search(r"error: .*run\.json is missing: run `", str(told.value))
