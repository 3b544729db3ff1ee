"""Stage 3: choose the pair of encoders, and the output stride at which to fuse them.

    python 03_select.py                       the shipped example, runs/toycity
    python 03_select.py --run runs/mine       any run folder that 02_metrics.py has filled
    python 03_select.py --stride 8            choose a part by hand
    python 03_select.py --score readout       choose auxiliary and stride by the linear edge probe

The rule is the paper's (arXiv 2605.16864). The encoder with the highest Structural Coherence (SC),
averaged over the strides, becomes the master. Among the others, the one whose Edge Fidelity (EF)
peaks highest becomes the auxiliary. The stride of that peak, s*, is where the auxiliary's feature
map will replace the master's.

With --score readout the linear edge probe (ER) takes the place of EF. ER can be compared at one
stride only, so what counts is how far the auxiliary's ER exceeds the master's at that stride.

Reads metrics.json and metrics.csv. Writes selection.json and draws the choice into metrics.png.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import run
from common.figures import draw_profiles
from common.run import RESAMPLES, UserError, flag, natural, require

import numpy as np

CONTROL_CONFIDENCE = 0.975  # the share of resamples in which a winner must exceed its control
CHOICE_STABILITY = 0.9  # the share of resamples that must choose the same
FEW_IMAGES = 10  # resamples of fewer images say little about other images
SCORE_COLUMNS = {"ef": "EF", "ef_released": "EF_RELEASED", "readout": "ER"}
# White noise has a low SC, except at the coarsest stride, so it is no rival of an encoder in SC.
# The image and the shifted image are. In EF noise scores high, as it has most high frequencies.
# ER of the image is what a probe gets from raw pixels, and an encoder should add to that.
SC_CONTROLS = ("image", "shifted")
EDGE_CONTROLS = {"EF": ("noise",), "EF_RELEASED": ("noise",), "ER": ("noise", "image")}


@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder")
    score: str = flag("ef", "choose the auxiliary by this score", choices=tuple(SCORE_COLUMNS))
    master: str | None = flag(None, "take this encoder as master", metavar="ENCODER")
    auxiliary: str | None = flag(None, "take this encoder as auxiliary", metavar="ENCODER")
    stride: int | None = flag(None, "fuse at this stride", choices=(4, 8, 16, 32))
    seed: int = flag(0, "seed of the resamples", type=natural)


# ------------------------------------------------------------------ the rule
class Choice(NamedTuple):
    """A value for each part of the choice.

    It is the index of an encoder or stride (None: not fixed by hand), or the winner's lead.
    """

    master: int | float | None
    auxiliary: int | float | None
    stride: int | float | None


def select(sc, edge, fixed, relative=False):
    """Choose master, auxiliary and stride (rule: paper).

    sc, edge: mean scores of the candidates, [encoders, strides]. fixed: a Choice of indices that
    are chosen by hand, each None where the rule chooses. relative: True for ER, where what counts
    is by how much the auxiliary's score exceeds the master's.

    Returns two Choices: of indices, and of each winner's lead over the second best. A lead of 0 is
    a tie, and it is infinite where there is no second.
    """
    # The master has the highest SC, averaged over the strides.
    mean_sc = sc.mean(1)  # [encoders]
    if fixed.auxiliary is not None:
        mean_sc[fixed.auxiliary] = -np.inf
    master, master_lead = best(mean_sc, fixed.master)
    if relative:
        edge = edge - edge[master]
    # The auxiliary is the one of the others whose edge score peaks highest, and s* is that peak.
    peak = edge.max(1)  # [encoders]
    peak[master] = -np.inf
    auxiliary, auxiliary_lead = best(peak, fixed.auxiliary)
    stride, stride_lead = best(edge[auxiliary], fixed.stride)
    leads = Choice(master_lead, auxiliary_lead, stride_lead)
    return Choice(master, auxiliary, stride), leads


def best(values, fixed):
    """The index of the highest value, and its lead over the second. A fixed index has no rival."""
    if fixed is not None:
        return fixed, np.inf
    second, highest = np.sort(values)[-2:]
    return int(values.argmax()), highest - second


def fixed_by_hand(settings, metrics):
    """The Choice that the flags make. UserError for what is not in the run."""
    encoders = metrics["encoders"]
    allowed = Choice(encoders, encoders, metrics["strides"])
    requested = Choice(settings.master, settings.auxiliary, settings.stride)
    indices = []
    for values, value in zip(allowed, requested, strict=True):
        if value is None:
            indices.append(None)
            continue
        require(
            value in values,
            f"{value} is not in {settings.run}: there are {', '.join(map(str, values))}",
        )
        indices.append(values.index(value))
    require(
        settings.master is None or settings.master != settings.auxiliary,
        f"master and auxiliary are both {settings.master}: fusion needs two encoders",
    )
    return Choice(*indices)


# ------------------------------------------------------------------ scores and resamples
def read_scores(folder, metrics, column, weights):
    """Bootstrap-weighted means of a column of metrics.csv: [1 + resamples, sources, strides].

    weights: [1 + resamples, images], of which row 0 gives the plain means.
    """
    shape = (metrics["images"], len(metrics["scores"]), len(metrics["strides"]))
    path = folder / "metrics.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            values = [float(row[column]) for row in csv.DictReader(file)]
        # 02_metrics.py writes the rows by image, then by source, then by stride.
        values = np.array(values).reshape(shape)
    except (OSError, KeyError, ValueError, TypeError) as error:
        again = run.command("02_metrics.py", folder)
        raise UserError(f"{path} cannot be used ({error!r}): run `{again}` again") from None
    require(
        np.isfinite(values).all(),
        f"{folder} has no {column}: it needs more images, see 02_metrics.py",
    )
    return np.tensordot(weights, values, axes=1)


def measure_stability(sc, edge, choice, fixed, relative):
    """In which share of the resamples each part is chosen again, the pair, and all three.

    sc, edge: [resamples, encoders, strides].
    """
    same = {"master": 0, "auxiliary": 0, "stride": 0, "pair": 0, "all": 0}
    for resampled_sc, resampled_edge in zip(sc, edge, strict=True):
        chosen, _ = select(resampled_sc, resampled_edge, fixed, relative)
        same["master"] += chosen.master == choice.master
        same["auxiliary"] += chosen.auxiliary == choice.auxiliary
        same["stride"] += chosen.stride == choice.stride
        same_pair = chosen.master == choice.master and chosen.auxiliary == choice.auxiliary
        same["pair"] += same_pair
        same["all"] += chosen == choice
    return {name: count / len(sc) for name, count in same.items()}


# ------------------------------------------------------------------ what speaks against the choice
def control_warnings(metrics, selection, sc, edge):
    """Warn of winners that do not clear their controls.

    sc, edge: [1 + resamples, sources, strides], the plain means first.
    """
    warnings = []
    sources = list(metrics["scores"])
    column = selection["score_column"]
    master = sources.index(selection["master"])
    auxiliary = sources.index(selection["auxiliary"])
    stride_index = metrics["strides"].index(selection["stride"])

    def compare(what, values, winner, rival):
        # values: [1 + resamples, sources]
        other = sources.index(rival)
        share = (values[1:, winner] > values[1:, other]).mean()
        if share < CONTROL_CONFIDENCE:
            kind = "the control " if rival in metrics["controls"] else ""
            warnings.append(
                f"{what}, {values[0, winner]:.2f}, does not clear that of {kind}{rival}, "
                f"{values[0, other]:.2f}: it is higher in only {share:.1%} of the resamples "
                f"({CONTROL_CONFIDENCE:.1%} are required)"
            )

    edge_at_stride = edge[:, :, stride_index]
    at_stride = f"{column} of {selection['auxiliary']} at OS {selection['stride']}"
    for control in EDGE_CONTROLS[column]:
        compare(at_stride, edge_at_stride, auxiliary, control)
    if column == "ER":
        # If the master's own map does better, a worse map would replace it.
        compare(at_stride, edge_at_stride, auxiliary, selection["master"])
    for control in SC_CONTROLS:
        mean = f"SC of {selection['master']}, mean over strides"
        compare(mean, sc.mean(2), master, control)
    return warnings


def data_warnings(metrics):
    """Warn of maps and images that make scores useless."""
    warnings = []
    for encoder, counts in metrics["degenerate"].items():
        if any(counts.values()):
            by_stride = ", ".join(f"{count} at OS {stride}" for stride, count in counts.items())
            of_all = f"of {metrics['images']} maps are constant or not finite, and score 0"
            warnings.append(f"{encoder}: {by_stride} {of_all}")
    for encoder in metrics["random_weights"]:
        says = "its scores say nothing about the trained one"
        warnings.append(f"{encoder} has RANDOM weights (--weights none): {says}")
    if metrics["images"] < FEW_IMAGES:
        says = "stability over their resamples says little"
        warnings.append(f"only {metrics['images']} images: {says}")
    return warnings


# ------------------------------------------------------------------ report
def scores_behind(metrics, column):
    """The means that the choice rests on: {source: {score: {stride: mean}}}."""
    scores = {}
    for source, profile in metrics["scores"].items():
        scores[source] = {}
        for name in ("SC", column):
            scores[source][name] = {stride: at[name]["mean"] for stride, at in profile.items()}
    return scores


def print_scores(metrics, column):
    """The table behind the choice: SC averaged over strides, the edge score by stride."""
    rows = [["", "SC, mean", *(f"{column}, OS {stride}" for stride in metrics["strides"])]]
    for source, profile in metrics["scores"].items():
        kind = " (control)" if source in metrics["controls"] else ""
        sc = np.mean([scores["SC"]["mean"] for scores in profile.values()])
        row = [source + kind, run.number(sc, 3)]
        for scores in profile.values():
            row.append(run.number(scores[column]["mean"], 3))
        rows.append(row)
    print(f"\n{run.table(rows)}")


def explain(selection, metrics):
    """Why each part was chosen: {part: reason}."""
    column = selection["score_column"]
    if column == "ER":
        at = str(selection["stride"])
        scores = metrics["scores"]
        er = scores[selection["auxiliary"]][at]["ER"]["mean"]
        lead = er - scores[selection["master"]][at]["ER"]["mean"]
        why_auxiliary = "furthest ahead of the master in ER among the others"
        why_stride = f"where the auxiliary's ER leads the master's most, by {lead:.2f}"
    else:
        why_auxiliary = f"highest {column} at any stride among the others"
        why_stride = f"where the auxiliary's {column} peaks"
    if len(metrics["encoders"]) == 2:
        why_auxiliary = "the only other encoder"
    reasons = {
        "master": "highest SC, mean over strides",
        "auxiliary": why_auxiliary,
        "stride": why_stride,
    }
    for part in selection["chosen_by_hand"]:
        reasons[part] = "chosen by hand"
    return reasons


def report(folder, metrics, selection):
    """Print what was chosen and why, how stable that is, and what speaks against it."""
    for part, reason in explain(selection, metrics).items():
        print(f"{part:12}{selection[part]:<15} {reason}")
    stability = selection["stability"]
    text = (
        f"of {RESAMPLES} bootstrap resamples of the {metrics['images']} images, "
        f"{stability['pair']:.0%} choose the same pair, {stability['stride']:.0%} the same stride, "
        f"{stability['all']:.0%} both"
    )
    if selection["chosen_by_hand"]:
        text += f" ({', '.join(selection['chosen_by_hand'])} held fixed)"
    print(text)
    for warning in selection["warnings"]:
        print(f"WARNING: {warning}")
    print(f"\nwrote selection.json, metrics.png in {folder}")
    if metrics["benchmark"]:
        print(f"next: {run.command('04_train.py', folder)}")
    else:
        pair = f"{selection['master']} {selection['auxiliary']}"
        print(f"next: training needs labels: 01_extract.py --benchmark NAME --encoders {pair}")


# ------------------------------------------------------------------ the stage
def main():
    settings = run.parse(__doc__, Settings)
    folder = settings.run
    metrics = run.read_stage(folder, "metrics.json", "02_metrics.py")
    encoders = metrics["encoders"]
    column = SCORE_COLUMNS[settings.score]
    relative = column == "ER"
    require(
        len(encoders) > 1,
        f"a pair needs two encoders and {folder} has one, {encoders[0]}: with labels, "
        f"`{run.command('04_train.py', folder)} --fusion none` trains it alone",
    )
    fixed = fixed_by_hand(settings, metrics)

    # Row 0 holds the plain means, each other row those of a resample of the images.
    weights = run.bootstrap_weights(metrics["images"], settings.seed)
    sc = read_scores(folder, metrics, "SC", weights)  # [1 + resamples, sources, strides]
    edge = read_scores(folder, metrics, column, weights)
    print_scores(metrics, column)

    # Controls come after the encoders and cannot be chosen.
    candidate_sc = sc[:, : len(encoders)]
    candidate_edge = edge[:, : len(encoders)]
    choice, leads = select(candidate_sc[0], candidate_edge[0], fixed, relative)
    # A tie would be settled by the order of the encoders.
    for part, lead in leads._asdict().items():
        require(
            lead > 0,
            f"scores tie for the {part} (maps that are constant, as an untrained ViT's, score 0): "
            f"choose by hand with --{part}",
        )
    stability = measure_stability(candidate_sc[1:], candidate_edge[1:], choice, fixed, relative)

    selection = {
        "master": encoders[choice.master],
        "auxiliary": encoders[choice.auxiliary],
        "stride": metrics["strides"][choice.stride],
        "score_column": column,
        "chosen_by_hand": [p for p, index in fixed._asdict().items() if index is not None],
        "scores": scores_behind(metrics, column),
        "stability": stability,
        "random_weights": metrics["random_weights"],
    }
    warnings = control_warnings(metrics, selection, sc, edge)
    # Of two encoders the auxiliary changes with the master, and the master's warning says enough.
    for part, lead in leads._asdict().items():
        if stability[part] < CHOICE_STABILITY and np.isfinite(lead):
            share = f"only {stability[part]:.0%} of the resamples choose the same {part}"
            warnings.append(f"{share}: its lead, {lead:.2g}, is not clear")
    selection["warnings"] = warnings + data_warnings(metrics)
    run.write_json(folder / "selection.json", selection)
    draw_profiles(folder / "metrics.png", metrics, selection)
    report(folder, metrics, selection)


if __name__ == "__main__":
    run.start(main)
