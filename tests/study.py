"""Does fusion help, and does a score name the stride where it helps most? Trains every way; run by hand, for hours.

    python tests/study.py --run runs/toycity                            what 03_select.py chose there, in 24 trainings
    python tests/study.py --run runs/toycity --seeds 0 1 -- --steps 400       what follows -- goes on to 04_train.py
    python tests/study.py --run runs/toycity --report                   what is there so far, no training

Protocol, fixed before the first training. With the master, the auxiliary and the stride s* of the run's selection:

    alone          the master without an auxiliary              turned    roles turned round, fused at s*
    auxiliary      the auxiliary without a master, fine-tuned   tuned     fused at s*, the auxiliary fine-tuned too
    os4 … os32     fused at that stride, the auxiliary frozen

Each is trained with the same recipe and the same seeds, --jobs trainings at a time with a thread each, and evaluated on
all validation images. Compared is seed by seed, as the seed decides order and crops of the pictures; intervals are 95 %
of Student's t over seeds. A class is thin if over a third of its pixels lie within 3 of its edge. A training that is
there is kept: the same command goes on, adds a line for each to study.csv and ends with study.md and study.png, all in
the folder of the trainings (default: the run's name and _study).
"""

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import figures, run  # noqa: E402
from common.datasets import open_split  # noqa: E402
from common.encoders import STRIDES  # noqa: E402
from common.run import flag, natural, need, positive  # noqa: E402

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
    """What tells 04_train.py to train this way."""
    master, auxiliary, peak = (selection[part] for part in ("master", "auxiliary", "stride"))
    if way == "auxiliary":
        return ["--fusion", "none", "--master", auxiliary, "--auxiliary", master]
    if way == "turned":
        return ["--master", auxiliary, "--auxiliary", master, "--stride", peak]
    if way.startswith("os"):
        return ["--stride", way.removeprefix("os")]
    return {"alone": ["--fusion", "none"], "tuned": ["--stride", peak, "--aux-mode", "ft"]}[way]


def train(settings, selection, way, seed, more):
    """Train and evaluate one way in a folder of its own: {score: value}, and {"IoU of NAME": value} for classes.

    A training whose results are there is not repeated. UserError with the last line of what a stage said if it failed.
    """
    folder = settings.out / f"{way}_{seed}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    training = ["--run", settings.run, "--out", folder, "--seed", seed, "--workers", 1]
    training += [*flags_of(way, selection), *more]
    stages = (("04_train.py", training), ("05_eval.py", ["--run", folder, "--workers", 1]))
    for script, flags in () if (folder / "results.json").is_file() else stages:
        words = [sys.executable, str(SCRIPTS / script), *map(str, flags)]
        ended = subprocess.run(words, env=environment, capture_output=True, text=True)
        said = ["nothing", *(ended.stdout + ended.stderr).strip().splitlines()]
        need(not ended.returncode, f"{way}, seed {seed}, {script}: {said[-1]}")
    results = run.read_stage(folder, "results.json", "05_eval.py")
    (entry,) = results["benchmarks"].values()
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # many, and large
    classes = entry.get("semantic", {}).get("per_class", {})
    scores = entry["scores"] | {f"IoU of {name}": value for name, value in classes.items()}
    return {name: value for name, value in scores.items() if value is not None}


def read_table(path):
    """{(way, seed): {score: value}} of study.csv; empty if there is none."""
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    return {(row.pop("way"), int(row.pop("seed"))): {k: float(v) for k, v in row.items()} for row in rows}


def write_table(path, table):
    names = list(dict.fromkeys(name for scores in table.values() for name in scores))
    with run.whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, ["way", "seed", *names])
        writer.writeheader()
        for (way, seed), scores in sorted(table.items(), key=lambda item: (WAYS.index(item[0][0]), item[0][1])):
            writer.writerow({"way": way, "seed": seed} | scores)


# ------------------------------------------------------------------ what comes out
def difference(table, way, other, score):
    """Mean of way - other over the seeds that both have, half of its 95 % interval (NaN for one seed), the seeds."""
    seeds = [s for w, s in table if w == way and score in table[w, s] and score in table.get((other, s), {})]
    gains = np.array([table[way, s][score] - table[other, s][score] for s in seeds])
    if len(gains) < 2:
        return gains.mean() if len(gains) else np.nan, np.nan, seeds
    return gains.mean(), stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5, seeds


def give_or_take(gain, half):
    """For tables; one seed has no interval."""
    return f"{gain:+.1f} ± {run.number(half)}"


def gains_table(table, names):
    """Each way's mean and standard deviation over seeds, then its gain over the master alone."""
    rows = [["", "seeds", *names, *(f"{name} gained" for name in names)]]
    for way in WAYS:
        of_way = [scores for (w, _), scores in table.items() if w == way]
        if not of_way:
            continue
        values = ([scores[name] for scores in of_way] for name in names)
        means = [f"{np.mean(v):.1f} ± {run.number(np.std(v, ddof=1) if len(v) > 1 else np.nan)}" for v in values]
        found = [difference(table, way, "alone", name)[:2] for name in names]
        gains = ["" if way == "alone" else give_or_take(*pair) for pair in found]
        rows.append([way, str(len(of_way)), *means, *gains])
    return run.table(rows)


def peaks(table, metrics, selection, score):
    """Of each label-free score of the auxiliary: where it peaks, and Spearman's rho with the gain by stride."""
    gains = [difference(table, f"os{stride}", "alone", score)[0] for stride in STRIDES]
    own, master = (metrics["scores"][selection[part]] for part in ("auxiliary", "master"))
    if not np.isfinite(gains).all():
        return "some strides are not trained yet\n"
    profiles = {name: [own[str(s)][name]["mean"] for s in STRIDES] for name in ("EF", "EF_RELEASED", "ER")}
    if None in profiles["ER"]:  # of too few pictures
        del profiles["ER"]
    else:
        others = [master[str(s)]["ER"]["mean"] for s in STRIDES]
        profiles["ER, lead over the master's"] = np.subtract(profiles["ER"], others).tolist()
    rows = [["", *(f"OS {stride}" for stride in STRIDES), "peak", "rho with the gain"]]
    rows.append([f"{score} gained", *(f"{gain:+.1f}" for gain in gains), f"OS {STRIDES[np.argmax(gains)]}", ""])
    for name, profile in profiles.items():
        rho = stats.spearmanr(profile, gains).statistic if np.ptp(gains) and np.ptp(profile) else np.nan
        rows.append([name, *(f"{v:.2f}" for v in profile), f"OS {STRIDES[np.argmax(profile)]}", run.number(rho, 2)])
    return run.table(rows)


def thin_share(samples):
    """{class: share of its pixels that lie within THIN of its edge}, over a validation split."""
    near, pixels = np.zeros((2, len(samples.categories)))
    for sample in samples:
        (classes,) = sample["truth"]["semantic"]  # [H,W]
        for label in classes.unique().tolist():
            if label < len(pixels):
                mask = (classes == label).float()[None]
                inside = 1 - F.max_pool2d(1 - mask, 2 * THIN + 1, 1, THIN)
                pixels[label] += mask.sum().item()
                near[label] += (mask - inside).sum().item()
    return {c.name: near[i] / pixels[i] for i, c in enumerate(samples.categories) if pixels[i]}


def where_gains_fall(table, way, samples):
    """The gain of a way over the master alone, in IoU: of things and stuff, thin and large classes, edges and all."""
    thin, things = thin_share(samples), {c.name: c.isthing for c in samples.categories}
    kinds = {"things": [name for name in thin if things[name]], "stuff": [name for name in thin if not things[name]]}
    kinds |= {"thin": [name for name in thin if thin[name] > 1 / 3], "large": [n for n in thin if thin[n] <= 1 / 3]}
    kinds = {kind: names for kind, names in kinds.items() if names}  # labels without instances are all stuff
    for scores in table.values():  # of each kind the mean over its classes
        for kind, names in kinds.items():
            if all(f"IoU of {name}" in scores for name in names):
                scores[kind] = np.mean([scores[f"IoU of {name}"] for name in names])
    rows = [["IoU gained", "classes", "mean"]]
    for kind in ("mIoU", "boundary_mIoU", *kinds):
        gain, half, _ = difference(table, way, "alone", kind)
        rows.append([kind, ", ".join(kinds.get(kind, ())), give_or_take(gain, half)])
    return run.table(rows)


def draw(path, table, metrics, selection, score):
    """Left the score of each way, a point a seed; right the gain by stride beside the auxiliary's EF and ER."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for i, way in enumerate(WAYS):
        values = [scores[score] for (w, _), scores in table.items() if w == way]
        left.scatter([i] * len(values), values, 18, figures.COLOURS[0 if way.startswith("os") else 1], zorder=2)
        left.plot([i - 0.3, i + 0.3], [np.mean(values)] * 2 if values else [np.nan] * 2, color="0.3", lw=1.2)
    left.set_xticks(range(len(WAYS)), WAYS, rotation=45, ha="right")
    left.set_ylabel(score)
    gains = np.array([difference(table, f"os{stride}", "alone", score)[:2] for stride in STRIDES])
    right.errorbar(range(4), gains[:, 0], gains[:, 1], color="0.2", fmt="o-", capsize=3, label=f"{score} gained")
    right.axhline(0, color="0.7", lw=0.8, zorder=0)
    right.set_ylabel(f"{score} gained over the master alone")
    own, other = metrics["scores"][selection["auxiliary"]], right.twinx()
    for colour, name in zip(figures.COLOURS, ("EF", "EF_RELEASED", "ER"), strict=False):
        profile = np.array([own[str(s)][name]["mean"] for s in STRIDES], float)
        other.plot(range(4), profile / profile.max(), "--", color=colour, label=f"{name}, of its peak")
    other.set_ylim(0, 1.05)
    other.set_ylabel("score of the auxiliary, of its peak")
    right.set_xticks(range(4), STRIDES)
    right.set_xlabel("output stride of the auxiliary's map")
    handles = [h for axis in (right, other) for h in axis.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figures.save(figure, path)


def report(settings, selection, table, samples):
    """study.md, printed as well, and study.png."""
    metrics = run.read_stage(settings.run, "metrics.json", "02_metrics.py")
    names = [n for n in ("mIoU", "boundary_mIoU", "AP", "PQ") if all(n in scores for scores in table.values())]
    at = f"os{selection['stride']}"
    text = f"{settings.run.resolve().name}: master {selection['master']}, auxiliary {selection['auxiliary']}, "
    text += f"s* OS {selection['stride']}; percent\n\n{gains_table(table, names)}\n"
    for other in ("alone", "auxiliary"):
        gain, half, seeds = difference(table, at, other, names[0])
        text += f"fused at s* over {other}: {names[0]} {give_or_take(gain, half)}, seeds {seeds}\n"
    text += f"\n{peaks(table, metrics, selection, names[0])}"
    text += "chance names the best of four strides one time in four\n"
    if "mIoU" in names:
        text += f"\nfused at s* over alone\n{where_gains_fall(table, at, samples)}"
    with run.whole_file(settings.out / "study.md") as temporary:
        temporary.write_text(text)
    draw(settings.out / "study.png", table, metrics, selection, names[0])
    print(f"\n{text}\nwrote study.csv, study.md, study.png in {settings.out}")


def main():
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    more, sys.argv = sys.argv[at + 1 :], sys.argv[:at]
    settings = run.parse(__doc__, Settings)
    folder = settings.run.resolve()
    settings.out = settings.out or folder.with_name(f"{folder.name}_study")
    selection = run.read_stage(settings.run, "selection.json", "03_select.py")
    found = run.read_stage(settings.run, "run.json", "01_extract.py")
    path, protocol = settings.out / "study.csv", settings.out / "study.json"
    asked = {part: selection[part] for part in ("master", "auxiliary", "stride")} | {"flags": more}
    if settings.report or protocol.is_file():
        before = run.read_stage(settings.out, "study.json", "tests/study.py")
        new = asked | ({"flags": before["flags"]} if settings.report else {})
        run.refuse_other_settings(settings.out, before, new, "give another --out")
    else:
        run.write_json(protocol, asked)
    table = read_table(path)
    todo = [(way, seed) for seed in settings.seeds for way in WAYS if (way, seed) not in table]
    torch.set_num_threads(1)
    with ThreadPoolExecutor(settings.jobs) as pool:
        jobs = [] if settings.report else todo
        for job, scores in zip(jobs, pool.map(lambda job: train(settings, selection, *job, more), jobs), strict=True):
            table[job] = scores
            write_table(path, table)
            print(*job, *(f"{name} {value:.1f}" for name, value in list(scores.items())[:3]))
    need(table, f"{path} is not there: nothing to report")
    report(settings, selection, table, open_split(found["benchmark"], Path(found["data"]), "val"))


if __name__ == "__main__":
    run.start(main)
