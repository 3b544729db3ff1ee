"""Stage 3: choose the pair of encoders, and the stride at which to fuse them.

The encoder with the highest Structural Coherence (SC) becomes the master. Among the others, the one whose Edge Fidelity
(EF) peaks highest becomes the auxiliary; the stride of that peak, s*, is where its map will stand in for the master's
(paper, arXiv 2605.16864). `--task edges` turns the roles round: the master has the highest EF, the auxiliary the
highest SC among the others; s* is still where the auxiliary's EF peaks. `--score readout` takes the edge readout (ER)
for EF: as it compares encoders at one stride, what counts is the lead over the master, whose map is to be replaced.

    python 03_select.py                       # the embedded benchmark, runs/toycity
    python 03_select.py --run runs/mine       # any run folder that 02_metrics.py has filled
    python 03_select.py --score readout       # the auxiliary and the stride by the edge readout (ER)
    python 03_select.py --stride 8            # choose a part by hand

Reads metrics.json and metrics.csv. Writes selection.json, and draws the choice into metrics.png.
"""

import contextlib
import csv
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.figures import draw_profiles
from common.run import RESAMPLES, UserError, flag, natural, need

import numpy as np
import torch

CLEAR = 0.975  # the share of resamples in which a winner must exceed its control
AGREE = 0.9  # the share of resamples that must choose the same
SC_CONTROLS = ("image", "shifted")  # noise's SC is next to nothing
FEW_IMAGES = 10  # resamples of fewer say little about other pictures
SCORES = {"ef": "EF", "ef_released": "EF_RELEASED", "readout": "ER"}
EDGE_CONTROLS = {"EF": ("noise",), "EF_RELEASED": ("noise",), "ER": ("noise", "image")}
LOWEST = -1e9  # the score of whatever is out of the running


@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder")
    task: str = flag("segmentation", "edges: roles turned round", choices=("segmentation", "edges"))
    score: str = flag("ef", "of edges", choices=tuple(SCORES))
    master: str | None = flag(None, "by hand, not by score", metavar="ENCODER")
    auxiliary: str | None = flag(None, "by hand, not by score", metavar="ENCODER")
    stride: int | None = flag(None, "by hand, not by score", choices=(4, 8, 16, 32))
    seed: int = flag(0, "seed of the bootstrap", type=natural)


# ------------------------------------------------------------------ the rule
def select(sc, ef, task="segmentation", relative=False, **held):
    """Choose master, auxiliary and stride by mean scores sc and ef, each [..., encoder, stride] (rule: paper).

    Returns (choice, lead), both [3, ...] in that order: indices, and the margin over the second best, 0 being a tie.
    An index held as `master`, `auxiliary` or `stride` is kept; the other parts are chosen by the same rule as ever.
    relative: ef compares encoders at one stride only. The auxiliary's counts as its lead over the master's.
    """
    structure, edges = sc.mean(-1), ef.mean(-1) if relative else ef.max(-1)  # [..., encoder]
    first = structure if task == "segmentation" else edges
    if held.get("auxiliary") is not None:
        first[..., held["auxiliary"]] = LOWEST
    master, master_lead = best(first, held.get("master"))
    if relative:
        ef = ef - np.take_along_axis(ef, master[..., None, None], axis=-2)
    second = ef.max(-1) if task == "segmentation" else structure
    np.put_along_axis(second, master[..., None], LOWEST, axis=-1)
    auxiliary, auxiliary_lead = best(second, held.get("auxiliary"))
    profile = np.take_along_axis(ef, auxiliary[..., None, None], axis=-2)[..., 0, :]  # [..., stride]
    stride, stride_lead = best(profile, held.get("stride"))
    return np.stack([master, auxiliary, stride]), np.stack([master_lead, auxiliary_lead, stride_lead])


def best(values, given=None):
    """Index of the highest value along the last axis, and its lead over the second.

    The lead is infinite for a given index, and where all others are out of the running.
    """
    if given is not None:
        return np.full(values.shape[:-1], given), np.full(values.shape[:-1], np.inf)
    *_, second, first = np.moveaxis(np.sort(values, axis=-1), -1, 0)
    return values.argmax(-1), np.where((second == LOWEST) & (first > LOWEST), np.inf, first - second)


def held_by_hand(settings, metrics):
    """{"master", "auxiliary", "stride": index, or None where the rule chooses}; UserError for what is not there."""
    encoders, folder = metrics["encoders"], settings.run
    need(len(encoders) > 1, f"a pair needs two encoders, {folder} has {encoders[0]}: name more in 01_extract.py")
    two = settings.master is None or settings.master != settings.auxiliary
    need(two, f"master and auxiliary are both {settings.master}: fusion needs two encoders")
    known = {"master": encoders, "auxiliary": encoders, "stride": metrics["strides"]}
    given = {part: getattr(settings, part) for part in known}
    for part, value in given.items():
        there = value in (None, *known[part])
        need(there, f"{value} is not in {folder}: the encoders there are {', '.join(encoders)}")
    return {part: None if value is None else known[part].index(value) for part, value in given.items()}


# ------------------------------------------------------------------ scores
def read_scores(folder, metrics, score, weights):
    """Mean SC and EF over images, one for each row of weights [R, image]: two arrays [R, source, stride]."""
    shape = (metrics["images"], len(metrics["scores"]), len(metrics["strides"]))
    try:
        with open(folder / "metrics.csv", newline="") as file:
            rows = [[float(row[column]) for column in ("SC", score)] for row in csv.DictReader(file)]
        values = np.array(rows).T.reshape(2, *shape)  # [column, image, source, stride]
    except (OSError, KeyError, ValueError, TypeError) as error:
        again = run.command("02_metrics.py", folder)
        raise UserError(f"{folder / 'metrics.csv'} cannot be used ({error!r}): run `{again}` again") from None
    need(np.isfinite(values).all(), f"{folder} has no {score}: it needs more images, see 02_metrics.py")
    return tuple(np.tensordot(weights, array, axes=1) for array in values)


def what_speaks_against(settings, metrics, choice, sc, ef, agreement):
    """Warnings, first of winners that do not clear their controls, then of choices that the resamples do not share.

    sc, ef [1 + RESAMPLES, source, stride], the plain means first; agreement {part: (share of resamples, lead)}.
    """
    sources, at, score = list(metrics["scores"]), metrics["strides"].index(choice["stride"]), SCORES[settings.score]
    structure, edges = choice["master"], choice["auxiliary"]
    if settings.task == "edges":
        structure, edges = edges, structure
        if score != "ER":  # whose lead the stride was chosen by
            at = ef[0, sources.index(edges)].argmax()
    at_stride = f"{score} of {edges} at OS {metrics['strides'][at]}"
    duels = [(at_stride, edges, ef[:, :, at], control) for control in EDGE_CONTROLS[score]]
    if score == "ER":  # it would put a worse map in the place of a better one
        duels.append((at_stride, edges, ef[:, :, at], structure))
    duels += [(f"SC of {structure}, mean over strides", structure, sc.mean(2), control) for control in SC_CONTROLS]
    warnings = []
    for what, encoder, values, control in duels:
        kind = "the control " * (control in metrics["controls"])
        own, other = values[:, sources.index(encoder)], values[:, sources.index(control)]  # [1 + RESAMPLES]
        clears = (own[1:] > other[1:]).mean()
        if clears < CLEAR:
            scores = f"{what}, {own[0]:.2f}, does not clear that of {kind}{control}, {other[0]:.2f}"
            warnings.append(f"{scores}: higher in {clears:.1%} of the resamples, {CLEAR:.1%} are asked for")
    for part, (share, lead) in agreement.items():
        if share < AGREE and np.isfinite(lead):
            warnings.append(
                f"{share:.0%} of the resamples choose the same {part}: its lead, {lead:.2g}, is no clear one"
            )
    for name, counts in metrics.get("degenerate", {}).items():
        if any(counts.values()):
            many = f"of {metrics['images']} maps at each stride {list(counts.values())} of {name}"
            warnings.append(f"{many} are constant or not finite, and score 0")
    for encoder in metrics["random_weights"]:
        warnings.append(f"{encoder} has RANDOM weights (--weights none): its scores say nothing about the trained one")
    if metrics["images"] < FEW_IMAGES:
        warnings.append(f"only {metrics['images']} images: stability over their resamples says little")
    return warnings


def trained_otherwise(folder, choice):
    """Was the folder's checkpoint.pt trained with another choice? A damaged one is for 04_train.py to refuse."""
    with contextlib.suppress(Exception):  # torch raises many types; most often there is no checkpoint
        # Mapped, not read: its weights may take gigabytes.
        trained = torch.load(folder / "checkpoint.pt", "cpu", mmap=True, weights_only=True)["settings"]
        return any(trained[part] != choice[part] for part in choice)
    return False


# ------------------------------------------------------------------ the stage
def print_scores(metrics, score):
    """The table behind the choice: SC averaged over strides, EF stride by stride, controls last."""
    rows = [["", "SC, mean", *(f"{score}, OS {stride}" for stride in metrics["strides"])]]
    for source, profile in metrics["scores"].items():
        sc, ef = ([scores[name]["mean"] for scores in profile.values()] for name in ("SC", score))
        mean = None if None in sc else np.mean(sc)
        kind = " (control)" if source in metrics["controls"] else ""
        rows.append([source + kind, *(run.number(value, 3) for value in (mean, *ef))])
    print(f"\n{run.table(rows)}")


def report(folder, metrics, selection, otherwise):
    """What was chosen and why, how stable that is, and what speaks against it."""
    score = SCORES[selection["score"]]
    of_edges, peak = f"highest {score} at any stride", f"where the auxiliary's {score} peaks"
    if score == "ER":
        at, scores = str(selection["stride"]), selection["scores"]
        leads = scores[selection["auxiliary"]]["ER"][at] - scores[selection["master"]]["ER"][at]
        edges = {"segmentation": "furthest ahead of the master in ER", "edges": "highest ER, mean over strides"}
        of_edges, peak = edges[selection["task"]], f"where the auxiliary's ER leads the master's most, by {leads:.2f}"
    reasons = ["highest SC, mean over strides", of_edges]
    reasons = reasons if selection["task"] == "segmentation" else reasons[::-1]
    others = f"{reasons[1]} among the others" if len(metrics["encoders"]) > 2 else "the only other encoder"
    reasons = {"master": reasons[0], "auxiliary": others, "stride": peak}
    by_hand, stability = selection["chosen_by_hand"], selection["stability"]
    for part, reason in reasons.items():
        print(f"{part:12}{selection[part]:<15} {'chosen by hand' if part in by_hand else reason}")
    pair, stride, both = (f"{stability[part]:.0%}" for part in ("pair", "stride", "all"))
    print(f"in {RESAMPLES} resamples of the {metrics['images']} images the same pair in {pair}, stride in {stride}, "
          f"both in {both}" + (f" ({', '.join(by_hand)} held fixed)" if by_hand else ""))  # fmt: skip
    for warning in selection["warnings"]:
        print(f"WARNING: {warning}")
    print(f"\nwrote selection.json, metrics.png in {folder}")
    if metrics["benchmark"]:
        out = ("--out", f"{folder}_os{selection['stride']}") if otherwise else ()
        print(f"next: {run.command('04_train.py', folder, *out)}")
    else:
        found = "what the warnings say" if selection["warnings"] else "the pair above"
        pair = f"--benchmark NAME --encoders {selection['master']} {selection['auxiliary']}"
        print(f"for these pictures: {found}. next: 04_train.py needs labels, start with 01_extract.py {pair}")


def main():
    settings = run.parse(__doc__, Settings)
    metrics = run.read_stage(settings.run, "metrics.json", "02_metrics.py")
    score, encoders = SCORES[settings.score], metrics["encoders"]
    by_hand = held_by_hand(settings, metrics)

    # Choose by the plain means (row 0), and again by each bootstrap resample of the images.
    weights = run.bootstrap(metrics["images"], settings.seed)  # [1 + RESAMPLES, image]
    sc, ef = read_scores(settings.run, metrics, score, weights)  # [1 + RESAMPLES, source, stride]
    candidates = slice(0, len(encoders))  # controls come after the encoders and cannot be chosen
    chosen, lead = select(sc[:, candidates], ef[:, candidates], settings.task, score == "ER", **by_hand)
    print_scores(metrics, score)
    for part, margin in zip(by_hand, lead[:, 0], strict=True):
        cause = "all 0 where maps are degenerate, like an untrained ViT's"
        need(margin > 0, f"scores tie for the {part} ({cause}): choose by hand with --{part}")
    same = chosen[:, 1:] == chosen[:, :1]  # [3, RESAMPLES]
    stability = {"pair": same[:2].all(0).mean(), "stride": same[2].mean(), "all": same.all(0).mean()}

    master, auxiliary, at = chosen[:, 0]
    selection = {"master": encoders[master], "auxiliary": encoders[auxiliary], "stride": metrics["strides"][at]}
    agreement = dict(zip(by_hand, zip(same.mean(1), lead[:, 0], strict=True), strict=True))
    warnings = what_speaks_against(settings, metrics, selection, sc, ef, agreement)
    otherwise = trained_otherwise(settings.run, selection)
    if otherwise:
        warnings.append("checkpoint.pt was trained with another selection than this one: give 04_train.py an --out")
    selection |= {"task": settings.task, "score": settings.score}
    selection["chosen_by_hand"] = [part for part, index in by_hand.items() if index is not None]
    selection["scores"] = {
        source: {name: {stride: profile[stride][name]["mean"] for stride in profile} for name in ("SC", score)}
        for source, profile in metrics["scores"].items()
    }
    selection["stability"] = {name: float(share) for name, share in stability.items()} | {"resamples": RESAMPLES}
    selection |= {"warnings": warnings, "random_weights": metrics["random_weights"]}
    run.write_json(settings.run / "selection.json", selection)
    draw_profiles(settings.run / "metrics.png", metrics, selection)
    report(settings.run, metrics, selection, otherwise)


if __name__ == "__main__":
    run.start(main)
