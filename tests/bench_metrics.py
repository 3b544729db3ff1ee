"""How fast the metrics are: SAM2-B+'s four maps of 512 x 1024 pictures, ours against the same with scikit-learn.

    python tests/bench_metrics.py               two CPU cores, a picture to each, one thread a picture, on both sides
    python tests/bench_metrics.py --cuda        the pictures as one batch on the GPU, against the two CPU cores

scikit-learn's side is this project's own with PCA, KMeans(n_init=10) and silhouette_score in place of its parts. The
encoder has random weights; the features are the same for both.
"""

import argparse
import importlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import toycity  # noqa: E402
from common.encoders import load_encoder  # noqa: E402

metrics = importlib.import_module("02_metrics")


def with_scikit_learn(points, dimensions):
    points = points.numpy().astype(np.float64)
    dimensions = min(dimensions, *points.shape[1:])
    parts = [
        PCA(dimensions, svd_solver="full").fit_transform(p)[:, ::-1] for p in points
    ]  # the first one last
    return torch.from_numpy(np.stack(parts)).float()


def clustering_with_scikit_learn(features, points, seed):
    scores = []
    for flat in metrics.channels_standardised(features).numpy().astype(np.float64):
        chosen = np.random.default_rng(seed).permutation(len(flat))[: metrics.POSITIONS]
        points = flat[chosen]
        points = PCA(min(metrics.DIMENSIONS, *points.shape), svd_solver="full").fit_transform(
            points
        )
        values = []
        for k in metrics.CLUSTERS:
            labels = KMeans(k, n_init=metrics.RESTARTS, random_state=seed).fit_predict(points)
            size = min(metrics.SILHOUETTE_POSITIONS, len(points))
            values.append(silhouette_score(points, labels, sample_size=size, random_state=seed))
        scores.append((np.median(values) + 1) / 2)
    return torch.tensor(scores).float()


@torch.no_grad()
def score(maps, image):
    """Every metric of the maps of one picture (or batch): {stride: {score: [B]}}."""
    scores = {}
    for stride, features in maps.items():
        prepared = metrics.prepare(features)
        scores[stride] = metrics.structural_coherence(features, prepared=prepared)
        scores[stride] |= metrics.edge_fidelity(features, image, prepared)
    return scores


def timed(pictures, workers=2):
    with ThreadPoolExecutor(workers) as pool:
        began = time.perf_counter()
        scores = list(pool.map(lambda picture: score(*picture), pictures))
        return time.perf_counter() - began, scores


def memory(field) -> float:
    """GB; VmRSS now, VmHWM at most (Linux)."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1e6


def means(scores):
    return {
        (s, name): np.mean([one[s][name].mean().item() for one in scores])
        for s in scores[0]
        for name in scores[0][s]
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument(
        "--slow", type=int, default=6, help="pictures that scikit-learn's side gets"
    )
    parser.add_argument("--cuda", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    scenes = [toycity.scene("val", i)[0] for i in range(args.images)]
    images = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).float() / 255
    encoder = load_encoder("sam2_b", "none")
    with torch.inference_mode():
        native = [encoder(image[None]) for image in images]
    del encoder
    pictures = [(maps, image[None]) for maps, image in zip(native, images, strict=True)]
    torch.set_num_threads(1)

    if args.cuda:
        batch = (
            {s: torch.cat([maps[s] for maps in native]).cuda() for s in native[0]},
            images.cuda(),
        )
        for _ in range(2):
            score(*batch)
        torch.cuda.synchronize()
        began = time.perf_counter()
        fast = [score(*batch)]
        torch.cuda.synchronize()
        ours, side = time.perf_counter() - began, "this project, one batch on the GPU"
    else:
        before = memory("VmRSS")
        timed(pictures[:2])
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        ours, fast = timed(pictures)
        side = "this project"
        print(f"peak memory grew by {memory('VmHWM') - before:.2f} GB")
    metrics.clustering_score, metrics.principal_components = (
        clustering_with_scikit_learn,
        with_scikit_learn,
    )
    few = pictures[: args.slow]
    with threadpool_limits(1):
        theirs, slow = timed(few)
    print(f"{args.images} pictures, two CPU cores; seconds a picture")
    ratio = theirs / len(few) / (ours / args.images)
    print(f"  {side:36}{ours / args.images:8.3f}")
    print(f"  {'with scikit-learn':36}{theirs / len(few):8.3f}   {ratio:.1f} times as long")
    if len(few) < args.images:
        return
    one, other = means(fast), means(slow)
    worst = {
        name: max(abs(one[s, n] - other[s, n]) for s, n in one if n == name)
        for name in ("SCS", "EC", "FC_PCA")
    }
    print(
        "  largest difference of the means:",
        ", ".join(f"{name} {value:.4f}" for name, value in worst.items()),
    )


if __name__ == "__main__":
    main()
