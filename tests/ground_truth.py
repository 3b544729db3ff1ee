"""What does a map know of true boundaries and classes, and which label-free score sees it? Run by hand.

    python tests/ground_truth.py --runs runs/toycity                   a run that 02_metrics.py has filled
    python tests/ground_truth.py --runs runs/mine runs/mine_random     several of the same pictures, seen as one
    python tests/ground_truth.py --runs runs/toycity --head            also a truth that is not linear, minutes more

Truths, for each source (encoder or control) and stride, from labels that no score has seen:

    boundary   a ridge regression from the map to "a true boundary runs through this cell", fitted on some of the
               pictures: average precision on the others, above chance, (AP - share) / (1 - share)
    head       the same of a small convolutional head in place of the regression
    class      a ridge regression to the classes, each of the same weight: mean accuracy over classes
    SC_GT      SC with true segments in place of cells and of clusters (paper, arXiv 2605.16864)

Writes into the first run folder ground_truth.csv (means by source and stride), ground_truth.png (scores beside truths)
and ground_truth.json: Spearman's rho of each score with each truth, within each stride and over all, with the controls
and without. Intervals are a bootstrap over pictures, with scores and probes as they were fitted. Pictures stream: what
grows with their number is a histogram for each map.
"""

import csv
import importlib
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from scipy import stats
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import figures, run  # noqa: E402
from common.datasets import open_split, read_run_picture  # noqa: E402
from common.encoders import STRIDES, level  # noqa: E402
from common.run import UserError, flag, need  # noqa: E402

metrics = importlib.import_module("02_metrics")

RIDGE = 0.1  # on the diagonal of correlations; a truth wants all that a map knows, of any width
BINS = 400  # of predictions from -0.5 to 1.5; the regression's target is 0 or 1
HEAD_WIDTH, HEAD_STEPS = 16, 150  # a picture a step
SCORES = ("SC", "EF", "EF_RELEASED", "ER")
TRUTHS = ("boundary", "head", "class", "SC_GT")
VOID = 65535


@dataclass
class Settings:
    runs: tuple[Path, ...] = flag((Path("runs/toycity"),), "run folders of the same pictures", nargs="+")
    data: Path | None = flag(None, "data root (default: as in stage 1)")
    seed: int | None = flag(None, "seed of sampling and bootstrap (default: the first run's)")
    head: bool = flag(False, "the convolutional head, too")


# ------------------------------------------------------------------ structure: SC_GT
@torch.no_grad()
def coherence_with_truth(features, segments, seed=0):
    """SC with true segments in place of cells and of clusters, void left out: the paper's SC_GT.

    features [B,C,H,W]; segments int [B,H,W], 0 void. Returns {"SFC_GT", "SCS_GT", "SC_GT"}, float32 [B] in [0,1], NaN
    where fewer than two segments or eight positions are left. Segments count by their area.
    """
    features, usable = metrics.without_degenerate(features)
    generator, rows = torch.Generator().manual_seed(seed), []
    for feature, segment in zip(features, segments, strict=True):
        inside = segment.flatten() > 0
        _, labels = segment.flatten()[inside].unique(return_inverse=True)  # [n]
        n, k = len(labels), int(labels.max()) + 1 if len(labels) else 0
        if n < 8 or k < 2:
            rows.append(features.new_full((2,), torch.nan))
            continue
        channels = feature.flatten(1)[:, inside]  # [C,n]
        norm = metrics.standardise(metrics.norms(channels[None, :, None]))[0, 0]  # [n]
        member = F.one_hot(labels, k).float()  # [n,k]
        area = member.sum(0)
        means = norm @ member / area
        within = ((norm - means[labels]).square().sum() / n).clamp_min(1e-6)
        between = (area / n * (means - norm.mean()).square()).sum()
        order = torch.randperm(n, generator=generator).to(labels.device)
        chosen = order[: metrics.POSITIONS]
        points = metrics.channels_standardised(channels[None, :, None])[:, chosen]
        points = metrics.principal_components(points, metrics.DIMENSIONS)
        picks = torch.linspace(0, len(chosen) - 1, min(metrics.SILHOUETTE_POSITIONS, len(chosen))).round().long()
        picks = labels[chosen].argsort(stable=True)[picks.to(labels.device)]  # stratified
        spread = metrics.silhouette(points[:, picks], labels[chosen][picks][None], k)[0]
        rows.append(torch.stack([between / (between + within), (spread + 1) / 2]))
    sfc, scs = torch.stack(rows).T
    scores = {"SFC_GT": sfc, "SCS_GT": scs, "SC_GT": (sfc * scs).sqrt()}
    return {name: torch.where(usable | score.isnan(), score, 0) for name, score in scores.items()}


# ------------------------------------------------------------------ sources: encoders and controls
def open_runs(folders):
    """The runs' contents, [(folder, run.json)], and the pictures that all of them hold; UserError if those differ."""
    found, names = zip(*(metrics.finished_run(folder) for folder in folders), strict=True)
    need(found[0]["benchmark"], f"{folders[0]} holds pictures without labels: truth needs a run made with --benchmark")
    for folder, other, its_names in zip(folders, found, names, strict=True):
        same = its_names == names[0] and all(other[key] == found[0][key] for key in ("benchmark", "root", "size"))
        need(same, f"{folder} and {folders[0]} do not hold the same pictures at the same size")
    return list(zip(folders, found, strict=True)), names[0]


def list_sources(runs):
    """{title: (folder, run.json, encoder)}, controls last, which have None for an encoder's folder."""
    sources = {}
    for folder, found in runs:
        for encoder in found["encoders"]:
            weights = {"pretrained": "", "none": " (random)"}
            title = encoder + weights.get(found["weights"][encoder], f" ({Path(found['weights'][encoder]).stem})")
            need(title not in sources, f"{title} is in two of the runs")
            sources[title] = folder, found, encoder
    return sources | {source: (None, runs[0][1], source) for source in metrics.CONTROLS}


def read_at(source, names, stride, seed, i):
    """A source's map [C,h,w] of picture i, float32; 0 if it is degenerate."""
    name = names[i]
    folder, found, encoder = source
    if folder is None:
        image = read_run_picture(found, name)[None]
        return metrics.control(encoder, image, stride, metrics.control_seed(seed, name, stride))[0]
    native = run.read_features(folder, encoder, name, run.fingerprint(Path(found["root"]) / name))
    native = {s: feature[None].float() for s, feature in native.items()}
    finest, feature = min(native.items())
    size = [side * finest for side in feature.shape[2:]]  # the picture's
    features = level(native, size, stride)
    return metrics.without_degenerate(features)[0][0]


def read_scores(sources, names):
    """{score: [source, stride, image]} out of the runs' metrics.csv; UserError if it is missing or of other images."""
    tables = {}
    for folder in dict.fromkeys(folder for folder, *_ in sources.values() if folder):
        again = f"run `{run.command('02_metrics.py', folder)}`"
        need((folder / "metrics.csv").is_file(), f"{folder / 'metrics.csv'} is missing: {again} first")
        with open(folder / "metrics.csv", newline="") as file:
            tables[folder] = {(row["image"], row["source"], int(row["stride"])): row for row in csv.DictReader(file)}
    first = next(iter(tables))
    try:
        rows = [
            [[tables[folder or first][name, encoder, stride] for name in names] for stride in STRIDES]
            for folder, _, encoder in sources.values()
        ]
        return {score: np.array([[[float(r[score]) for r in b] for b in a] for a in rows]) for score in SCORES}
    except KeyError as error:
        raise UserError(f"metrics.csv lacks {error}: run 02_metrics.py again") from None


# ------------------------------------------------------------------ truth
def true_cells(sample, size):
    """Of a labelled sample, on a map of `size`: segment int64 [h,w], 0 void; class int64 [h,w], VOID for none; and
    whether a boundary between segments runs through the cell, bool [h,w]."""
    segments = sample["segments"]
    below = F.pad(segments[:-1] != segments[1:], (0, 0, 0, 1))  # bool [H,W]: differs from the pixel below
    beside = F.pad(segments[:, :-1] != segments[:, 1:], (0, 1))
    cells = F.interpolate(segments[None, None].float(), size, mode="nearest-exact")[0, 0].long()
    classes = torch.tensor([VOID, *sample["labels"].tolist()])[cells]
    return cells, classes, F.adaptive_max_pool2d((below | beside).float()[None], size)[0] > 0


def probe(read, cells, classes, seed):
    """Fit both probes on FOLDS - 1 blocks of the pictures, and try them on the block left out.

    read(i): picture i's map [C,h,w]; cells: true_cells of each; classes: how many there are. Returns counts by picture:
    predictions of the boundary, by bin and truth, [image,BINS,2]; and cells by class, all and rightly told,
    [2,image,classes].
    """
    count = len(cells)
    folds = [i * metrics.FOLDS // count for i in range(count)]
    weight_of = torch.bincount(torch.cat([labels[labels < VOID] for _, labels, _ in cells]), minlength=classes)
    weight_of = 1 / weight_of.clamp_min(1).float()
    scale, shift = torch.std_mean(read(0).flatten(1), 1)  # near enough to all for sums in float32
    scale = torch.where(scale > 0, scale, 1)

    def samples(i):
        _, labels, boundary = cells[i]
        chosen = torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(seed))[: metrics.POSITIONS]
        points = (read(i).flatten(1).T[chosen] - shift) / scale
        return F.pad(points, (1, 0), value=1), boundary.flatten()[chosen], labels.flatten()[chosen]  # [n,1+C], [n], [n]

    moments = torch.zeros(2, metrics.FOLDS, 1 + len(shift), 1 + len(shift) + classes, dtype=torch.double)
    for i, fold in enumerate(folds):
        points, boundary, labels = samples(i)
        moments[0, fold, :, : len(shift) + 2] += points.T @ torch.cat([points, boundary[:, None].float()], 1)
        known = labels < VOID
        points, labels = points[known], labels[known]
        targets = torch.cat([points, F.one_hot(labels, classes)], 1)
        moments[1, fold] += points.T @ (targets * weight_of[labels, None])
    others = moments.sum(1, keepdim=True) - moments
    of_boundary = [ridge(moment[:, : len(shift) + 2]) for moment in others[0]]  # [1+C,1] each
    of_class = [ridge(moment) for moment in others[1]]  # [1+C,classes]

    found, told = np.zeros((count, BINS, 2)), np.zeros((2, count, classes))
    for i, fold in enumerate(folds):
        points, boundary, labels = samples(i)
        found[i] = histogram((points @ of_boundary[fold])[:, 0], boundary)
        known = labels < VOID
        right = (points @ of_class[fold]).argmax(1) == labels
        told[0, i] = torch.bincount(labels[known], minlength=classes)
        told[1, i] = torch.bincount(labels[known & right], minlength=classes)
    return found, told


def ridge(moments):
    """Weights [1+C,T], the constant first, from sums [1+C,1+C+T] of products of a 1 and features with themselves and
    targets. Features count as standardised."""
    moments = moments / moments[0, 0].clamp_min(1e-12)
    width = len(moments)
    mean, target = moments[0, 1:width], moments[0, width:]
    covariance = moments[1:, 1:width] - mean[:, None] * mean
    scale = covariance.diag().clamp_min(0).sqrt() + 1e-6
    correlation = covariance / (scale[:, None] * scale) + RIDGE * torch.eye(width - 1)
    weights = torch.linalg.solve(correlation, (moments[1:, width:] - mean[:, None] * target) / scale[:, None])
    weights = weights / scale[:, None]
    return torch.cat([(target - mean @ weights)[None], weights]).float()


def histogram(predictions, truth):
    """Counts [BINS,2] of predictions, about 0 to 1, by bin and truth, bool of the same shape."""
    bins = ((predictions + 0.5) * (BINS / 2)).long().clamp(0, BINS - 1)
    return torch.bincount(2 * bins.flatten() + truth.flatten(), minlength=2 * BINS).reshape(BINS, 2).numpy()


def head(read, cells, seed):
    """A small convolutional head on frozen maps, fitted on one half of the pictures and tried on the other: counts
    [image,BINS,2] of its predictions of the boundary, by bin and truth."""
    found, channels = np.zeros((len(cells), BINS, 2)), len(read(0))
    halves = [2 * i // len(cells) for i in range(len(cells))]
    for half in (0, 1):
        torch.manual_seed(seed)
        layers = [nn.InstanceNorm2d(channels), nn.Conv2d(channels, HEAD_WIDTH, 1)]
        # Zeros beyond the border would tell a head where in the picture it is, of which noise knows nothing.
        layers += [nn.Conv2d(HEAD_WIDTH, HEAD_WIDTH, 3, padding=1, padding_mode="reflect")]
        layers += [nn.ReLU(), nn.Conv2d(HEAD_WIDTH, 1, 1)]
        model = nn.Sequential(*layers)
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        others = [i for i in range(len(cells)) if halves[i] != half]
        for step in range(HEAD_STEPS):
            i = others[step % len(others)]
            logits = model(read(i)[None])[0, 0]
            loss = F.binary_cross_entropy_with_logits(logits, cells[i][2].float())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            for i in (i for i in range(len(cells)) if halves[i] == half):
                found[i] = histogram(model(read(i)[None])[0, 0].sigmoid(), cells[i][2])
    return found


def precision_above_chance(found, weights):
    """(AP - share) / (1 - share) of predictions [image,BINS,2] for each row of weights [R,image]: [R]."""
    counts = np.einsum("ri,ibt->rbt", weights, found)[:, ::-1].cumsum(1)  # the surest first
    all_found, right = counts.sum(2), counts[..., 1]
    precision = right / np.maximum(all_found, 1e-12)
    total = right[:, -1:]
    average = (np.diff(right, axis=1, prepend=0) * precision).sum(1) / np.maximum(total[:, 0], 1e-12)
    share = total[:, 0] / all_found[:, -1]
    return (average - share) / (1 - share)


def class_accuracy(told, weights):
    """Mean accuracy over the classes that occur, from counts [2,image,classes], for each row of weights: [R]."""
    seen, right = weights @ told[0], weights @ told[1]  # [R,classes]
    return np.nanmean(np.where(seen > 0, right / np.where(seen > 0, seen, 1), np.nan), axis=1)


def find_truths(settings, sources, names, cells, classes, weights):
    """{truth: [source, stride, R]}, for each row of weights [R, image]."""
    truths = defaultdict(list)
    for title, source in sources.items():
        for stride in tqdm(STRIDES, title, unit="stride"):
            read, at = partial(read_at, source, names, stride, settings.seed), cells[stride]
            found, told = probe(read, at, classes, settings.seed)
            truths["boundary"].append(precision_above_chance(found, weights))
            truths["class"].append(class_accuracy(told, weights))
            if settings.head:
                truths["head"].append(precision_above_chance(head(read, at, settings.seed), weights))
            coherence = [
                coherence_with_truth(read(i)[None], segments[None], settings.seed)["SC_GT"].item()
                for i, (segments, *_) in enumerate(at)
            ]
            known = np.isfinite(coherence)  # a picture of one segment has none
            truths["SC_GT"].append(weights[:, known] @ np.array(coherence)[known] / weights[:, known].sum(1))
    return {name: np.array(truths[name]).reshape(len(sources), len(STRIDES), -1) for name in TRUTHS if name in truths}


# ------------------------------------------------------------------ score and truth
def rank_correlation(x, y):
    """Spearman's rho of each column of x and y [points, R]: [R]."""
    x, y = (stats.rankdata(values, axis=0) for values in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return (x * y).sum(0) / np.sqrt((x**2).sum(0) * (y**2).sum(0))


def compare(scores, truths, controls):
    """[{"score", "truth", "controls", "within": {stride: rho}, "all": rho}], each rho {"rho", "low", "high"}.

    scores, truths: {name: [source, stride, R]}, the plain means first, then resamples; the last `controls` are such.
    """
    rows = []
    for truth, score, with_controls in product(truths, scores, (True, False)):
        x, y = (a[: None if with_controls else -controls] for a in (scores[score], truths[truth]))
        rhos = {str(stride): rank_correlation(x[:, i], y[:, i]) for i, stride in enumerate(STRIDES)}
        rhos["mean of strides"] = np.mean(list(rhos.values()), axis=0)
        rhos["all"] = rank_correlation(x.reshape(-1, x.shape[2]), y.reshape(-1, y.shape[2]))
        row = {"score": score, "truth": truth, "controls": with_controls}
        for name, rho in rhos.items():
            low, high = np.nanpercentile(rho[1:], [2.5, 97.5])
            row[name] = {"rho": float(rho[0]), "low": float(low), "high": float(high)}
        rows.append(row)
    return rows


def draw(path, scores, truths, controls):
    """Scores beside truths, means: a panel for each pair, a point for each source and stride, controls in grey."""
    rows, columns = len(truths), len(scores)
    figure, axes = plt.subplots(rows, columns, figsize=(2.4 * columns, 2.4 * rows), squeeze=False)
    for (i, (truth, y)), (j, (score, x)) in product(enumerate(truths.items()), enumerate(scores.items())):
        axis = axes[i, j]
        for at, (stride, colour) in enumerate(zip(STRIDES, figures.COLOURS, strict=False)):
            axis.scatter(x[-controls:, at, 0], y[-controls:, at, 0], 12, "0.6", marker="x", lw=1)
            axis.scatter(x[:-controls, at, 0], y[:-controls, at, 0], 16, colour, label=f"OS {stride}", lw=0)
        axis.set_xlabel(score if i == rows - 1 else "")
        axis.set_ylabel(truth if j == 0 else "")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color="0.6", marker="x", ls=""))
    figure.legend(handles, [*labels, "control, any stride"], loc="outside lower center", ncols=5)
    figures.save(figure, path)


def report(folder, sources, scores, truths, rows):
    """Write the CSV, the JSON and the figure; print the correlations."""
    with run.whole_file(folder / "ground_truth.csv") as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["source", "stride", *scores, *truths])
        for (i, title), (j, stride) in product(enumerate(sources), enumerate(STRIDES)):
            numbers = (f"{a[i, j, 0]:.6g}" for a in (*scores.values(), *truths.values()))
            table.writerow([title, stride, *numbers])
    run.write_json(folder / "ground_truth.json", rows)
    draw(folder / "ground_truth.png", scores, truths, len(metrics.CONTROLS))
    table = [["truth", "score", "", *(f"OS {stride}" for stride in STRIDES), "mean of strides", "all"]]
    for row in rows:
        rhos = [f"{row[str(stride)]['rho']:.2f}" for stride in STRIDES]
        rhos += ["{rho:.2f} ({low:.2f} to {high:.2f})".format(**row[name]) for name in ("mean of strides", "all")]
        table.append([row["truth"], row["score"], "with controls" if row["controls"] else "encoders", *rhos])
    print(f"\nSpearman's rho over {len(sources)} sources, {len(metrics.CONTROLS)} of them controls\n{run.table(table)}")
    if len(sources) < 10:
        print(f"WARNING: {len(sources)} sources say little within a stride: extract more encoders, see --runs")
    print(f"wrote ground_truth.csv, .json and .png in {folder}")


def main():
    settings = run.parse(__doc__, Settings)
    runs, names = open_runs(settings.runs)
    need(len(names) >= metrics.FOLDS, f"{settings.runs[0]} has {len(names)} pictures: at least {metrics.FOLDS}, please")
    found = runs[0][1]
    settings.seed = found["seed"] if settings.seed is None else settings.seed
    sources = list_sources(runs)
    weights = run.bootstrap(len(names), settings.seed)  # [1 + RESAMPLES, image]
    scores = {score: values @ weights.T for score, values in read_scores(sources, names).items()}

    samples = open_split(found["benchmark"], settings.data or Path(found["data"]), "train")
    place, cells = {name: i for i, name in enumerate(samples.names)}, defaultdict(list)
    for name in tqdm(names, "labels", unit="image"):
        sample = samples[place[name]]
        need("segments" in sample, f"{found['benchmark']} has overlapping masks: truth wants one of segments")
        height, width = read_run_picture(found, name).shape[1:]
        need(min(height, width) >= 96, f"{name} is {height} x {width}: truth at OS 32 wants 96 pixels or more")
        for stride in STRIDES:
            cells[stride].append(true_cells(sample, (height // stride, width // stride)))
    truths = find_truths(settings, sources, names, cells, len(samples.categories), weights)
    rows = compare(scores, truths, len(metrics.CONTROLS))
    report(settings.runs[0], sources, scores, truths, rows)


if __name__ == "__main__":
    run.start(main)
