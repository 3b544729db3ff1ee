"""Stage 3: the rule on scores with a known winner, ties, fixed parts, stability and misuse."""

import csv
import importlib
import json
import sys

from common import run

import numpy as np
import pytest

metrics = importlib.import_module("02_metrics")
selection = importlib.import_module("03_select")

ENCODERS = ["structure", "edges", "weak"]
SC = np.array([[0.7, 0.8, 0.7, 0.6], [0.4, 0.3, 0.9, 0.2], [0.3, 0.5, 0.3, 0.3]])
# [encoders, strides]. The highest peak is the master's own, and it must not count.
EF = np.array([[1, 2, 30, 1], [5, 20, 10, 4], [12, 6, 3, 2]], dtype=float)
NOISE = {"SC": 0.1, "EF": 3}  # scores of all controls
TRIPLE = selection.Choice("structure", "edges", 8)


def write_run(
    folder,
    sc=SC,
    ef=EF,
    spread=0.0,
    images=12,
    encoders=ENCODERS,
    noise=NOISE,
    random_weights=(),
    degenerate=(),
):
    """Write a run folder as stage 2 leaves it.

    Scores of single images scatter by `spread`, relative to their mean. degenerate: encoders of
    which one map is degenerate at each stride.
    """
    draw = np.random.default_rng(0)
    sources = [*encoders, *metrics.CONTROLS]
    values = np.zeros((images, len(sources), 4, len(metrics.SCORES)))
    for s, source in enumerate(sources):
        for score in ("SC", "EF", "EF_RELEASED", "ER"):
            means, control = (sc, noise["SC"]) if score == "SC" else (ef, noise["EF"])
            mean = means[s] if source in encoders else control
            scatter = 1 + spread * draw.standard_normal((images, 4))
            values[:, s, :, metrics.SCORES.index(score)] = mean * scatter
    table = []  # for each image {(source, stride): {score: value}}
    for of_image in values:
        scores = {}
        for s, k in np.ndindex(of_image.shape[:2]):
            named = zip(metrics.SCORES, of_image[s, k].tolist(), strict=True)
            scores[sources[s], metrics.STRIDES[k]] = dict(named)
        table.append(scores)
    metrics.write_scores(folder / "metrics.csv", table, [f"{i}.png" for i in range(images)])
    summary = {
        "benchmark": "toycity",
        "encoders": encoders,
        "controls": list(metrics.CONTROLS),
        "strides": list(metrics.STRIDES),
        "images": images,
        "random_weights": list(random_weights),
        "degenerate": {},
        "scores": metrics.summarise(table, sources, 0),
    }
    for encoder in encoders:
        count = 1 if encoder in degenerate else 0
        summary["degenerate"][encoder] = {str(stride): count for stride in metrics.STRIDES}
    run.write_json(folder / "metrics.json", summary)
    return folder


@pytest.fixture
def choose(monkeypatch):
    """Run stage 3 on a folder: choose(folder, *flags) -> the three parts, and selection.json."""

    def stage(folder, *flags):
        monkeypatch.setattr(sys, "argv", ["03_select.py", "--run", str(folder), *flags])
        selection.main()
        chosen = json.loads((folder / "selection.json").read_text())
        parts = [chosen[part] for part in selection.Choice._fields]
        return selection.Choice(*parts), chosen

    return stage


def by_rule(sc=SC, edge=EF, relative=False, **fixed):
    """What select() makes of mean scores, with the indices that are fixed by name."""
    nothing = selection.Choice(None, None, None)
    return selection.select(sc, edge, nothing._replace(**fixed), relative)


# ------------------------------------------------------------------ the rule


def test_rule_on_one_table_of_means():
    assert by_rule()[0] == (0, 1, 1)
    assert by_rule(master=1)[0] == (1, 0, 2)
    assert by_rule(auxiliary=0)[0] == (1, 0, 2)  # the next best master steps in
    assert by_rule(auxiliary=2, stride=3)[0] == (0, 2, 3)
    assert by_rule(master=2, auxiliary=1, stride=0)[0] == (2, 1, 0)


def test_rule_leaves_the_means_as_they_are():
    sc, edge = SC.copy(), EF.copy()
    by_rule(sc, edge, auxiliary=0)
    by_rule(sc, edge, relative=True, auxiliary=0)
    assert (sc == SC).all() and (edge == EF).all()


def test_leads_are_over_the_second_best_and_infinite_without_one():
    leads = by_rule()[1]
    assert leads == pytest.approx((0.7 - 0.45, 20 - 12, 20 - 10))
    # What is fixed leads by infinity, and the others lead what is left of their rivals.
    assert by_rule(master=1)[1] == pytest.approx((np.inf, 30 - 12, 30 - 2))
    assert by_rule(auxiliary=0)[1] == pytest.approx((0.45 - 0.35, np.inf, 30 - 2))
    assert by_rule(stride=0)[1] == pytest.approx((0.7 - 0.45, 20 - 12, np.inf))
    # Of two encoders, the one that is no master has no rival.
    assert by_rule(SC[:2], EF[:2])[1] == pytest.approx((0.7 - 0.45, np.inf, 20 - 10))
    assert by_rule(SC[:2], EF[:2], auxiliary=0)[1] == pytest.approx((np.inf, np.inf, 30 - 2))


@pytest.mark.parametrize("relative", [False, True])
def test_leads_of_equal_scores_are_zero(relative):
    sc = SC.copy()
    sc[1] = sc[0]
    assert by_rule(sc, relative=relative)[1].master == 0
    # Relative to the master, "weak" gains 11, 4, -27, 1 and "edges" 4, 18, -20, 3.
    edge = EF.copy()
    edge[2, 0] = 19 if relative else 20
    leads = by_rule(SC, edge, relative)[1]
    assert leads.master > 0 and leads.auxiliary == 0 and leads.stride > 0
    edge = EF.copy()
    edge[1, 3] = 19 if relative else 20
    leads = by_rule(SC, edge, relative)[1]
    assert leads.master > 0 and leads.auxiliary > 0 and leads.stride == 0
    assert by_rule(SC, edge, relative, stride=3)[1].stride == np.inf
    flat = np.zeros_like(SC)
    assert by_rule(flat, flat, relative)[1] == (0, 0, 0)


def test_relative_counts_the_lead_over_the_master_at_one_stride():
    er = np.array([[0.6, 0.5, 0.6, 0.8], [0.55, 0.6, 0.72, 0.85], [0.05, 0.6, 0.6, 0.6]])
    assert by_rule(SC, er)[0] == (0, 1, 3)
    choice, leads = by_rule(SC, er, relative=True)
    assert choice == (0, 1, 2)  # leads of -0.05, 0.1, 0.12, 0.05, and of "weak" 0.1 at most
    assert leads == pytest.approx((0.7 - 0.45, 0.12 - 0.1, 0.12 - 0.1))
    assert by_rule(SC, er, relative=True, master=1)[0] == (1, 0, 0)
    assert by_rule(SC, er, relative=True, master=2)[0] == (2, 0, 0)
    assert by_rule(SC, er, relative=True, auxiliary=2)[0] == (0, 2, 1)
    assert by_rule(SC, er, relative=True, auxiliary=0)[0] == (1, 0, 0)
    assert by_rule(SC, er, relative=True, stride=3)[0] == (0, 1, 3)


def test_stability_counts_the_rule_on_each_resample():
    draw = np.random.default_rng(0)
    sc, edge = draw.random((50, 3, 4)), draw.random((50, 3, 4))
    nothing = selection.Choice(None, None, None)
    choices = [by_rule(sc[i], edge[i])[0] for i in range(50)]
    assert len(set(choices)) > 5
    choice = choices[0]
    stability = selection.measure_stability(sc, edge, choice, nothing, relative=False)
    rows = np.array(choices) == np.array(choice)  # [resamples, parts]
    shares = dict(zip(selection.Choice._fields, rows.mean(0), strict=True))
    shares["pair"] = rows[:, :2].all(1).mean()
    shares["all"] = rows.all(1).mean()
    assert stability == pytest.approx(shares)


# ------------------------------------------------------------------ the stage


def test_readout_counts_the_lead_over_the_master_at_one_stride(tmp_path, choose):
    write_run(tmp_path)
    assert choose(tmp_path)[0] == choose(tmp_path, "--score", "ef_released")[0] == TRIPLE
    # Peaks and leads differ, and a third encoder that is bad at OS 4 makes nobody's lead.
    er = np.array([[0.6, 0.5, 0.6, 0.8], [0.55, 0.6, 0.72, 0.85], [0.05, 0.6, 0.6, 0.6]])
    write_run(tmp_path, ef=er, noise={"SC": 0.1, "EF": 0.01})
    assert choose(tmp_path)[0] == ("structure", "edges", 32)
    triple, chosen = choose(tmp_path, "--score", "readout")
    assert triple == ("structure", "edges", 16)
    expected = {"4": 0.55, "8": 0.6, "16": 0.72, "32": 0.85}
    assert chosen["scores"]["edges"]["ER"] == pytest.approx(expected)
    assert chosen["score_column"] == "ER"
    assert chosen["warnings"] == []
    # With the roles swapped, the other encoder leads the master at OS 4.
    swapped = ("--master", "edges", "--auxiliary", "structure")
    triple, chosen = choose(tmp_path, "--score", "readout", *swapped)
    assert triple == ("edges", "structure", 4)


def test_an_auxiliary_that_reads_edges_worse_than_the_master_is_warned_of(tmp_path, choose):
    er = np.array([[0.9] * 4, [0.1, 0.35, 0.2, 0.1], [0.05] * 4])
    write_run(tmp_path, ef=er, noise={"SC": 0.1, "EF": 0.01})
    triple, chosen = choose(tmp_path, "--score", "readout")
    assert triple == ("structure", "edges", 8)
    (warning,) = chosen["warnings"]
    rival = "ER of edges at OS 8, 0.35, does not clear that of structure, 0.90"
    assert warning.startswith(f"{rival}: it is higher in only 0.0% of the resamples")


def test_readout_is_held_against_the_pixels_and_needs_enough_images(tmp_path, choose):
    write_run(tmp_path, noise={"SC": 0.1, "EF": 50})
    warnings = choose(tmp_path, "--score", "readout")[1]["warnings"]
    edges = "ER of edges at OS 8, 20.00, does not clear that of the control"
    expected = [f"{edges} {control}, 50.00" for control in ("noise", "image")]
    assert [warning.split(":")[0] for warning in warnings] == expected
    rows = list(csv.reader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert rows[0][-1] == "ER"
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([rows[0], *([*row[:-1], "nan"] for row in rows[1:])])
    assert choose(tmp_path)[0] == ("structure", "edges", 8)
    with pytest.raises(run.UserError, match=r"has no ER: it needs more images"):
        choose(tmp_path, "--score", "readout")


def test_parts_chosen_by_hand_are_recorded(tmp_path, choose, capsys):
    triple, chosen = choose(write_run(tmp_path), "--stride", "32", "--auxiliary", "weak")
    assert triple == ("structure", "weak", 32)
    assert chosen["chosen_by_hand"] == ["auxiliary", "stride"]
    said = capsys.readouterr().out
    assert said.count("chosen by hand") == 2 and "(auxiliary, stride held fixed)" in said
    assert choose(tmp_path)[1]["chosen_by_hand"] == []


def test_stability_is_one_for_clear_winners_and_less_for_scattered_ones(tmp_path, choose):
    clear = choose(write_run(tmp_path, spread=0.05))[1]["stability"]
    assert clear == {"master": 1, "auxiliary": 1, "stride": 1, "pair": 1, "all": 1}
    shaky = choose(write_run(tmp_path, spread=1.5))[1]["stability"]
    assert 0.05 < shaky["all"] <= min(shaky["pair"], shaky["stride"])
    assert shaky["pair"] <= min(shaky["master"], shaky["auxiliary"])
    assert shaky["pair"] < 0.99
    assert choose(tmp_path)[1]["stability"] == shaky


def test_warnings_of_controls_and_of_the_data(tmp_path, choose, capsys):
    assert choose(write_run(tmp_path, spread=0.05))[1]["warnings"] == []
    write_run(
        tmp_path,
        spread=0.05,
        noise={"SC": 0.1, "EF": 19.9},
        random_weights=["weak"],
        images=4,
        degenerate=["edges"],
    )
    _, chosen = choose(tmp_path)
    everywhere = "edges: 1 at OS 4, 1 at OS 8, 1 at OS 16, 1 at OS 32 of 4 maps"
    words = ("control noise", everywhere, "weak", "4 images")
    for word, warning in zip(words, chosen["warnings"], strict=True):
        assert word in warning
    assert chosen["random_weights"] == ["weak"]
    assert "WARNING: weak has RANDOM weights" in capsys.readouterr().out
    # The auxiliary is held against the controls at the stride that is chosen.
    write_run(tmp_path, noise={"SC": 0.1, "EF": 31})
    swapped = ("--master", "edges", "--auxiliary", "structure")
    (warning,) = choose(tmp_path, *swapped)[1]["warnings"]
    assert "EF of structure at OS 16, 30.00, does not clear" in warning
    write_run(tmp_path, spread=0.05, noise={"SC": 0.72, "EF": 3})
    two = choose(tmp_path)[1]["warnings"]
    structure = "SC of structure, mean over strides, 0.70, does not clear that of the control"
    for control, warning in zip(("image", "shifted"), two, strict=True):
        assert f"{structure} {control}, 0.7" in warning


def test_a_choice_that_resamples_do_not_share_is_warned_of(tmp_path, choose):
    close = SC * [[1], [1.68], [1]]  # as drawn, means of 0.708 and 0.701
    unsure = choose(write_run(tmp_path, sc=close, spread=0.2))[1]["warnings"]
    same_master = "of the resamples choose the same master: its lead, 0.0"
    assert any(same_master in warning for warning in unsure)
    two = choose(write_run(tmp_path, sc=close, spread=0.2, encoders=ENCODERS[:2]))[1]["warnings"]
    assert any("the same master" in warning for warning in two)
    assert not any("the same auxiliary" in warning for warning in two)  # there is no other


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
    settled = str(getattr(TRIPLE, part))
    assert choose(tmp_path, f"--{part}", settled)[0] == TRIPLE


def test_table_shows_controls_and_the_next_command_follows(tmp_path, choose, capsys):
    choose(write_run(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    (edges,) = [row for row in rows if row[0] == "edges"]
    assert edges[1:] == ["0.450", "5.000", "20.000", "10.000", "4.000"]
    controls = [row[0].split()[0] for row in rows if row[0].endswith("(control)")]
    assert controls == list(metrics.CONTROLS)
    assert lines[-1] == f"next: python 04_train.py --run {tmp_path}"
    assert (tmp_path / "metrics.png").stat().st_size > 10_000


def test_misuse_is_told_in_one_line(tmp_path, choose):
    with pytest.raises(run.UserError, match=r"run `python 02_metrics\.py --run .*` first"):
        choose(tmp_path)
    write_run(tmp_path)
    there = "dino is not in .*: there are structure, edges, weak"
    with pytest.raises(run.UserError, match=there):
        choose(tmp_path, "--master", "dino")
    with pytest.raises(run.UserError, match="both weak"):
        choose(tmp_path, "--master", "weak", "--auxiliary", "weak")
    table = (tmp_path / "metrics.csv").read_text().splitlines()
    (tmp_path / "metrics.csv").write_text("\n".join(table[:-1]))
    with pytest.raises(run.UserError, match=r"metrics\.csv cannot be used.*02_metrics\.py"):
        choose(tmp_path)


def test_one_encoder_is_no_pair_and_can_be_trained_alone(tmp_path, choose):
    write_run(tmp_path, SC[:1], EF[:1], encoders=["structure"])
    with pytest.raises(run.UserError, match="a pair needs two encoders") as error:
        choose(tmp_path)
    assert f"`python 04_train.py --run {tmp_path} --fusion none`" in str(error.value)
    assert "structure" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "selection.json").exists()
