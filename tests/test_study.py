"""The study of fusion: one way trained and evaluated for real, and its sums on a table made for the purpose."""

import importlib
import json

from common import run
from common.datasets import open_split

import numpy as np
import pytest
import study

stage3 = importlib.import_module("03_select")
STRIDES = (4, 8, 16, 32)
SELECTION = {"master": "m", "auxiliary": "a", "stride": 8}


def made(gains, seeds=3):
    """A table in which each way gains so much over the master alone, give or take a tenth of a point."""
    draw, table = np.random.default_rng(0), {}
    for seed in range(seeds):
        base = 50 + 3 * draw.standard_normal()  # what the seeds share falls out of the difference
        for way, gain in gains.items():
            table[way, seed] = {"mIoU": base + gain + 0.1 * draw.standard_normal(), "AP": 10 + gain}
    return table


GAINS = {"alone": 0, "auxiliary": -4, "os4": 1, "os8": 3, "os16": 2, "os32": -1, "turned": -2, "tuned": 4}


def test_differences_are_taken_seed_by_seed():
    table = made(GAINS)
    gain, half, seeds = study.difference(table, "os8", "alone", "mIoU")
    each = [table["os8", s]["mIoU"] - table["alone", s]["mIoU"] for s in range(3)]
    assert seeds == [0, 1, 2]
    assert gain == pytest.approx(np.mean(each))
    assert half == pytest.approx(4.3027 * np.std(each, ddof=1) / 3**0.5, rel=1e-4)  # Student's t, two degrees
    assert half < 1 < np.std([table["os8", s]["mIoU"] for s in range(3)])
    del table["alone", 1]
    assert study.difference(table, "os8", "alone", "mIoU")[2] == [0, 2]
    assert np.isnan(study.difference(table, "os8", "nowhere", "mIoU")[0])


def test_a_peak_is_held_against_the_best_stride():
    profiles = {"m": [0.1, 0.1, 0.7, 0.1], "a": [0.2, 0.4, 0.8, 0.1]}
    scores = {
        source: {
            str(s): {"EF": {"mean": s}, "EF_RELEASED": {"mean": -s}, "ER": {"mean": v}}
            for s, v in zip(STRIDES, er, strict=True)
        }
        for source, er in profiles.items()
    }
    rows = [
        line.split("|")[1:-1] for line in study.peaks(made(GAINS), {"scores": scores}, SELECTION, "mIoU").splitlines()
    ]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert rows["mIoU gained"][4] == "OS 8"
    assert rows["EF"][4:] == ["OS 32", "-0.40"]  # 1, 3, 2, -1 and a rise
    assert rows["EF_RELEASED"][4:] == ["OS 4", "0.40"]
    assert rows["ER"][4] == "OS 16"
    assert rows["ER, lead over the master's"][:5] == ["0.10", "0.30", "0.10", "0.00", "OS 8"]
    table = {key: scores for key, scores in made(GAINS).items() if key[0] != "os32"}
    assert study.peaks(table, {"scores": scores}, SELECTION, "mIoU") == "some strides are not trained yet\n"


def test_ways_are_what_they_say():
    assert study.flags_of("auxiliary", SELECTION) == ["--fusion", "none", "--master", "a", "--auxiliary", "m"]
    assert study.flags_of("turned", SELECTION) == ["--master", "a", "--auxiliary", "m", "--stride", 8]
    assert study.flags_of("os16", SELECTION) == ["--stride", "16"]
    assert study.flags_of("tuned", SELECTION) == ["--stride", 8, "--aux-mode", "ft"]


@pytest.mark.slow
def test_study_trains_once_and_goes_on_where_it_stopped(tmp_path, data, stage, monkeypatch):
    """With two ways of the eight; the last picture, tables and figure come from what study.csv holds."""
    folder = tmp_path / "r"
    stage("01_extract", "--run", folder, "--data", data, "--limit", 4, "--size", "64x128")
    stage("02_metrics", "--run", folder)
    stage("03_select", "--run", folder, "--master", "tiny_hiera", "--auxiliary", "tiny_vit", "--stride", 8)
    monkeypatch.setattr(study, "WAYS", ("alone", "os8"))
    words = ["study.py", "--run", str(folder), "--seeds", "0", "--", "--steps", "1", "--queries", "10"]
    monkeypatch.setattr("sys.argv", words)
    study.main()
    table = study.read_table(tmp_path / "r_study/study.csv")
    assert set(table) == {("alone", 0), ("os8", 0)}
    trained = json.loads((tmp_path / "r_study/os8_0/results.json").read_text())
    assert trained["model"]["stride"] == 8
    assert trained["model"]["steps"] == 1
    assert table["os8", 0]["mIoU"] == pytest.approx(trained["benchmarks"]["toycity"]["scores"]["mIoU"])
    assert (tmp_path / "r_study/study.png").stat().st_size > 10_000
    text = (tmp_path / "r_study/study.md").read_text()
    assert "fused at s* over alone: mIoU" in text

    monkeypatch.setattr("sys.argv", [*words[:-1], "11"])
    with pytest.raises(run.UserError, match=r"flags was .*\"10\".*now.*\"11\".*another --out"):
        study.main()
    (tmp_path / "r_study/study.csv").unlink()  # the trainings' own results answer
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(study.subprocess, "run", lambda *_, **__: pytest.fail("trained again"))
    study.main()
    assert study.read_table(tmp_path / "r_study/study.csv") == table
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["study.py", "--run", str(folder), "--out", str(tmp_path / "x"), "--report"])
    with pytest.raises(run.UserError, match=r"study\.json|x is missing"):
        study.main()


def test_thin_classes_are_told_from_large_ones(data):
    thin = study.thin_share(open_split("toycity", data, "val"))
    assert thin["pole"] > 0.4
    assert thin["road"] < 0.1
