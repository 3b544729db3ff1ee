"""The study of fusion: ways that are really trained, and its sums on a table made for that."""

import json

from common import run
from common.datasets import open_split
from common.encoders import STRIDES

import numpy as np
import pytest
import study

SELECTION = {"master": "m", "auxiliary": "a", "stride": 8}
GAINS = {
    "alone": 0,
    "auxiliary": -4,
    "os4": 1,
    "os8": 3,
    "os16": 2,
    "os32": -1,
    "turned": -2,
    "tuned": 4,
}


def make_table(gains, seeds=3):
    """A table in which each way gains so much over the master alone, and a tenth of noise."""
    random = np.random.default_rng(0)
    table = {}
    for seed in range(seeds):
        # What the ways of a seed share falls out of the difference.
        base = 50 + 3 * random.standard_normal()
        for way, gain in gains.items():
            noise = 0.1 * random.standard_normal()
            table[way, seed] = {"mIoU": base + gain + noise, "AP": 10 + gain}
    return table


def test_differences_are_taken_seed_by_seed():
    table = make_table(GAINS)
    gain = study.difference(table, "os8", "alone", "mIoU")
    each = [table["os8", s]["mIoU"] - table["alone", s]["mIoU"] for s in range(3)]
    assert gain.seeds == [0, 1, 2]
    assert gain.mean == pytest.approx(np.mean(each))
    # Student's t has two degrees of freedom here.
    expected = 4.3027 * np.std(each, ddof=1) / 3**0.5
    assert gain.interval == pytest.approx(expected, rel=1e-4)
    assert gain.interval < 1 < np.std([table["os8", s]["mIoU"] for s in range(3)])
    del table["alone", 1]
    assert study.difference(table, "os8", "alone", "mIoU").seeds == [0, 2]
    del table["alone", 2]
    single = study.difference(table, "os8", "alone", "mIoU")
    assert single.mean == pytest.approx(each[0]) and np.isnan(single.interval)
    assert np.isnan(study.difference(table, "os8", "nowhere", "mIoU").mean)


def test_a_peak_is_held_against_the_best_stride():
    profiles = {"m": [0.1, 0.1, 0.7, 0.1], "a": [0.2, 0.4, 0.8, 0.1]}
    scores = {}
    for source, profile in profiles.items():
        scores[source] = {}
        for stride, er in zip(STRIDES, profile, strict=True):
            scores[source][str(stride)] = {
                "EF": {"mean": stride},
                "EF_RELEASED": {"mean": -stride},
                "ER": {"mean": er},
            }
    metrics = {"scores": scores}
    rows = {}
    for line in study.peaks(make_table(GAINS), metrics, SELECTION, "mIoU").splitlines():
        name, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        rows[name] = cells
    assert rows["mIoU gained"][4] == "OS 8"
    assert rows["EF"][4:] == ["OS 32", "-0.40"]  # 1, 3, 2, -1 and a rise
    assert rows["EF_RELEASED"][4:] == ["OS 4", "0.40"]
    assert rows["ER"][4] == "OS 16"
    assert rows["ER, lead over the master's"][:5] == ["0.10", "0.30", "0.10", "0.00", "OS 8"]

    scores["a"]["32"]["ER"]["mean"] = None
    assert "ER" not in study.peaks(make_table(GAINS), metrics, SELECTION, "mIoU").split()

    table = make_table(GAINS)
    for seed in range(3):
        del table["os32", seed]
    unfinished = "some strides are not trained yet\n"
    assert study.peaks(table, metrics, SELECTION, "mIoU") == unfinished


def test_ways_are_what_they_say():
    alone = ["--fusion", "none"]
    assert study.flags_of("alone", SELECTION) == alone
    assert study.flags_of("auxiliary", SELECTION) == [*alone, "--master", "a"]
    swapped = ["--master", "a", "--auxiliary", "m", "--stride", 8]
    assert study.flags_of("turned", SELECTION) == swapped
    assert study.flags_of("os16", SELECTION) == ["--stride", "16"]
    assert study.flags_of("tuned", SELECTION) == ["--stride", 8, "--aux-mode", "finetuned"]


@pytest.mark.slow
def test_study_trains_once_and_goes_on_where_it_stopped(tmp_path, data, stage, monkeypatch):
    """Three ways of the eight. In the end, all comes from what study.csv holds."""
    folder = tmp_path / "r"
    pair = ("--master", "tiny_hiera", "--auxiliary", "tiny_vit", "--stride", 8)
    stage("01_extract", "--run", folder, "--data", data, "--limit", 4, "--size", "64x128")
    stage("02_metrics", "--run", folder)
    stage("03_select", "--run", folder, *pair)
    monkeypatch.setattr(study, "WAYS", ("alone", "auxiliary", "os8"))
    words = ["study.py", "--run", str(folder), "--seeds", "0", "--"]
    words += ["--steps", "1", "--queries", "10"]
    out = tmp_path / "r_study"
    monkeypatch.setattr("sys.argv", words)
    study.main()
    table = study.read_table(out / "study.csv")
    assert set(table) == {("alone", 0), ("auxiliary", 0), ("os8", 0)}
    results = json.loads((out / "os8_0/results.json").read_text())
    assert results["model"]["stride"] == 8
    assert results["model"]["steps"] == 1
    assert table["os8", 0]["mIoU"] == pytest.approx(results["scores"]["mIoU"])
    assert table["os8", 0]["IoU of road"] == pytest.approx(results["per_class"]["mIoU"]["road"])
    model = json.loads((out / "auxiliary_0/results.json").read_text())["model"]
    assert (model["master"], model["auxiliary"], model["fusion"]) == ("tiny_vit", None, "none")
    assert (out / "study.png").stat().st_size > 10_000
    assert "fused at s* over alone: mIoU" in (out / "study.md").read_text()

    monkeypatch.setattr("sys.argv", [*words[:-1], "11"])
    with pytest.raises(run.UserError, match=r"other settings \(flags\): give another --out"):
        study.main()
    (out / "study.csv").unlink()  # The trainings' own results are still there.
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(study.subprocess, "run", lambda *_, **__: pytest.fail("trained again"))
    study.main()
    assert study.read_table(out / "study.csv") == table
    monkeypatch.undo()
    words = ["study.py", "--run", str(folder), "--out", str(tmp_path / "x"), "--report"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(run.UserError, match=r"study\.json|x is missing"):
        study.main()


def test_thin_classes_are_told_from_large_ones(data):
    samples = open_split("toycity", data, "val")
    thin = study.thin_share(samples)
    assert thin["pole"] > 0.4
    assert thin["road"] < 0.1
    kinds = study.kinds_of_classes(samples)
    assert set(kinds["things"]) == {"person", "car", "truck"}
    assert sorted(kinds["things"] + kinds["stuff"]) == sorted(thin)
    assert "pole" in kinds["thin"] and "road" in kinds["large"]
