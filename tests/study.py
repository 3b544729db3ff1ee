"""Does fusion help, and does a score name the stride where it helps most?

    python tests/study.py --run runs/toycity            what 03_select.py chose, in 24 trainings
    python tests/study.py --run runs/toycity --report   what is there so far, no training
    python tests/study.py --run runs/toycity --seeds 0 1 -- --steps 400

It trains every way, for hours. What follows -- goes on to 04_train.py.

Protocol, fixed before the first training. With the master, the auxiliary and the stride s* of the
run's selection:

    alone          the master without an auxiliary
    auxiliary      the auxiliary without a master, finetuned
    os4 ... os32   fused at that stride, the auxiliary frozen
    turned         with swapped roles, fused at s*
    tuned          fused at s*, the auxiliary finetuned too

Each is trained with the same recipe and the same seeds, --jobs trainings at a time with a thread
each, and evaluated on all validation images. Compared is seed by seed, as the seed decides order
and crops of the images. Intervals are 95 % of Student's t over seeds. A class is thin if over a
third of its pixels lie within 3 of its edge.

A finished training is kept, so the same command goes on. Each adds a line to study.csv. At the end
study.md and study.png are written. All are in the folder of the trainings (default: the run's name
and _study).
"""

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import figures, run  # noqa: E402
from common.datasets import open_split  # noqa: E402
from common.encoders import STRIDES  # noqa: E402
from common.run import flag, natural, positive, require  # noqa: E402

SCRIPTS = Path(__file__).parents[1]
WAYS = ("alone", "auxiliary", *(f"os{stride}" for stride in STRIDES), "turned", "tuned")
THIN = 3  # pixels from the edge


@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder, with a selection")
    out: Path | None = flag(None, "folder of the trainings")
    seeds: tuple[int, ...] = flag((0, 1, 2), nargs="+", type=natural)
    jobs: int = flag(2, "trainings at a time, a thread each", type=positive)
    report: bool = flag(False, "no training")


# ------------------------------------------------------------------ trainings
def flags_of(way, selection):
    """The flags that make 04_train.py train this way."""
    master = selection["master"]
    auxiliary = selection["auxiliary"]
    stride = selection["stride"]
    if way == "alone":
        return ["--fusion", "none"]
    if way == "auxiliary":
        return ["--fusion", "none", "--master", auxiliary]
    if way == "turned":
        return ["--master", auxiliary, "--auxiliary", master, "--stride", stride]
    if way == "tuned":
        return ["--stride", stride, "--aux-mode", "finetuned"]
    return ["--stride", way.removeprefix("os")]


def train(settings, selection, way, seed, more):
    """Train and evaluate one way in a folder of its own: {score: value}.

    The IoU of each class is among the scores, as "IoU of NAME". A training whose results are there
    is not repeated. UserError with the last line that a stage printed if it failed.
    """
    folder = settings.out / f"{way}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "results.json").is_file():
        training = ["--run", settings.run, "--out", folder, "--seed", seed, "--workers", 1]
        training += [*flags_of(way, selection), *more]
        run_stage(f"{way}, seed {seed}", "04_train.py", training)
        run_stage(f"{way}, seed {seed}", "05_eval.py", ["--run", folder, "--workers", 1])
    results = run.read_stage(folder, "results.json", "05_eval.py")
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # many, and large
    scores = dict(results["scores"])
    for name, value in results["per_class"].get("mIoU", {}).items():
        scores[f"IoU of {name}"] = value
    return {name: value for name, value in scores.items() if value is not None}


def run_stage(what, script, flags):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    words = [sys.executable, str(SCRIPTS / script), *map(str, flags)]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True)
    lines = ["nothing", *(ended.stdout + ended.stderr).strip().splitlines()]
    require(ended.returncode == 0, f"{what}, {script}: {lines[-1]}")


def read_table(path):
    """{(way, seed): {score: value}} of study.csv, which is empty if there is none."""
    table = {}
    if not path.is_file():
        return table
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            key = (row.pop("way"), int(row.pop("seed")))
            table[key] = {name: float(value) for name, value in row.items() if value}
    return table


def write_table(path, table):
    names = {}  # in order, and each only once
    for scores in table.values():
        names.update(dict.fromkeys(scores))
    with run.whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, ["way", "seed", *names])
        writer.writeheader()
        for way in WAYS:
            for seed in sorted(seed for each_way, seed in table if each_way == way):
                writer.writerow({"way": way, "seed": seed, **table[way, seed]})


# ------------------------------------------------------------------ what comes out
class Difference(NamedTuple):
    mean: float  # over seeds, NaN if there is none
    interval: float  # half of the 95 % interval, NaN for one seed
    seeds: list[int]

    def __str__(self):
        return f"{self.mean:+.1f} ± {run.number(self.interval)}"


def difference(table, way, other, score):
    """The Difference of way - other in a score, over the seeds that both have."""
    seeds = []
    for each_way, seed in table:
        in_other = score in table.get((other, seed), {})
        if each_way == way and score in table[way, seed] and in_other:
            seeds.append(seed)
    gains = np.array([table[way, seed][score] - table[other, seed][score] for seed in seeds])
    if len(gains) == 0:
        return Difference(np.nan, np.nan, seeds)
    if len(gains) == 1:
        return Difference(gains[0], np.nan, seeds)
    quantile = stats.t.ppf(0.975, len(gains) - 1)
    return Difference(gains.mean(), quantile * gains.std(ddof=1) / len(gains) ** 0.5, seeds)


def gains_table(table, names):
    """Each way's mean and standard deviation over seeds, then its gain over the master alone."""
    rows = [["", "seeds", *names, *(f"{name} gained" for name in names)]]
    for way in WAYS:
        of_way = [scores for (each_way, _), scores in table.items() if each_way == way]
        if not of_way:
            continue
        row = [way, str(len(of_way))]
        for name in names:
            values = [scores[name] for scores in of_way]
            deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
            row.append(f"{np.mean(values):.1f} ± {run.number(deviation)}")
        for name in names:
            row.append("" if way == "alone" else str(difference(table, way, "alone", name)))
        rows.append(row)
    return run.table(rows)


def profile_of(metrics, encoder, score):
    """The means of a score of an encoder by stride: float [strides], NaN where there is none."""
    at_stride = metrics["scores"][encoder]
    return np.array([at_stride[str(stride)][score]["mean"] for stride in STRIDES], float)


def peaks(table, metrics, selection, score):
    """The stride where the gain peaks, and where each label-free score of the auxiliary does.

    Beside that, Spearman's rho of each score with the gain by stride.
    """
    gains = [difference(table, f"os{stride}", "alone", score).mean for stride in STRIDES]
    if not np.isfinite(gains).all():
        return "some strides are not trained yet\n"
    profiles = {}
    for name in ("EF", "EF_RELEASED", "ER"):
        profiles[name] = profile_of(metrics, selection["auxiliary"], name)
    if np.isfinite(profiles["ER"]).all():
        of_master = profile_of(metrics, selection["master"], "ER")
        profiles["ER, lead over the master's"] = profiles["ER"] - of_master
    else:  # There are too few images for it.
        del profiles["ER"]

    rows = [["", *(f"OS {stride}" for stride in STRIDES), "peak", "rho with the gain"]]
    best = f"OS {STRIDES[np.argmax(gains)]}"
    rows.append([f"{score} gained", *(f"{gain:+.1f}" for gain in gains), best, ""])
    for name, profile in profiles.items():
        rho = np.nan
        if np.ptp(gains) and np.ptp(profile):
            rho = stats.spearmanr(profile, gains).statistic
        peak = f"OS {STRIDES[np.argmax(profile)]}"
        rows.append([name, *(f"{value:.2f}" for value in profile), peak, run.number(rho, 2)])
    return run.table(rows)


def thin_share(samples):
    """{class: share of its pixels that lie within THIN of its edge}, over a validation split."""
    pixels = np.zeros(len(samples.categories))
    near_edge = np.zeros(len(samples.categories))
    for sample in samples:
        classes = sample["truth"]["mIoU"]["target"]  # uint8 [H, W]
        for label in classes.unique().tolist():
            if label == 255:  # void
                continue
            mask = (classes == label).float()[None]  # [1, H, W]
            inside = 1 - F.max_pool2d(1 - mask, 2 * THIN + 1, 1, THIN)
            pixels[label] += mask.sum().item()
            near_edge[label] += (mask - inside).sum().item()
    shares = {}
    for label, category in enumerate(samples.categories):
        if pixels[label]:
            shares[category.name] = near_edge[label] / pixels[label]
    return shares


def kinds_of_classes(samples):
    """{kind: names of its classes}, without kinds that have none."""
    kinds = {"things": [], "stuff": [], "thin": [], "large": []}
    shares = thin_share(samples)
    for category in samples.categories:
        if category.name in shares:
            kinds["things" if category.isthing else "stuff"].append(category.name)
            kinds["thin" if shares[category.name] > 1 / 3 else "large"].append(category.name)
    return {kind: names for kind, names in kinds.items() if names}


def where_gains_fall(table, way, samples):
    """The gain of a way over the master alone, in IoU, of kinds of classes and near edges."""
    kinds = kinds_of_classes(samples)
    with_kinds = {}
    for key, scores in table.items():
        scores = dict(scores)
        for kind, names in kinds.items():
            if all(f"IoU of {name}" in scores for name in names):
                scores[kind] = np.mean([scores[f"IoU of {name}"] for name in names])
        with_kinds[key] = scores
    rows = [["IoU gained", "classes", "mean"]]
    for kind in ("mIoU", "boundary_mIoU", *kinds):
        gain = difference(with_kinds, way, "alone", kind)
        rows.append([kind, ", ".join(kinds.get(kind, ())), str(gain)])
    return run.table(rows)


# ------------------------------------------------------------------ figure
def draw(path, table, metrics, selection, score):
    """Draw the score of each way on the left, a point a seed.

    On the right is the gain by stride, beside the scores of the auxiliary.
    """
    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2)
    draw_ways(left, table, score)
    other = right.twinx()
    draw_gains(right, table, score)
    draw_scores(other, metrics, selection)
    right.set_xticks(range(len(STRIDES)), STRIDES)
    right.set_xlabel("output stride of the auxiliary's map")
    handles = []
    for axis in (right, other):
        handles += axis.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figures.save(figure, path)


def draw_ways(axis, table, score):
    for place, way in enumerate(WAYS):
        values = [scores[score] for (each_way, _), scores in table.items() if each_way == way]
        if not values:
            continue
        colour = figures.COLOURS[0] if way.startswith("os") else figures.COLOURS[1]
        axis.scatter([place] * len(values), values, 18, colour, zorder=2)
        axis.plot([place - 0.3, place + 0.3], [np.mean(values)] * 2, color="0.3", lw=1.2)
    axis.set_xticks(range(len(WAYS)), WAYS, rotation=45, ha="right")
    axis.set_ylabel(score)


def draw_gains(axis, table, score):
    gains = [difference(table, f"os{stride}", "alone", score) for stride in STRIDES]
    axis.errorbar(
        range(len(STRIDES)),
        [gain.mean for gain in gains],
        [gain.interval for gain in gains],
        color="0.2",
        fmt="o-",
        capsize=3,
        label=f"{score} gained",
    )
    axis.axhline(0, color="0.7", lw=0.8, zorder=0)
    axis.set_ylabel(f"{score} gained over the master alone")


def draw_scores(axis, metrics, selection):
    for number, name in enumerate(("EF", "EF_RELEASED", "ER")):
        profile = profile_of(metrics, selection["auxiliary"], name)
        colour = figures.COLOURS[number]
        label = f"{name}, of its peak"
        axis.plot(range(len(STRIDES)), profile / profile.max(), "--", color=colour, label=label)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("score of the auxiliary, of its peak")


# ------------------------------------------------------------------ report
def report(settings, selection, table, samples):
    """Write study.md, which is printed as well, and study.png."""
    metrics = run.read_stage(settings.run, "metrics.json", "02_metrics.py")
    names = []
    for name in ("mIoU", "boundary_mIoU", "AP", "PQ"):
        if all(name in scores for scores in table.values()):
            names.append(name)
    fused = f"os{selection['stride']}"
    text = f"{settings.run.resolve().name}: master {selection['master']}, "
    text += f"auxiliary {selection['auxiliary']}, s* OS {selection['stride']}; percent\n\n"
    text += f"{gains_table(table, names)}\n"
    for other in ("alone", "auxiliary"):
        gain = difference(table, fused, other, names[0])
        text += f"fused at s* over {other}: {names[0]} {gain}, seeds {gain.seeds}\n"
    text += f"\n{peaks(table, metrics, selection, names[0])}"
    text += "chance names the best of four strides one time in four\n"
    if "mIoU" in names:
        text += f"\nfused at s* over alone\n{where_gains_fall(table, fused, samples)}"
    run.write_text(settings.out / "study.md", text)
    draw(settings.out / "study.png", table, metrics, selection, names[0])
    print(f"\n{text}\nwrote study.csv, study.md, study.png in {settings.out}")


def check_protocol(settings, selection, more):
    """Remember what is studied in study.json. UserError if the folder has another study."""
    path = settings.out / "study.json"
    protocol = {part: selection[part] for part in ("master", "auxiliary", "stride")}
    protocol["flags"] = more
    if not settings.report and not path.is_file():
        run.write_json(path, protocol)
        return
    before = run.read_stage(settings.out, "study.json", "tests/study.py")
    if settings.report:
        protocol["flags"] = before["flags"]
    run.refuse_other_settings(settings.out, before, protocol, "give another --out")


def main():
    # What follows -- is not ours.
    more = []
    if "--" in sys.argv:
        place = sys.argv.index("--")
        more = sys.argv[place + 1 :]
        sys.argv = sys.argv[:place]
    settings = run.parse(__doc__, Settings)
    folder = settings.run.resolve()
    settings.out = settings.out or folder.with_name(f"{folder.name}_study")
    selection = run.read_stage(settings.run, "selection.json", "03_select.py")
    run_config = run.read_stage(settings.run, "run.json", "01_extract.py")
    check_protocol(settings, selection, more)
    path = settings.out / "study.csv"
    table = read_table(path)
    jobs = []
    if not settings.report:
        for seed in settings.seeds:
            jobs += [(way, seed) for way in WAYS if (way, seed) not in table]

    def train_job(job):
        way, seed = job
        return train(settings, selection, way, seed, more)

    torch.set_num_threads(1)
    with ThreadPoolExecutor(settings.jobs) as pool:
        for job, scores in zip(jobs, pool.map(train_job, jobs), strict=True):
            table[job] = scores
            write_table(path, table)
            first_scores = [f"{name} {value:.1f}" for name, value in list(scores.items())[:3]]
            print(*job, *first_scores)
    require(table, f"{path} is not there: nothing to report")
    samples = open_split(run_config["benchmark"], Path(run_config["data"]), "val")
    report(settings, selection, table, samples)


if __name__ == "__main__":
    run.start(main)
