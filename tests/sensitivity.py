"""Do master, auxiliary and stride stay when one setting of the scores changes?

    python tests/sensitivity.py                 the features of runs/toycity, minutes on two cores
    python tests/sensitivity.py --run runs/mine --limit 12

Each setting takes a smaller and a larger value, with all others as in 02_metrics.py.
"""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import run  # noqa: E402
from common.encoders import STRIDES  # noqa: E402
from common.run import flag, positive  # noqa: E402

metrics = importlib.import_module("02_metrics")
stage3 = importlib.import_module("03_select")


@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder")
    limit: int | None = flag(None, "images, evenly spaced (default: all)", type=positive)


class Variant(NamedTuple):
    name: str  # in 02_metrics.py
    meaning: str
    smaller: object
    larger: object


VARIANTS = (
    Variant("CELLS", "cells along each axis", 8, 32),
    Variant("DIMENSIONS", "principal components", 16, 64),
    Variant("CLUSTERS", "numbers of clusters", (4, 5, 6), (10, 14, 18)),
    Variant("R_IN", "core zone, map pixels", 1, 3),
    Variant("R_OUT", "near zone, map pixels", 3, 6),
    Variant("TOP_SHARE", "share of gradients that are edges", 0.05, 0.2),
    Variant("SIMILARITY_THRESHOLD", "similarity threshold of SP", 0.3, 0.7),
)


class Result(NamedTuple):
    setting: str
    choice: tuple  # master, auxiliary, stride
    sc: np.ndarray  # [encoder], mean over the strides
    ef: np.ndarray  # [encoder], its peak


def score_image(settings, run_config, name):
    """SC and EF of all maps of an image: [2, encoder, stride]."""
    image, maps = metrics.read_image_and_maps(settings, run_config, name)
    encoders = run_config["encoders"]
    scores = np.zeros((2, len(encoders), len(STRIDES)))
    for i, encoder in enumerate(encoders):
        for j, stride in enumerate(STRIDES):
            features = maps[encoder, stride]
            coherence = metrics.structural_coherence(features, settings.seed)
            scores[0, i, j] = coherence["SC"]
            scores[1, i, j] = metrics.edge_fidelity(features, image)["EF"]
    return scores


def choose(folder, run_config, names, setting):
    """The Result with 02_metrics.py as it is now."""
    settings = metrics.Settings(run=folder, device="cpu", seed=run_config["seed"])
    with ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(partial(score_image, settings, run_config), names))
    sc, ef = np.mean(scores, axis=0)  # [encoder, stride] each
    choice, _ = stage3.select(sc, ef, stage3.Choice(None, None, None))
    encoders = run_config["encoders"]
    chosen = (encoders[choice.master], encoders[choice.auxiliary], STRIDES[choice.stride])
    return Result(setting, chosen, sc.mean(1), ef.max(1))


def main():
    settings = run.parse(__doc__, Settings)
    run_config, names = metrics.finished_run(settings.run)
    if settings.limit:
        names = run.evenly_spaced(names, settings.limit)
    torch.set_num_threads(1)
    results = [choose(settings.run, run_config, names, "as published")]
    for variant in tqdm(VARIANTS, "settings"):
        before = getattr(metrics, variant.name)
        for value in (variant.smaller, variant.larger):
            setattr(metrics, variant.name, value)
            setting = f"{variant.meaning} {before} -> {value}"
            results.append(choose(settings.run, run_config, names, setting))
        setattr(metrics, variant.name, before)

    rows = [["setting", "master", "auxiliary", "stride"]]
    for encoder in run_config["encoders"]:
        rows[0] += [f"SC, {encoder}", f"EF, {encoder}"]
    rows[0].append("")
    for result in results:
        row = [result.setting, *map(str, result.choice)]
        for sc, ef in zip(result.sc, result.ef, strict=True):
            row += [run.number(sc, 3), run.number(ef, 1)]
        row.append("" if result.choice == results[0].choice else "CHANGED")
        rows.append(row)
    print(f"\n{len(names)} images; SC is its mean over the strides, EF its peak")
    print(run.table(rows))


if __name__ == "__main__":
    run.start(main)
