"""What all stages share: settings as flags, whole files, commands, tables and resamples."""

import argparse
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
    mode: str = flag("finetuned", choices=("finetuned", "frozen"))


@dataclass
class Recipe:
    crop: tuple[int, int] = flag((512, 1024), "pixels", nargs=2)
    milestones: tuple[int, ...] = flag((), "steps", nargs="*")
    steps: int = flag(10)


@pytest.fixture
def parse(monkeypatch):
    def call(*words, **options):
        monkeypatch.setattr(sys, "argv", ["stage.py", *words])
        return run.parse("What it does.", Settings, **options)

    return call


# ------------------------------------------------------------------ settings


def test_fields_are_flags_with_their_types(parse):
    assert parse() == Settings()
    words = "--run x/y --limit 3 --names c --save-it --mode frozen --rate 2"
    given = parse(*words.split())
    assert given == Settings(Path("x/y"), 3, 2.0, ("c",), True, "frozen")
    assert isinstance(given.rate, float)
    for words in ("--limit 0", "--mode no", "--rate fast", "--unknown", "--names"):
        with pytest.raises(SystemExit):
            parse(*words.split())


def test_only_what_was_given_overrides_a_recipe(parse):
    assert parse(overrides=Recipe) == (Settings(), {})
    words = "--crop 64 96 --milestones --steps 3"
    settings, changes = parse(*words.split(), overrides=Recipe)
    assert settings == Settings()
    assert changes == {"crop": (64, 96), "milestones": (), "steps": 3}
    with pytest.raises(SystemExit):
        parse("--crop", "64", overrides=Recipe)


def test_help_says_what_is_the_default(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help", overrides=Recipe)
    said = " ".join(capsys.readouterr().out.split())
    assert "What it does." in said and "run folder (default: runs/toycity)" in said
    assert "which (default: a b)" in said and "--crop CROP CROP pixels" in said


def test_whole_numbers_are_decimal_digits(parse, capsys):
    assert [run.natural("0"), run.natural("7"), run.positive("7")] == [0, 7, 7]
    assert run.natural(str(2**32 - 1)) == 2**32 - 1
    for text in ("-1", "1.5", "x", "", str(2**32)):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 0"):
            run.natural(text)
    for text in ("0", "-1", "1.5", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number above 0"):
            run.positive(text)


def test_what_differs_between_settings_is_named():
    run.refuse_other_settings(Path("x"), {"a": 1, "more": 2}, {"a": 1}, "stop")
    many = [f"{i}.png" for i in range(9)]
    nested = {"r": {"steps": 2, "crop": [64, 64], "deep": {"x": 1}}}
    for before, now, names in [
        ({"a": 1}, {"a": 2}, "a"),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, "a.c"),
        ({"a": {"b": 1}}, {"a": None}, "a"),
        ({"a": {"b": 1, "gone": 2}}, {"a": {"b": 1}}, "a.gone"),
        ({"images": many, "b": 1}, {"images": many[1:], "b": 2}, "images, b"),
        ({}, {"a": 1}, "a"),
        (nested, {"r": {"steps": 3, "crop": [64, 64], "deep": {"x": 2}}}, "r.steps, r.deep.x"),
        (nested, {"r": {"steps": 2, "crop": [64, 96], "deep": {"x": 1}}}, "r.crop"),
    ]:
        with pytest.raises(UserError) as error:
            run.refuse_other_settings(Path("x"), before, now, "stop")
        assert str(error.value) == f"x was made with other settings ({names}): stop"


# ------------------------------------------------------------------ files


def test_json_has_no_nan_and_a_broken_file_is_named(tmp_path):
    nan = float("nan")
    run.write_json(tmp_path / "a.json", {"x": nan, "y": [1.5, (nan,)]})
    assert run.read_stage(tmp_path, "a.json", "02_metrics.py") == {"x": None, "y": [1.5, [None]]}
    for file, stage in (("run.json", "01_extract.py"), ("a.json", "02_metrics.py")):
        (tmp_path / file).write_text("{")
        broken = f"{file} is not valid JSON .*delete it and run `python {stage} --run {tmp_path}"
        with pytest.raises(UserError, match=broken):
            run.read_stage(tmp_path, file, stage)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    gone = tmp_path / "gone"
    first = f"run `python 02_metrics.py --run {tmp_path}` first"
    with pytest.raises(UserError, match=f"a.json is missing: {first}"):
        run.read_stage(tmp_path, "a.json", "02_metrics.py")
    with pytest.raises(UserError, match=f"the run folder {gone} is missing: run `python 01_ext"):
        run.read_stage(gone, "run.json", "01_extract.py")


def test_commands_can_be_pasted_into_a_shell():
    toycity = Path("runs/toycity")
    assert run.command("04_train.py", toycity) == "python 04_train.py --run runs/toycity"
    assert run.command("04_train.py", Path("my run")) == "python 04_train.py --run 'my run'"


# ------------------------------------------------------------------ text


def test_long_lists_are_told_by_their_first_three():
    assert run.first_few(["a", "b", "c"]) == "a, b, c"
    assert run.first_few(range(5), "; ") == "0; 1; 2 and 2 more"


def test_tables_line_up_and_show_what_does_not_exist():
    assert [run.number(None), run.number(float("nan")), run.number(1.25, 2)] == ["-", "-", "1.25"]
    assert run.table([["a", "score"], ["long", "-"]]) == (
        "| a    | score |\n| ---- | ----- |\n| long | -     |\n"
    )


def test_evenly_spaced_items_begin_with_the_first():
    assert run.evenly_spaced("abcdef", 3) == ["a", "c", "e"]
    assert run.evenly_spaced("abc", 5) == ["a", "b", "c"]


# ------------------------------------------------------------------ resamples


def test_resamples_weigh_images_and_the_first_is_plain():
    weights = run.bootstrap_weights(5, seed=0)
    assert weights.shape == (1 + run.RESAMPLES, 5) and np.allclose(weights.sum(1), 1)
    assert (weights[0] == 0.2).all() and len(np.unique(weights[1:], axis=0)) > 100
    assert np.array_equal(weights, run.bootstrap_weights(5, seed=0))
    assert not np.array_equal(weights, run.bootstrap_weights(5, seed=1))
    assert weights[1:].std(0) == pytest.approx(np.sqrt(0.2 * 0.8 / 5), rel=0.1)
