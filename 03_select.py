"""Stage 3: choose the pair of encoders, and the stride at which to fuse them.

The encoder with the highest Structural Coherence (SC) becomes the master. Among the others, the one whose Edge Fidelity
(EF) peaks highest becomes the auxiliary; the stride of that peak, s*, is where its map will stand in for the master's
(paper, arXiv 2605.16864). `--task edges` turns the roles round: the master has the highest EF, the auxiliary the
highest peak of SC, and s* is the stride of that peak.

    python 03_select.py                       # the embedded benchmark, runs/toycity
    python 03_select.py --run runs/mine       # any run folder that 02_metrics.py has filled
    python 03_select.py --score ef_share      # by EF corrected for chance, as a share of the image's own
    python 03_select.py --stride 8            # choose a part by hand

Reads metrics.json and metrics.csv; run.json, features and pictures too for drawing three of them. Writes
selection.json, edges.png (each encoder's edges at s*), and draws the choice into metrics.png.
"""

import csv
import importlib

import numpy as np

from common import run
from common.figures import draw_edges, draw_profiles

RESAMPLES = 1000  # bootstrap
CLEAR = 0.975  # the share of resamples in which an EF must exceed the noise control's
FEW_IMAGES = 10  # resamples of fewer say little about other pictures
LOWEST = -1e9  # the score of whatever is out of the running


# ---------------------------------------------------------------------------------------------- the rule


def select(sc, ef, task="segmentation", master=None, auxiliary=None, stride=None):
    """Choose master, auxiliary and stride by mean scores sc and ef, each [..., encoder, stride] (rule: paper).

    Returns (choice, lead), both [3, ...] in that order: indices, and the margin over the second best, 0 being a tie.
    An index given for `master`, `auxiliary` or `stride` is kept; the other parts are chosen by the same rule as ever.
    """
    overall, peaking = (sc, ef) if task == "segmentation" else (ef, sc)
    mean = overall.mean(-1)  # [..., encoder]
    if auxiliary is not None:
        mean[..., auxiliary] = LOWEST
    master, master_lead = best(mean, master)
    peak = peaking.max(-1)  # [..., encoder]
    np.put_along_axis(peak, master[..., None], LOWEST, axis=-1)
    auxiliary, auxiliary_lead = best(peak, auxiliary)
    profile = np.take_along_axis(peaking, auxiliary[..., None, None], axis=-2)[..., 0, :]  # [..., stride]
    stride, stride_lead = best(profile, stride)
    return np.stack([master, auxiliary, stride]), np.stack([master_lead, auxiliary_lead, stride_lead])


def best(values, given=None):
    """Index of the highest value along the last axis, and its lead over the second; a given index always leads."""
    if given is not None:
        return np.full(values.shape[:-1], given), np.full(values.shape[:-1], np.inf)
    ordered = np.sort(values, axis=-1)
    return values.argmax(-1), ordered[..., -1] - ordered[..., -2]


# ---------------------------------------------------------------------------------------------- scores


def read_values(folder, metrics):
    """metrics.csv as {"SC", "EF", "EF_RELEASED", "EF_CC": [image, source, stride]}; UserError if it does not fit."""
    columns = ("SC", "EF", "EF_RELEASED", "EF_CC")
    shape = (metrics["images"], len(metrics["scores"]), len(metrics["strides"]))
    try:
        with open(folder / "metrics.csv", newline="") as file:
            rows = [[float(row[column]) for column in columns] for row in csv.DictReader(file)]
        return dict(zip(columns, np.array(rows).T.reshape(len(columns), *shape), strict=True))
    except (OSError, KeyError, ValueError, TypeError) as error:
        again = run.command("02_metrics.py", folder)
        raise run.UserError(f"{folder / 'metrics.csv'} cannot be used ({error!r}): run `{again}` again") from None


def mean_scores(values, weights, sources, score):
    """Mean SC and EF over images, one for each row of weights [R, image]: two arrays [R, source, stride]."""
    means = {column: np.tensordot(weights, array, axes=1) for column, array in values.items()}
    if score != "EF_SHARE":
        return means["SC"], means[score]
    image = means["EF_CC"][:, [sources.index("image")]]  # [R, 1, stride]
    share = means["EF_CC"] / np.where(image > 0, image, 1)
    return means["SC"], np.where(image > 0, share, LOWEST)  # of nothing, or less, there are no shares


def print_scores(metrics, overall, peaking):
    """The table behind the choice: one score averaged over strides, the other stride by stride, controls last."""
    strides = [str(stride) for stride in metrics["strides"]]
    wide = max(16, *(len(source) + 2 for source in metrics["scores"]))
    print(f"\n{'':{wide}}{overall:>11}{peaking:>13}")
    print(f"{'':{wide}}{'mean':>11}    " + "".join(f"{f'OS {stride}':>9}" for stride in strides))
    for source, profile in metrics["scores"].items():
        means = [profile[stride][overall]["mean"] for stride in strides]
        cells = [None if None in means else np.mean(means), *(profile[stride][peaking]["mean"] for stride in strides)]
        mean, *cells = ("-" if cell is None else f"{cell:.3f}" for cell in cells)
        kind = "   (control)" if source in metrics["controls"] else ""
        print(f"{source:{wide}}{mean:>11}    " + "".join(f"{cell:>9}" for cell in cells) + kind)


# ---------------------------------------------------------------------------------------------- the stage


def main():
    parser = run.arguments(__doc__)
    parser.add_argument("--task", choices=["segmentation", "edges"], default="segmentation", help="edges: roles turned")
    parser.add_argument("--score", choices=["ef", "ef_released", "ef_share"], default="ef", help="which form of EF")
    parser.add_argument("--master", metavar="ENCODER", help="by hand, not by score")
    parser.add_argument("--auxiliary", metavar="ENCODER", help="by hand, not by score")
    parser.add_argument("--stride", type=int, choices=[4, 8, 16, 32], help="by hand, not by score")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    args = parser.parse_args()
    folder = args.run
    metrics = run.read_stage(folder, "metrics.json", "02_metrics.py")
    encoders, strides, score = metrics["encoders"], metrics["strides"], args.score.upper()
    sources = [*encoders, *metrics["controls"]]
    overall, peaking = ("SC", score) if args.task == "segmentation" else (score, "SC")

    # What was asked for must be there.
    if len(encoders) < 2:
        raise run.UserError(
            f"a pair needs two encoders and {folder} has only {encoders[0]}: name more in 01_extract.py"
        )
    for encoder in filter(None, (args.master, args.auxiliary)):
        if encoder not in encoders:
            raise run.UserError(f"{encoder} is not in {folder}: the encoders there are {', '.join(encoders)}")
    if args.master and args.master == args.auxiliary:
        raise run.UserError(f"master and auxiliary are both {args.master}: fusion needs two encoders")
    by_hand = {
        "master": encoders.index(args.master) if args.master else None,
        "auxiliary": encoders.index(args.auxiliary) if args.auxiliary else None,
        "stride": strides.index(args.stride) if args.stride else None,
    }

    # Choose by the plain means, and again by each bootstrap resample of the images. A resample is how often each image
    # is drawn, which makes its means weighted means.
    values, images = read_values(folder, metrics), metrics["images"]
    resamples = np.random.default_rng(args.seed).multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, images)), resamples]) / images  # [1 + RESAMPLES, image]
    sc, ef = mean_scores(values, weights, sources, score)  # [1 + RESAMPLES, source, stride]
    candidates = slice(0, len(encoders))  # controls come after the encoders and cannot be chosen
    choice, lead = select(sc[:, candidates], ef[:, candidates], args.task, **by_hand)  # [3, 1 + RESAMPLES]
    print_scores(metrics, overall, peaking)
    for part, margin in zip(by_hand, lead[:, 0], strict=True):
        if margin == 0:
            raise run.UserError(
                f"scores tie for the {part} (all 0 where maps are degenerate, like an untrained ViT's): "
                f"choose by hand with --{part}"
            )
    master, auxiliary, at = choice[:, 0]
    same = choice[:, 1:] == choice[:, :1]  # [3, RESAMPLES]
    stability = {"pair": same[:2].all(0).mean(), "stride": same[2].mean(), "all": same.all(0).mean()}

    # Say what speaks against it.
    if args.task == "segmentation":
        edge_encoder, where, edge = auxiliary, f"at OS {strides[at]}", ef[:, :, at]  # [1 + RESAMPLES, source]
    else:
        edge_encoder, where, edge = master, "over all strides", ef.mean(2)
    edge, noise = edge[:, edge_encoder], edge[:, sources.index("noise")]  # [1 + RESAMPLES]
    clears = (edge[1:] > noise[1:]).mean()
    warnings = []
    if clears < CLEAR:
        warnings.append(
            f"{score} of {encoders[edge_encoder]} {where}, {edge[0]:.2f}, does not clear that of white noise, "
            f"{noise[0]:.2f}: it is higher in {clears:.1%} of the resamples, and {CLEAR:.1%} are asked for"
        )
    for encoder in metrics["random_weights"]:
        warnings.append(f"{encoder} has RANDOM weights (--weights none): its scores say nothing about the trained one")
    if images < FEW_IMAGES:
        warnings.append(f"only {images} images: stability over their resamples says little")

    selection = {
        "master": encoders[master],
        "auxiliary": encoders[auxiliary],
        "stride": strides[at],
        "task": args.task,
        "score": args.score,
        "chosen_by_hand": [part for part, index in by_hand.items() if index is not None],
        "scores": {
            source: {name: {stride: profile[stride][name]["mean"] for stride in profile} for name in ("SC", score)}
            for source, profile in metrics["scores"].items()
        },
        "stability": {name: float(share) for name, share in stability.items()} | {"resamples": RESAMPLES},
        "warnings": warnings,
        "random_weights": metrics["random_weights"],
    }
    if (folder / "checkpoint.pt").is_file() and (folder / "selection.json").is_file():
        before = run.read_stage(folder, "selection.json", "03_select.py")
        if any(before[part] != selection[part] for part in by_hand):
            warnings.append(
                "checkpoint.pt here was trained with the selection before this one: give 04_train.py an --out"
            )
    run.write_json(folder / "selection.json", selection)
    draw_profiles(folder / "metrics.png", metrics, selection)
    wrote = "selection.json, metrics.png"
    try:
        settings = run.read_stage(folder, "run.json", "01_extract.py")
        shown = settings["images"][:: max(1, images // 3)][:3]
        edges_of = importlib.import_module("02_metrics").edges_of  # as stage 2 measures them
        rows = [edges_of(folder, settings, name, strides[at], args.device) for name in shown]
        draw_edges(folder / "edges.png", rows)
        wrote += ", edges.png"
    except run.UserError as error:  # the choice needs neither features nor pictures, which may be gone by now
        print(f"edges.png is not drawn: {error}")

    others = f"highest peak of {peaking} among the others" if len(encoders) > 2 else "the only other encoder"
    reasons = (f"highest {overall}, mean over strides", others, f"peak of {peaking}")
    wide = max(16, *(len(encoder) + 2 for encoder in encoders))
    chosen = (selection["master"], selection["auxiliary"], f"OS {selection['stride']}")
    print()
    for part, what, reason in zip(by_hand, chosen, reasons, strict=True):
        print(f"{part:12}{what:{wide}}{reason if by_hand[part] is None else 'chosen by hand'}")
    fixed = f" ({', '.join(selection['chosen_by_hand'])} held fixed)" if selection["chosen_by_hand"] else ""
    print(
        f"the same pair in {stability['pair']:.0%} of {RESAMPLES} resamples of the {images} images, the same stride in "
        f"{stability['stride']:.0%}, both in {stability['all']:.0%}{fixed}"
    )
    for warning in warnings:
        print(f"WARNING: {warning}")
    print(f"\nwrote {wrote} in {folder}")
    if metrics["benchmark"]:
        print(f"next: {run.command('04_train.py', folder)}")
    else:
        pair = f"--benchmark NAME --encoders {selection['master']} {selection['auxiliary']}"
        print(f"next: the answer for these pictures stands. 04_train.py needs labels: start with 01_extract.py {pair}")


if __name__ == "__main__":
    run.start(main)
