"""How fast the scores are: SAM2-B+'s four maps of 512 x 1024 images, ours against scikit-learn.

    python tests/bench_metrics.py          two CPU cores, an image and a thread to each
    python tests/bench_metrics.py --cuda   the images one by one on the GPU, against two CPU cores

scikit-learn's side is this project's own with PCA, KMeans and silhouette_score in place of its
parts, and runs on two CPU cores, too. The encoder has random weights. Both sides get the same
features.
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


# ------------------------------------------------------------------ scikit-learn's parts
def components_with_scikit_learn(positions, count):
    exact = positions.numpy().astype(np.float64)
    components = PCA(min(count, *exact.shape), svd_solver="full").fit_transform(exact)
    return torch.from_numpy(components).float()


def clustering_with_scikit_learn(features, seed):
    flat = metrics.standardised_positions(features).numpy().astype(np.float64)
    sample = np.random.default_rng(seed).permutation(len(flat))[: metrics.MAX_POSITIONS]
    dimensions = min(metrics.DIMENSIONS, *flat[sample].shape)
    points = PCA(dimensions, svd_solver="full").fit_transform(flat[sample])
    count = min(metrics.SILHOUETTE_POSITIONS, len(points))
    silhouettes = []
    for k in metrics.CLUSTERS:
        labels = KMeans(k, n_init=metrics.RESTARTS, random_state=seed).fit_predict(points)
        silhouettes.append(silhouette_score(points, labels, sample_size=count, random_state=seed))
    return (float(np.median(silhouettes)) + 1) / 2


# ------------------------------------------------------------------ timing
def score(image, maps):
    """All scores of an image's maps {stride: [C, H, W]}: {(stride, score): float}."""
    scores = {}
    for stride, features in maps.items():
        coherence = metrics.structural_coherence(features)
        fidelity = metrics.edge_fidelity(features, image)
        for name, value in {**coherence, **fidelity}.items():
            scores[stride, name] = value
    return scores


def score_all(images, maps, workers):
    """Seconds, and the scores of each image."""
    with ThreadPoolExecutor(workers) as pool:
        began = time.perf_counter()
        scores = list(pool.map(score, images, maps))
        return time.perf_counter() - began, scores


def memory(field):
    """GB: VmRSS is what is used now, VmHWM the most so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1e6


def largest_difference(ours, theirs, name):
    """Of a score's means over the images, at any stride."""
    differences = []
    for stride, score_name in ours[0]:
        if score_name == name:
            mean = np.mean([scores[stride, name] for scores in ours])
            other = np.mean([scores[stride, name] for scores in theirs])
            differences.append(abs(mean - other))
    return max(differences)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--slow", type=int, default=6, help="images that scikit-learn's side gets")
    parser.add_argument("--cuda", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    encoder = load_encoder("sam2_b", "none")
    images, maps = [], []
    for i in range(args.images):
        pixels, *_ = toycity.scene("val", i)
        images.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
        with torch.inference_mode():
            native = encoder(images[i][None])
        maps.append({stride: features[0] for stride, features in native.items()})
    del encoder
    torch.set_num_threads(1)

    if args.cuda:
        images_there = [image.cuda() for image in images]
        maps_there = []
        for native in maps:
            maps_there.append({stride: features.cuda() for stride, features in native.items()})
        score_all(images_there, maps_there, workers=1)
        side = "this project, on the GPU"
        seconds, ours = score_all(images_there, maps_there, workers=1)
    else:
        before = memory("VmRSS")
        score_all(images[:2], maps[:2], workers=2)
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
        side = "this project"
        seconds, ours = score_all(images, maps, workers=2)
        print(f"peak memory grew by {memory('VmHWM') - before:.2f} GB")
    seconds_an_image = seconds / len(images)

    metrics.structural_clustering_score = clustering_with_scikit_learn
    metrics.principal_components = components_with_scikit_learn
    few = images[: args.slow]
    with threadpool_limits(1):
        slow_seconds, theirs = score_all(few, maps[: args.slow], workers=2)
    slow_seconds_an_image = slow_seconds / len(few)
    ratio = slow_seconds_an_image / seconds_an_image
    print(f"{len(images)} images, two CPU cores; seconds an image")
    print(f"  {side:28}{seconds_an_image:8.3f}")
    print(f"  {'with scikit-learn':28}{slow_seconds_an_image:8.3f}   {ratio:.1f} times as long")
    if len(few) == len(images):
        for name in ("SCS", "EC", "FC_PCA"):
            difference = largest_difference(ours, theirs, name)
            print(f"  largest difference of the means of {name}: {difference:.4f}")


if __name__ == "__main__":
    main()
