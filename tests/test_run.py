"""What all stages share: settings as flags, whole files, resamples."""

import sys
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.run import UserError, flag, positive

import numpy as np
import pytest


@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder")
    limit: int | None = flag(None, "how many", type=positive)
    rate: float = flag(0.5)
    names: tuple[str, ...] = flag(("a", "b"), "which", nargs="+")
    save_it: bool = flag(False, "as well")
    mode: str = flag("ft", choices=("ft", "fz"))


@dataclass
class Recipe:
    crop: tuple[int, int] = flag((512, 1024), "pixels", nargs=2)
    drops: tuple[int, ...] = flag((), "steps", nargs="*")
    steps: int = flag(10)


@pytest.fixture
def parse(monkeypatch):
    def call(*words, **more):
        monkeypatch.setattr(sys, "argv", ["stage.py", *words])
        return run.parse("What it does.", Settings, **more)

    return call


def test_fields_are_flags_with_their_types(parse):
    assert parse() == Settings()
    given = parse("--run", "x/y", "--limit", "3", "--names", "c", "--save-it", "--mode", "fz", "--rate", "2")
    assert given == Settings(Path("x/y"), 3, 2.0, ("c",), True, "fz")
    for words in (["--limit", "0"], ["--mode", "no"], ["--rate", "fast"], ["--unknown"], ["--names"]):
        with pytest.raises(SystemExit):
            parse(*words)


def test_only_what_was_given_changes_a_recipe(parse):
    assert parse(changes=Recipe) == (Settings(), {})
    settings, changes = parse("--crop", "64", "96", "--drops", "--steps", "3", changes=Recipe)
    assert settings == Settings() and changes == {"crop": (64, 96), "drops": (), "steps": 3}
    with pytest.raises(SystemExit):
        parse("--crop", "64", changes=Recipe)


def test_help_says_what_is_the_default(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help", changes=Recipe)
    said = " ".join(capsys.readouterr().out.split())
    assert "What it does." in said and "run folder (default: runs/toycity)" in said
    assert "which (default: a b)" in said and "--crop CROP CROP pixels" in said


def test_what_differs_between_settings_is_named():
    run.refuse_other_settings(Path("x"), {"a": 1, "more": 2}, {"a": 1}, "stop")
    many = [f"{i}.png" for i in range(9)]
    for old, new, message in [
        ({"a": 1}, {"a": 2}, "x was made with other settings .a was 1, now 2.: stop"),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, 'a was {"c": 2}, now {"c": 3}'),
        ({"images": many}, {"images": many[1:]}, 'images was \\["0.png"\\], now \\[\\]'),
        ({"images": many}, {"images": [*many[:8], "x"]}, 'images was \\["8.png"\\], now \\["x"\\]'),
        ({}, {"a": 1}, "a was null, now 1"),
    ]:
        with pytest.raises(UserError, match=message):
            run.refuse_other_settings(Path("x"), old, new, "stop")


def test_resamples_weigh_images_and_the_first_is_plain():
    weights = run.bootstrap(5, seed=0)
    assert weights.shape == (1 + run.RESAMPLES, 5) and np.allclose(weights.sum(1), 1)
    assert (weights[0] == 0.2).all() and len(np.unique(weights[1:], axis=0)) > 100
    assert np.array_equal(weights, run.bootstrap(5, seed=0)) and not np.array_equal(weights, run.bootstrap(5, seed=1))
    assert weights[1:].std(0) == pytest.approx(np.sqrt(0.2 * 0.8 / 5), rel=0.1)


def test_json_has_no_nan_and_a_broken_file_is_named(tmp_path):
    run.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, (float("nan"),)]})
    assert run.read_stage(tmp_path, "a.json", "02_metrics.py") == {"x": None, "y": [1.5, [None]]}
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is not valid JSON .*delete it and run `python 01_extract.py --run"):
        run.read_stage(tmp_path, "run.json", "01_extract.py")
    with pytest.raises(UserError, match="a.json is not valid JSON .*delete it and run `python 02_metrics.py --run"):
        run.read_stage(tmp_path, "a.json", "02_metrics.py")
