"""What the published scores say of things that need no encoder, by the size of the map.

    python tests/controls.py

The 24 images are crops of scikit-learn's two photographs and of toycity scenes, 256 x 512. The
table shows SC and both forms of EF of white noise, of the image itself, of the image shifted, and
of the image whose 4 x 8 tiles have changed places. It ends with how often SP is that of the
smallest radius.
"""

import argparse
import importlib
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import run  # noqa: E402
from common.encoders import STRIDES  # noqa: E402

from test_metrics_oracle import photographs  # noqa: E402

metrics = importlib.import_module("02_metrics")
SCORES = ("SFC", "SCS", "SC", "EF", "EF_RELEASED")


def shuffle_tiles(image, rng):
    """An image [3, H, W] with its 4 x 8 tiles in another order."""
    height, width = image.shape[1] // 4, image.shape[2] // 8
    tiles = image.unfold(1, height, height).unfold(2, width, width)  # [3, 4, 8, height, width]
    order = torch.from_numpy(rng.permutation(32))
    tiles = tiles.flatten(1, 2)[:, order].unflatten(1, (4, 8))
    return tiles.transpose(2, 3).reshape(image.shape)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=24, help="images, evenly spaced")
    args = parser.parse_args()
    images = run.evenly_spaced(photographs(), args.limit)
    rng = np.random.default_rng(0)
    torch.set_num_threads(1)
    table = defaultdict(list)  # {(map, score, stride): one for each image}
    maps = 0
    smallest = 0
    for i, image in enumerate(images):
        sources = {control: (control, image) for control in metrics.CONTROLS}
        sources["tiles shuffled"] = ("image", shuffle_tiles(image, rng))
        for title, (control, shown) in sources.items():
            for stride in STRIDES:
                features = metrics.control_map(control, shown, stride, seed=100 * i + stride)
                scores = metrics.structural_coherence(features)
                scores.update(metrics.edge_fidelity(features, image))
                maps += 1
                smallest += abs(scores["SP"] - 1 / (1 + 1 / 64)) < 1e-6
                for score in SCORES:
                    table[title, score, stride].append(scores[score])

    rows = [["", "", *(f"{256 // stride} x {512 // stride}" for stride in STRIDES)]]
    for title in sources:
        for score in SCORES:
            digits = 1 if score.startswith("EF") else 3
            row = [title, score]
            for stride in STRIDES:
                values = table[title, score, stride]
                error = np.std(values, ddof=1) / len(values) ** 0.5
                row.append(f"{np.mean(values):.{digits}f} ± {error:.{digits}f}")
            rows.append(row)
    print(f"means and standard errors over {len(images)} images, by map size")
    print(run.table(rows))
    print(f"SP is that of radius 1 on {smallest} of {maps} maps")


if __name__ == "__main__":
    main()
