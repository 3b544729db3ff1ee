"""Stage 3: the rule on scores with a known winner, ties and overrides, stability, and what it says when misused."""

import csv
import importlib
import json
import sys

from common import run

import numpy as np
import pytest
import torch

metrics = importlib.import_module("02_metrics")
selection = importlib.import_module("03_select")

ENCODERS = ["structure", "edges", "weak"]
SC = np.array([[0.7, 0.8, 0.7, 0.6], [0.4, 0.3, 0.9, 0.2], [0.3, 0.5, 0.3, 0.3]])  # [encoder, stride]
EF = np.array([[1, 2, 30, 1], [5, 20, 10, 4], [12, 6, 3, 2]], dtype=float)  # the master's own peak must not count
NOISE = {"SC": 0.1, "EF": 3}


def write_run(folder, sc=SC, ef=EF, spread=0.0, images=12, encoders=ENCODERS, noise=NOISE, random_weights=()):
    """A run folder as stage 2 leaves it; scores of single images scatter by `spread` of their mean."""
    draw = np.random.default_rng(0)
    sources = [*encoders, *metrics.CONTROLS]
    values = np.zeros((images, len(sources), 4, len(metrics.SCORES)))
    for s, source in enumerate(sources):
        for score in ("SC", "EF", "EF_RELEASED", "ER"):
            mean = (sc if score == "SC" else ef)[s] if source in encoders else noise["SC" if score == "SC" else "EF"]
            values[:, s, :, metrics.SCORES.index(score)] = mean * (1 + spread * draw.standard_normal((images, 4)))
    with open(folder / "metrics.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "source", "stride", *metrics.SCORES])
        for i, s, k in np.ndindex(values.shape[:3]):
            table.writerow([f"{i}.png", sources[s], metrics.STRIDES[k], *values[i, s, k]])
    summary = {
        "benchmark": "toycity",
        "encoders": encoders,
        "controls": list(metrics.CONTROLS),
        "strides": list(metrics.STRIDES),
    }
    summary |= {"images": images, "random_weights": list(random_weights)}
    run.write_json(folder / "metrics.json", summary | {"scores": metrics.summarise(values, sources, 0)})
    return folder


@pytest.fixture
def choose(monkeypatch):
    def stage(folder, *flags):
        monkeypatch.setattr(sys, "argv", ["03_select.py", "--run", str(folder), *flags])
        selection.main()
        chosen = json.loads((folder / "selection.json").read_text())
        return (chosen["master"], chosen["auxiliary"], chosen["stride"]), chosen

    return stage


def test_rule_and_its_mirror():
    assert selection.select(SC, EF)[0].tolist() == [0, 1, 1]
    # EF is highest in "structure", SC among the others in "edges", whose EF peaks at OS 8.
    assert selection.select(SC, EF, task="edges")[0].tolist() == [0, 1, 1]
    assert selection.select(SC, EF, task="edges", master=1)[0].tolist() == [1, 0, 2]  # s*: the auxiliary's EF
    assert selection.select(SC, EF, master=1)[0].tolist() == [1, 0, 2]
    assert selection.select(SC, EF, auxiliary=0)[0].tolist() == [1, 0, 2]  # the next best master steps in
    assert selection.select(SC, EF, auxiliary=2, stride=3)[0].tolist() == [0, 2, 3]


def test_rule_on_a_stack_equals_the_rule_on_each():
    draw = np.random.default_rng(0)
    sc, ef = draw.random((50, 3, 4)), draw.random((50, 3, 4))
    stacked, _ = selection.select(sc.copy(), ef.copy())
    assert len({tuple(column) for column in stacked.T}) > 5
    for i in range(50):
        assert stacked[:, i].tolist() == selection.select(sc[i], ef[i])[0].tolist()


def test_readout_counts_the_lead_over_the_master_at_one_stride(tmp_path, choose):
    write_run(tmp_path)
    assert choose(tmp_path)[0] == choose(tmp_path, "--score", "ef_released")[0] == ("structure", "edges", 8)
    # Peaks and leads differ, and a third encoder that is bad at OS 4 makes nobody's lead.
    er = np.array([[0.6, 0.5, 0.6, 0.8], [0.55, 0.6, 0.72, 0.85], [0.05, 0.6, 0.6, 0.6]])
    write_run(tmp_path, ef=er, noise={"SC": 0.1, "EF": 0.01})
    assert choose(tmp_path)[0] == ("structure", "edges", 32)
    triple, chosen = choose(tmp_path, "--score", "readout")
    assert triple == ("structure", "edges", 16)
    assert chosen["scores"]["edges"]["ER"] == pytest.approx({"4": 0.55, "8": 0.6, "16": 0.72, "32": 0.85})
    assert chosen["warnings"] == []
    # Roles turned round: the master reads edges best on average, and the other leads it at OS 4.
    triple, chosen = choose(tmp_path, "--score", "readout", "--task", "edges")
    assert triple == ("edges", "structure", 4)
    assert selection.select(SC, er, relative=True, master=1)[0].tolist() == [1, 0, 0]


def test_an_auxiliary_that_reads_edges_worse_than_the_master_is_warned_of(tmp_path, choose):
    er = np.array([[0.9] * 4, [0.1, 0.35, 0.2, 0.1], [0.05] * 4])
    write_run(tmp_path, ef=er, noise={"SC": 0.1, "EF": 0.01})
    triple, chosen = choose(tmp_path, "--score", "readout")
    assert triple == ("structure", "edges", 8)
    (warning,) = chosen["warnings"]
    assert warning.startswith("ER of edges at OS 8, 0.35, does not clear that of structure, 0.90: higher in 0.0%")


def test_readout_is_held_against_the_pixels_and_needs_enough_images(tmp_path, choose):
    write_run(tmp_path, noise={"SC": 0.1, "EF": 50})
    warnings = choose(tmp_path, "--score", "readout")[1]["warnings"]
    assert [w.split(":")[0] for w in warnings] == [
        f"ER of edges at OS 8, 20.00, does not clear that of the control {control}, 50.00"
        for control in ("noise", "image")
    ]
    rows = list(csv.reader((tmp_path / "metrics.csv").read_text().splitlines()))
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([rows[0], *([*row[:-1], "nan"] for row in rows[1:])])
    assert choose(tmp_path)[0] == ("structure", "edges", 8)
    with pytest.raises(run.UserError, match=r"has no ER: it needs more images"):
        choose(tmp_path, "--score", "readout")


def test_overrides_are_recorded_as_chosen_by_hand(tmp_path, choose):
    triple, chosen = choose(write_run(tmp_path), "--stride", "32", "--auxiliary", "weak")
    assert triple == ("structure", "weak", 32)
    assert chosen["chosen_by_hand"] == ["auxiliary", "stride"]
    assert choose(tmp_path)[1]["chosen_by_hand"] == []


def test_stability_is_one_for_clear_winners_and_less_for_scattered_ones(tmp_path, choose):
    clear = choose(write_run(tmp_path, spread=0.05))[1]["stability"]
    assert clear == {"pair": 1, "stride": 1, "all": 1, "resamples": 1000}
    shaky = choose(write_run(tmp_path, spread=1.5))[1]["stability"]
    assert 0.05 < shaky["all"] <= min(shaky["pair"], shaky["stride"])
    assert shaky["pair"] < 0.99
    assert choose(tmp_path)[1]["stability"] == shaky


def test_warnings(tmp_path, choose, capsys):
    assert choose(write_run(tmp_path, spread=0.05))[1]["warnings"] == []
    _, chosen = choose(
        write_run(tmp_path, spread=0.05, noise={"SC": 0.1, "EF": 19.9}, random_weights=["weak"], images=4)
    )
    for word, warning in zip(("control noise", "weak", "4 images"), chosen["warnings"], strict=True):
        assert word in warning
    assert chosen["random_weights"] == ["weak"]
    assert "WARNING: weak has RANDOM weights" in capsys.readouterr().out
    (warning,) = choose(write_run(tmp_path, noise={"SC": 0.1, "EF": 31}), "--task", "edges")[1]["warnings"]
    assert "EF of structure at OS 16, 30.00, does not clear" in warning
    two = choose(write_run(tmp_path, spread=0.05, noise={"SC": 0.72, "EF": 3}))[1]["warnings"]
    for control, warning in zip(("image", "shifted"), two, strict=True):
        assert f"SC of structure, mean over strides, 0.70, does not clear that of the control {control}, 0.7" in warning
    close = SC * [[1], [1.68], [1]]  # as drawn, means of 0.708 and 0.701
    unsure = choose(write_run(tmp_path, sc=close, spread=0.2))[1]["warnings"]
    assert any("of the resamples choose the same master: its lead, 0.0" in warning for warning in unsure)
    two = choose(write_run(tmp_path, sc=close, spread=0.2, encoders=ENCODERS[:2]))[1]["warnings"]
    assert any("the same master" in w for w in two) and not any("the same auxiliary" in w for w in two)  # no other
    write_run(tmp_path)
    torch.save({"settings": {"master": "structure", "auxiliary": "edges", "stride": 8}}, tmp_path / "checkpoint.pt")
    choose(tmp_path, "--stride", "32")
    assert f"next: python 04_train.py --run {tmp_path} --out {tmp_path}_os32" in capsys.readouterr().out
    assert choose(tmp_path)[1]["warnings"] == []  # back to what was trained
    assert capsys.readouterr().out.endswith(f"next: python 04_train.py --run {tmp_path}\n")


@pytest.mark.parametrize("part", ["master", "auxiliary", "stride"])
def test_ties_are_errors_until_settled_by_hand(part, tmp_path, choose):
    sc, ef = SC.copy(), EF.copy()
    if part == "master":
        sc[1] = sc[0]
    elif part == "auxiliary":
        ef[2, 0] = ef[1, 1]
    else:
        ef[1, 3] = ef[1, 1]
    write_run(tmp_path, sc, ef)
    with pytest.raises(run.UserError, match=f"tie for the {part}.*--{part}"):
        choose(tmp_path)
    assert not (tmp_path / "selection.json").exists()
    choose(tmp_path, f"--{part}", {"master": "structure", "auxiliary": "edges", "stride": "8"}[part])


def test_table_shows_controls_and_the_next_command_follows(tmp_path, choose, capsys):
    choose(write_run(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (edges,) = [row for row in rows if row[0] == "edges"]
    assert edges[1:] == ["0.450", "5.000", "20.000", "10.000", "4.000"]
    assert [row[0].split()[0] for row in rows if row[0].endswith("(control)")] == list(metrics.CONTROLS)
    assert lines[-1] == f"next: python 04_train.py --run {tmp_path}"
    assert (tmp_path / "metrics.png").stat().st_size > 10_000


def test_misuse_is_told_in_one_line(tmp_path, choose):
    with pytest.raises(run.UserError, match=r"run `python 02_metrics\.py --run .*` first"):
        choose(tmp_path)
    write_run(tmp_path)
    with pytest.raises(run.UserError, match="dino is not in .*: the encoders there are structure, edges, weak"):
        choose(tmp_path, "--master", "dino")
    with pytest.raises(run.UserError, match="both weak"):
        choose(tmp_path, "--master", "weak", "--auxiliary", "weak")
    table = (tmp_path / "metrics.csv").read_text().splitlines()
    (tmp_path / "metrics.csv").write_text("\n".join(table[:-1]))
    with pytest.raises(run.UserError, match=r"metrics\.csv cannot be used.*02_metrics\.py"):
        choose(tmp_path)
    write_run(tmp_path, SC[:1], EF[:1], encoders=["structure"])
    with pytest.raises(run.UserError, match="a pair needs two encoders"):
        choose(tmp_path)
