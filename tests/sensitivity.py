"""Do master, auxiliary and stride stay when one setting of the metrics changes?

    python tests/sensitivity.py                 the features of runs/toycity, some minutes on two cores
    python tests/sensitivity.py --run runs/mine --limit 12

Each setting takes a smaller and a larger value, all others as in 02_metrics.py.
"""

import argparse
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import run  # noqa: E402
from common.encoders import STRIDES  # noqa: E402

metrics, stage3 = importlib.import_module("02_metrics"), importlib.import_module("03_select")
SETTINGS = {  # name in 02_metrics.py: what it means, a smaller and a larger value
    "CELLS": ("K, cells along each axis", 8, 32),
    "DIMENSIONS": ("PCA dimensions", 16, 64),
    "CLUSTERS": ("numbers of clusters", (4, 5, 6), (10, 14, 18)),
    "R_IN": ("r_in, map pixels", 1, 3),
    "R_OUT": ("r_out, map pixels", 3, 6),
    "TOP_SHARE": ("share of gradients that are edges", 0.05, 0.2),
    "SP_THRESHOLD": ("tau", 0.3, 0.7),
}


def profiles(folder, settings, names):
    """Mean SC and EF of each encoder and stride: two arrays [1, encoder, stride]."""

    def score(name):
        image, maps = metrics.read_maps(metrics.Settings(run=folder, device="cpu"), settings, name)
        values = []
        for levels in maps.values():
            for feature in levels.values():
                sc = metrics.structural_coherence(feature, settings["seed"])["SC"]
                values.append((sc.item(), metrics.edge_fidelity(feature, image)["EF"].item()))
        return values

    with ThreadPoolExecutor(2) as pool:
        values = np.array(list(pool.map(score, names))).mean(0)  # [encoder * stride, 2]
    return values.reshape(1, -1, len(STRIDES), 2).transpose(3, 0, 1, 2)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/toycity"))
    parser.add_argument("--limit", type=int, help="pictures, evenly spaced")
    args = parser.parse_args()
    settings, names = metrics.finished_run(args.run)
    names = names[:: max(1, len(names) // (args.limit or len(names)))]
    torch.set_num_threads(1)
    variants = [(None, None)] + [
        (name, value) for name, (_, *values) in SETTINGS.items() for value in values
    ]
    rows = []
    for name, value in tqdm(variants, "settings"):
        before = getattr(metrics, name) if name else None
        if name:
            setattr(metrics, name, value)
        sc, ef = profiles(args.run, settings, names)
        if name:
            setattr(metrics, name, before)
        choice, _ = stage3.select(sc, ef, "segmentation", master=None, auxiliary=None, stride=None)
        master, auxiliary, at = choice[:, 0]
        what = f"{SETTINGS[name][0]} {before} -> {value}" if name else "as published"
        chosen = (settings["encoders"][master], settings["encoders"][auxiliary], STRIDES[at])
        rows.append((what, *chosen, sc[0].mean(1), ef[0].max(1)))
    print(
        f"\n{len(names)} pictures; SC: mean over strides, EF: its peak, of {', '.join(settings['encoders'])}"
    )
    for what, master, auxiliary, stride, sc, ef in rows:
        same = "" if (master, auxiliary, stride) == rows[0][1:4] else "   CHANGED"
        numbers = "  ".join(f"{s:.3f} {e:5.1f}" for s, e in zip(sc, ef, strict=True))
        print(f"{what:52} {master:12} {auxiliary:12} OS {stride:<3} {numbers}{same}")


if __name__ == "__main__":
    run.start(main)
