"""What does a map know of true boundaries and classes, and which label-free score sees it?

    python tests/ground_truth.py --runs runs/toycity
    python tests/ground_truth.py --runs runs/toycity --head
    python tests/ground_truth.py --runs runs/mine runs/mine_random

It is run by hand, on a run that 02_metrics.py has filled, or on several of the same images, which
it takes as one. For each source (encoder or control) and output stride there are these truths, from
labels that no score has seen:

    boundary   a ridge regression from the map to "a true boundary runs through this cell", fitted
               on some of the images: average precision (AP) on the others, above chance,
               (AP - share) / (1 - share)
    head       with --head, minutes more: a small convolutional head in place of the regression, for
               a truth that is not linear
    class      a ridge regression to the classes, each of the same weight: mean accuracy over them
    SC_GT      SC with true segments in place of cells and of clusters (paper, arXiv 2605.16864)

Three files go into the first run folder. ground_truth.csv holds means by source and stride, and
ground_truth.png the scores beside the truths. ground_truth.json holds Spearman's rho of each score
with each truth, within each stride and over all, with the controls and without. Intervals are a
bootstrap over images, and neither scores nor probes are fitted again. Images stream: only a
histogram for each map grows with their number.
"""

import csv
import importlib
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import figures, run  # noqa: E402
from common.datasets import open_split  # noqa: E402
from common.encoders import STRIDES, level  # noqa: E402
from common.images import read_run_image  # noqa: E402
from common.run import UserError, flag, require  # noqa: E402

metrics = importlib.import_module("02_metrics")

# On the diagonal of correlations. A truth wants all that a map knows, of any width.
RIDGE = 0.1
# Of predictions from -0.5 to 1.5, as the regression's target is 0 or 1.
BINS = 400
HEAD_WIDTH = 16
HEAD_STEPS = 150  # an image a step
SCORES = ("SC", "EF", "EF_RELEASED", "ER")
TRUTHS = ("boundary", "head", "class", "SC_GT")
VOID = 65535


@dataclass
class Settings:
    runs: tuple[Path, ...] = flag(
        (Path("runs/toycity"),), "run folders of the same images", nargs="+"
    )
    data: Path | None = flag(None, "data root (default: as in stage 1)")
    seed: int | None = flag(None, "of samples and resamples (default: the first run's)")
    head: bool = flag(False, "the convolutional head, too")


# ------------------------------------------------------------------ structure: SC_GT
@torch.no_grad()
def coherence_with_truth(features, segments, seed=0):
    """SC with true segments in place of cells and of clusters, the paper's SC_GT.

    features: [C, H, W]. segments: int [H, W], 0 is void and left out. Returns {"SFC_GT", "SCS_GT",
    "SC_GT": float in [0, 1]}, NaN where fewer than two segments or eight positions are left. A
    degenerate map scores 0. Segments count by their area.
    """
    names = ("SFC_GT", "SCS_GT", "SC_GT")
    inside = segments.flatten() > 0
    values, labels = segments.flatten()[inside].unique(return_inverse=True)  # labels [n]
    n, k = len(labels), len(values)
    if n < metrics.MIN_POSITIONS or k < 2:
        return dict.fromkeys(names, math.nan)
    features = features.float()
    if metrics.is_degenerate(features):
        return dict.fromkeys(names, 0.0)
    channels = features.flatten(1)[:, inside]  # [C, n]

    norm = metrics.standardise(metrics.channel_norm(channels[:, None]))[0]  # [n]
    area = torch.bincount(labels).float()  # [k]
    means = norm @ F.one_hot(labels, k).float() / area
    within = ((norm - means[labels]).square().sum() / n).clamp_min(1e-6)
    between = (area / n * (means - norm.mean()).square()).sum()
    sfc = (between / (between + within)).item()

    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(n, generator=generator)[: metrics.MAX_POSITIONS].to(labels.device)
    positions = metrics.standardised_positions(channels[:, None])[sample]
    points = metrics.principal_components(positions, metrics.DIMENSIONS)
    labels = labels[sample]
    # Each segment keeps its share of the positions: every so many-th of them, by segment.
    count = min(metrics.SILHOUETTE_POSITIONS, len(sample))
    every = torch.linspace(0, len(sample) - 1, count).round().long()
    picks = labels.argsort(stable=True)[every.to(labels.device)]
    scs = (metrics.silhouette(points[picks], labels[picks], k) + 1) / 2
    return {"SFC_GT": sfc, "SCS_GT": scs, "SC_GT": math.sqrt(sfc * scs)}


# ------------------------------------------------------------------ sources: encoders and controls
class Source(NamedTuple):
    """What gives a map of each image."""

    folder: Path | None  # of its run; a control has none
    run_config: dict
    name: str  # of the encoder or control


def open_runs(folders):
    """The runs, {folder: content of run.json}, and the images that all of them hold.

    UserError if their images differ.
    """
    runs = {}
    for folder in folders:
        run_config, names = metrics.finished_run(folder)
        if not runs:
            first, first_folder, first_names = run_config, folder, names
            labelled = f"{folder} holds images without labels"
            require(first["benchmark"], f"{labelled}: truth needs a run made with --benchmark")
        same = names == first_names
        for key in ("benchmark", "root", "size"):
            same = same and run_config[key] == first[key]
        other = f"{folder} and {first_folder} do not hold the same images at the same size"
        require(same, other)
        require(folder not in runs, f"{folder} is given twice")
        runs[folder] = run_config
    return runs, first_names


def list_sources(runs):
    """{title: Source}, controls last."""
    sources = {}
    for folder, run_config in runs.items():
        for encoder in run_config["encoders"]:
            weights = run_config["weights"][encoder]
            title = encoder
            if weights == "none":
                title += " (random)"
            elif weights != "pretrained":
                title += f" ({Path(weights).stem})"
            require(title not in sources, f"{title} is in two of the runs")
            sources[title] = Source(folder, run_config, encoder)
    first = next(iter(runs.values()))
    for control in metrics.CONTROLS:
        sources[control] = Source(None, first, control)
    return sources


def read_map(source, names, stride, seed, i):
    """A source's map of image i: float32 [C, h, w], 0 if it is degenerate."""
    name = names[i]
    if source.folder is None:
        image = read_run_image(source.run_config, name)
        noise_seed = metrics.control_seed(seed, name, stride)
        return metrics.control_map(source.name, image, stride, noise_seed)
    native = {}
    for native_stride, features in run.read_features(source.folder, source.name, name).items():
        native[native_stride] = features[None].float()
    finest = min(native)
    size = [side * finest for side in native[finest].shape[2:]]  # the image's
    features = level(native, size, stride)[0]
    if metrics.is_degenerate(features):
        return torch.zeros_like(features)
    return features


def read_scores(sources, names):
    """{score: [source, stride, image]} out of the runs' metrics.csv.

    UserError if it is missing or of other images.
    """
    tables = {}
    for source in sources.values():
        if source.folder and source.folder not in tables:
            tables[source.folder] = read_table(source.folder)
    first = next(iter(tables))
    scores = {score: np.zeros((len(sources), len(STRIDES), len(names))) for score in SCORES}
    try:
        for i, source in enumerate(sources.values()):
            table = tables[source.folder or first]
            for j, stride in enumerate(STRIDES):
                for k, name in enumerate(names):
                    row = table[name, source.name, stride]
                    for score in SCORES:
                        scores[score][i, j, k] = float(row[score])
    except KeyError as error:
        raise UserError(f"metrics.csv lacks {error}: run 02_metrics.py again") from None
    return scores


def read_table(folder):
    """The rows of metrics.csv: {(image, source, stride): {score: text}}."""
    path = folder / "metrics.csv"
    again = f"run `{run.command('02_metrics.py', folder)}`"
    require(path.is_file(), f"{path} is missing: {again} first")
    table = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            table[row["image"], row["source"], int(row["stride"])] = row
    return table


# ------------------------------------------------------------------ truth
class Cells(NamedTuple):
    """The truth at each position of a map, [h, w] each."""

    segments: torch.Tensor  # int64, 0 void
    classes: torch.Tensor  # int64, VOID for none
    boundary: torch.Tensor  # bool: a boundary between segments runs through the cell


def true_cells(sample, size):
    """The Cells of a labelled sample on a map of `size`."""
    segments = sample["segments"]
    # bool [H, W]: is the pixel of another segment than the one below it, and beside it?
    below = F.pad(segments[:-1] != segments[1:], (0, 0, 0, 1))
    beside = F.pad(segments[:, :-1] != segments[:, 1:], (0, 1))
    boundary = F.adaptive_max_pool2d((below | beside).float()[None], size)[0] > 0
    cells = F.interpolate(segments[None, None].float(), size, mode="nearest-exact")[0, 0].long()
    classes = torch.tensor([VOID, *sample["labels"].tolist()])[cells]
    return Cells(cells, classes, boundary)


def probe(read, cells, classes, seed):
    """Fit both probes on FOLDS - 1 blocks of the images, and try them on the block left out.

    read(i): image i's map [C, h, w]. cells: the Cells of each image. classes: how many there are.
    Returns counts by image: predictions of the boundary by bin and truth, [image, BINS, 2]; and
    cells by class, all and those rightly told, [2, image, classes].
    """
    count = len(cells)
    folds = [i * metrics.FOLDS // count for i in range(count)]
    labels = torch.cat([truth.classes[truth.classes < VOID] for truth in cells])
    weight_of = 1 / torch.bincount(labels, minlength=classes).clamp_min(1).float()
    # The first map's are near enough to those of all maps for sums in float32.
    scale, shift = torch.std_mean(read(0).flatten(1), 1)  # [C]
    scale = torch.where(scale > 0, scale, 1)
    width = 1 + len(shift)

    def samples(i):
        """A constant and the channels, [n, 1+C], with boundary and class, [n] each."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(cells[i].classes.numel(), generator=generator)
        chosen = order[: metrics.MAX_POSITIONS]
        points = F.pad((read(i).flatten(1).T[chosen] - shift) / scale, (1, 0), value=1)
        return points, cells[i].boundary.flatten()[chosen], cells[i].classes.flatten()[chosen]

    # Sums of products of the points with themselves and with what they shall tell
    boundary_sums = torch.zeros(metrics.FOLDS, width, width + 1, dtype=torch.double)
    class_sums = torch.zeros(metrics.FOLDS, width, width + classes, dtype=torch.double)
    for i, fold in enumerate(folds):
        points, boundary, labels = samples(i)
        boundary_sums[fold] += points.T @ torch.cat([points, boundary[:, None].float()], 1)
        known = labels < VOID
        points, labels = points[known], labels[known]
        targets = torch.cat([points, F.one_hot(labels, classes)], 1)
        class_sums[fold] += points.T @ (targets * weight_of[labels, None])
    of_boundary = [ridge(boundary_sums.sum(0) - own) for own in boundary_sums]  # [1+C, 1]
    of_class = [ridge(class_sums.sum(0) - own) for own in class_sums]  # [1+C, classes]

    found = np.zeros((count, BINS, 2))
    told = np.zeros((2, count, classes))
    for i, fold in enumerate(folds):
        points, boundary, labels = samples(i)
        found[i] = histogram((points @ of_boundary[fold])[:, 0], boundary)
        known = labels < VOID
        right = (points @ of_class[fold]).argmax(1) == labels
        told[0, i] = torch.bincount(labels[known], minlength=classes)
        told[1, i] = torch.bincount(labels[known & right], minlength=classes)
    return found, told


def ridge(sums):
    """Weights [1+C, T] of a ridge regression to T targets, the constant first.

    sums: [1+C, 1+C+T], of products of a 1 and C features with themselves and with the targets. The
    penalty counts features as standardised.
    """
    moments = sums / sums[0, 0].clamp_min(1e-12)
    width = len(moments)
    mean, target = moments[0, 1:width], moments[0, width:]
    covariance = moments[1:, 1:width] - mean[:, None] * mean
    scale = covariance.diag().clamp_min(0).sqrt() + 1e-6
    correlation = covariance / (scale[:, None] * scale) + RIDGE * torch.eye(width - 1)
    with_targets = (moments[1:, width:] - mean[:, None] * target) / scale[:, None]
    weights = torch.linalg.solve(correlation, with_targets) / scale[:, None]
    return torch.cat([(target - mean @ weights)[None], weights]).float()


def histogram(predictions, truth):
    """Counts [BINS, 2] of predictions, about 0 to 1, by bin and truth, bool of the same shape."""
    bins = ((predictions + 0.5) * (BINS / 2)).long().clamp(0, BINS - 1)
    counts = torch.bincount(2 * bins.flatten() + truth.flatten(), minlength=2 * BINS)
    return counts.reshape(BINS, 2).numpy()


def head(read, cells, seed):
    """A small convolutional head on frozen maps, fitted on each half and tried on the other.

    Returns counts [image, BINS, 2] of its predictions of the boundary, by bin and truth.
    """
    found = np.zeros((len(cells), BINS, 2))
    channels = len(read(0))
    halves = [2 * i // len(cells) for i in range(len(cells))]
    for half in (0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.InstanceNorm2d(channels),
            nn.Conv2d(channels, HEAD_WIDTH, 1),
            # Zeros beyond the border would tell where in the image a cell is, which noise does not.
            nn.Conv2d(HEAD_WIDTH, HEAD_WIDTH, 3, padding=1, padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(HEAD_WIDTH, 1, 1),
        )
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        others = [i for i in range(len(cells)) if halves[i] != half]
        for step in range(HEAD_STEPS):
            i = others[step % len(others)]
            logits = model(read(i)[None])[0, 0]
            loss = F.binary_cross_entropy_with_logits(logits, cells[i].boundary.float())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        for i in range(len(cells)):
            if halves[i] == half:
                with torch.no_grad():
                    predicted = model(read(i)[None])[0, 0].sigmoid()
                found[i] = histogram(predicted, cells[i].boundary)
    return found


def precision_above_chance(found, weights):
    """(AP - share) / (1 - share) for each row of weights [R, image]: [R].

    found: counts of predictions [image, BINS, 2].
    """
    # The most confident predictions come first.
    counts = np.einsum("ri,ibt->rbt", weights, found)[:, ::-1].cumsum(1)
    all_found, right = counts.sum(2), counts[..., 1]
    precision = right / np.maximum(all_found, 1e-12)
    total = right[:, -1:]
    average = (np.diff(right, axis=1, prepend=0) * precision).sum(1)
    average = average / np.maximum(total[:, 0], 1e-12)
    share = total[:, 0] / all_found[:, -1]
    return (average - share) / (1 - share)


def class_accuracy(told, weights):
    """Mean accuracy over the classes that occur, for each row of weights [R, image]: [R].

    told: counts [2, image, classes].
    """
    seen, right = weights @ told[0], weights @ told[1]  # [R, classes]
    accuracy = np.where(seen > 0, right / np.where(seen > 0, seen, 1), np.nan)
    return np.nanmean(accuracy, axis=1)


def find_truths(settings, sources, names, cells, classes, weights):
    """{truth: [source, stride, R]}, for each row of weights [R, image].

    cells: {stride: the Cells of each image}. classes: how many there are.
    """
    truths = defaultdict(list)
    for title, source in sources.items():
        for stride in tqdm(STRIDES, title, unit="stride"):
            read = partial(read_map, source, names, stride, settings.seed)
            found, told = probe(read, cells[stride], classes, settings.seed)
            truths["boundary"].append(precision_above_chance(found, weights))
            truths["class"].append(class_accuracy(told, weights))
            if settings.head:
                found = head(read, cells[stride], settings.seed)
                truths["head"].append(precision_above_chance(found, weights))
            coherence = []
            for i, truth in enumerate(cells[stride]):
                scores = coherence_with_truth(read(i), truth.segments, settings.seed)
                coherence.append(scores["SC_GT"])
            known = np.isfinite(coherence)  # an image of one segment has none
            mean = weights[:, known] @ np.array(coherence)[known] / weights[:, known].sum(1)
            truths["SC_GT"].append(mean)
    shape = (len(sources), len(STRIDES), -1)
    return {name: np.array(truths[name]).reshape(shape) for name in TRUTHS if name in truths}


# ------------------------------------------------------------------ score and truth
def rank_correlation(x, y):
    """Spearman's rho of each column of x and y [points, R]: [R]."""
    x, y = stats.rankdata(x, axis=0), stats.rankdata(y, axis=0)
    x, y = x - x.mean(0), y - y.mean(0)
    return (x * y).sum(0) / np.sqrt((x**2).sum(0) * (y**2).sum(0))


def compare(scores, truths, controls):
    """Spearman's rho of each score with each truth, with the controls and without them.

    scores, truths: {name: [source, stride, R]}, the plain means first, then resamples. The last
    `controls` sources are controls. Returns rows {"score", "truth", "controls": bool, then for each
    stride, "mean of strides" and "all": {"rho", "low", "high"}}.
    """
    rows = []
    for truth, all_truths in truths.items():
        for score, all_scores in scores.items():
            for with_controls in (True, False):
                count = len(all_scores)
                if not with_controls:
                    count -= controls
                rhos = rank_correlations(all_scores[:count], all_truths[:count])
                row = {"score": score, "truth": truth, "controls": with_controls}
                for name, rho in rhos.items():
                    low, high = np.nanpercentile(rho[1:], [2.5, 97.5])
                    row[name] = {"rho": float(rho[0]), "low": float(low), "high": float(high)}
                rows.append(row)
    return rows


def rank_correlations(x, y):
    """Spearman's rho of x and y [source, stride, R]: {stride, "mean of strides", "all": [R]}."""
    rhos = {str(stride): rank_correlation(x[:, i], y[:, i]) for i, stride in enumerate(STRIDES)}
    rhos["mean of strides"] = np.mean(list(rhos.values()), axis=0)
    rhos["all"] = rank_correlation(x.reshape(-1, x.shape[2]), y.reshape(-1, y.shape[2]))
    return rhos


# ------------------------------------------------------------------ report
def draw(path, scores, truths, controls):
    """Draw scores beside truths, means.

    Each pair has a panel and each source and stride a point. Controls are grey.
    """
    figure = Figure(figsize=(2.4 * len(scores), 2.4 * len(truths)))
    axes = figure.subplots(len(truths), len(scores), squeeze=False)
    for row, (truth, y) in zip(axes, truths.items(), strict=True):
        row[0].set_ylabel(truth)
        for axis, x in zip(row, scores.values(), strict=True):
            for at, stride in enumerate(STRIDES):
                control_x, control_y = x[-controls:, at, 0], y[-controls:, at, 0]
                axis.scatter(control_x, control_y, 12, "0.6", marker="x", lw=1)
                colour, label = figures.COLOURS[at], f"OS {stride}"
                axis.scatter(
                    x[:-controls, at, 0], y[:-controls, at, 0], 16, colour, label=label, lw=0
                )
    for axis, score in zip(axes[-1], scores, strict=True):
        axis.set_xlabel(score)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="0.6", marker="x", ls=""))
    labels.append("control, any stride")
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figures.save(figure, path)


def write_means(path, sources, scores, truths):
    """Write the mean of each score and truth, a row for each source and stride."""
    columns = [*scores.values(), *truths.values()]
    with (
        run.whole_file(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["source", "stride", *scores, *truths])
        for i, title in enumerate(sources):
            for j, stride in enumerate(STRIDES):
                numbers = [f"{values[i, j, 0]:.6g}" for values in columns]
                writer.writerow([title, stride, *numbers])


def report(folder, sources, scores, truths, rows):
    """Write the CSV, the JSON and the figure, and print the correlations."""
    write_means(folder / "ground_truth.csv", sources, scores, truths)
    run.write_json(folder / "ground_truth.json", rows)
    draw(folder / "ground_truth.png", scores, truths, len(metrics.CONTROLS))
    head_row = ["truth", "score", "", *(f"OS {stride}" for stride in STRIDES)]
    table = [[*head_row, "mean of strides", "all"]]
    for row in rows:
        line = [row["truth"], row["score"], "with controls" if row["controls"] else "encoders"]
        line += [f"{row[str(stride)]['rho']:.2f}" for stride in STRIDES]
        for name in ("mean of strides", "all"):
            line.append("{rho:.2f} ({low:.2f} to {high:.2f})".format(**row[name]))
        table.append(line)
    controls = len(metrics.CONTROLS)
    print(f"\nSpearman's rho over {len(sources)} sources, {controls} of them controls")
    print(run.table(table))
    if len(sources) < 10:
        advice = "extract more encoders, see --runs"
        print(f"WARNING: {len(sources)} sources say little within a stride: {advice}")
    print(f"wrote ground_truth.csv, .json and .png in {folder}")


def main():
    settings = run.parse(__doc__, Settings)
    runs, names = open_runs(settings.runs)
    folder = settings.runs[0]
    too_few = f"{folder} has {len(names)} images: at least {metrics.FOLDS} are needed"
    require(len(names) >= metrics.FOLDS, too_few)
    run_config = runs[folder]
    if settings.seed is None:
        settings.seed = run_config["seed"]
    sources = list_sources(runs)
    weights = run.bootstrap_weights(len(names), settings.seed)  # [1 + RESAMPLES, image]
    scores = {}
    for score, values in read_scores(sources, names).items():
        scores[score] = values @ weights.T  # [source, stride, 1 + RESAMPLES]

    benchmark, data = run_config["benchmark"], settings.data or Path(run_config["data"])
    samples = open_split(benchmark, data, "train")
    place = {name: i for i, name in enumerate(samples.names)}
    cells = defaultdict(list)  # {stride: the Cells of each image}
    for name in tqdm(names, "labels", unit="image"):
        sample = samples[place[name]]
        overlap = f"{benchmark} has overlapping masks: truth needs a map of segments"
        require("segments" in sample, overlap)
        height, width = read_run_image(run_config, name).shape[1:]
        small = f"{name} is {height} x {width}: truth at OS 32 needs at least 96 pixels"
        require(min(height, width) >= 96, small)
        for stride in STRIDES:
            cells[stride].append(true_cells(sample, (height // stride, width // stride)))
    truths = find_truths(settings, sources, names, cells, len(samples.categories), weights)
    rows = compare(scores, truths, len(metrics.CONTROLS))
    report(folder, sources, scores, truths, rows)


if __name__ == "__main__":
    run.start(main)
