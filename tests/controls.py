"""What the published scores say of things that need no encoder, by the size of the map.

    python tests/controls.py

24 pictures: crops of scikit-learn's two photographs and toycity scenes, 256 x 512. SC and the forms of EF of white
noise, of the picture itself, of the picture shifted, and of the picture cut into a grid of 4 x 8 tiles that change
places; and how often SP is that of the smallest radius.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_metrics_oracle import photographs  # noqa: E402

metrics = importlib.import_module("02_metrics")
STRIDES = (4, 8, 16, 32)


def shuffled(image, rng):
    """[1, 3, H, W] with its 4 x 8 tiles in another order."""
    height, width = image.shape[2] // 4, image.shape[3] // 8
    tiles = [
        image[:, :, y * height : (y + 1) * height, x * width : (x + 1) * width]
        for y in range(4)
        for x in range(8)
    ]
    tiles = [tiles[i] for i in rng.permutation(32)]
    return torch.cat([torch.cat(tiles[8 * y : 8 * y + 8], 3) for y in range(4)], 2)


def main():
    images, rng = photographs(), np.random.default_rng(0)
    torch.set_num_threads(1)
    table, smallest = {}, []
    for i, image in enumerate(images):
        sources = {source: (source, image[None]) for source in metrics.CONTROLS}
        sources["tiles shuffled"] = ("image", shuffled(image[None], rng))
        for name, (source, picture) in sources.items():
            for stride in STRIDES:
                features = metrics.control(source, picture, stride, seed=100 * i + stride)
                scores = metrics.structural_coherence(features) | metrics.edge_fidelity(
                    features, image[None]
                )
                smallest.append(abs(scores["SP"].item() - 1 / (1 + 1 / 64)) < 1e-6)
                for score in ("SFC", "SCS", "SC", "EF", "EF_RELEASED"):
                    table.setdefault((name, score), {}).setdefault(stride, []).append(
                        scores[score].item()
                    )
    sizes = [f"{256 // stride} x {512 // stride}" for stride in STRIDES]
    print(f"means and standard errors over {len(images)} pictures, by map size")
    print(f"{'':16}{'':12}" + "".join(f"{size:>16}" for size in sizes))
    for (name, score), values in table.items():
        digits = 1 if score.startswith("EF") else 3
        cells = []
        for stride in STRIDES:
            error = np.std(values[stride], ddof=1) / len(images) ** 0.5
            cells.append(f"{np.mean(values[stride]):.{digits}f} ± {error:.{digits}f}")
        print(f"{name:16}{score:12}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"SP is that of radius 1 on {sum(smallest)} of {len(smallest)} maps")


if __name__ == "__main__":
    main()
