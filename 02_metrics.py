"""Stage 2: measure which way each encoder leans, stride by stride, without labels.

Structural Coherence (SC) asks whether a feature map is made of large, distinct regions; Edge Fidelity (EF) asks whether
its edges lie where the picture's edges lie. Both follow the paper (arXiv 2605.16864). The edge readout (ER, ours) asks
how well the map predicts the picture's edges, and compares encoders at one stride. A score means something where it
clears three controls that need no encoder: white noise, the picture itself, the picture shifted.

    python 02_metrics.py                     # the embedded benchmark, runs/toycity
    python 02_metrics.py --run runs/mine     # any run folder that 01_extract.py has filled

Reads run.json and features/. Writes metrics.csv (a row per image, source and stride), metrics.json (means with 95 %
bootstrap intervals over the images), metrics.png (the profiles) and edges.png (each encoder's edges where EF peaks).
"""

import csv
import functools
import math
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.datasets import read_run_picture
from common.encoders import STRIDES, pyramid
from common.figures import draw_edges, draw_profiles
from common.run import CORES, DEVICES, flag, natural, need, positive

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

CONTROLS = ("noise", "image", "shifted")
SCORES = ("SFC", "SCS", "SC", "EC", "NC", "FAR", "FC", "FC_PCA", "SP", "EF", "EF_RELEASED", "ER")
OF_A_MAP = SCORES[:-1]  # ER is one of a set of pictures

# structural coherence
CELLS = 16  # SFC: cells along each axis
POSITIONS, DIMENSIONS = 4096, 32  # SCS: at most so many positions, of at most so many principal components
CLUSTERS = (6, 8, 10)
RESTARTS, TRIALS = 40, 4  # of k-means, and draws for each of its seeds
COARSE, FINALISTS = 4, 4  # the restarts race over a quarter of the positions, the best four go on over all
LLOYD_STEPS, LLOYD_TOLERANCE = 100, 1e-4  # stop once the centres move by less than this share of the variance
SILHOUETTE_POSITIONS = 2000

# edge fidelity
TOP_SHARE = 0.1  # the strongest tenth of the gradients are edges
R_IN, R_OUT = 2, 4  # zones around the picture's edges, in map pixels
HIGH_FREQUENCY = 0.15  # radius of the spectrum from which on power counts as detail
RADII, SP_THRESHOLD, SP_SCALE = 16, 0.5, 64

# edge readout
READOUT_POSITIONS = 2048  # of a map, at most
FOLDS = 4  # of neighbouring pictures, as they may be frames of one film
RIDGE = 0.01  # of the channels' summed variance, so that a channel more of the same changes nothing
WAVES = 4  # cosines along each axis, of 0 to 1.5 periods, stand for position


@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder")
    device: str = flag(DEVICES[0], choices=DEVICES)
    workers: int = flag(CORES, "images at a time, a core for each", type=positive)
    seed: int | None = flag(None, "seed of sampling, noise and bootstrap (default: the run's)", type=natural)


# ------------------------------------------------------------------ structural coherence (SC)
@torch.no_grad()
def structural_coherence(features, seed=0, prepared=None):
    """Score how far feature maps are made of large, distinct regions (paper, arXiv 2605.16864).

    features [B,C,H,W], any float type, any device. Returns {"SFC", "SCS", "SC"}, each float32 [B] in [0,1]:

        SFC = V / (V + N)                       V variance of cell means, N mean variance in cells, of the L2-norm map
        SCS = (median_k silhouette + 1) / 2     over k-means clusterings with k = 6, 8, 10
        SC  = sqrt(SFC * SCS)

    Degenerate maps score 0. Every map of a batch is sampled at the same positions. prepared: prepare(features).
    """
    with torch.autocast(features.device.type, enabled=False):
        features, usable, points, _ = prepared or prepare(features)
        sfc = feature_contrast(norms(features))
        scs = clustering_score(features, points, seed)
        scores = {"SFC": sfc, "SCS": scs, "SC": (sfc * scs).sqrt()}
        return {name: torch.where(usable, score, 0) for name, score in scores.items()}


def prepare(features):
    """What both metrics start from: float32 features [B,C,H,W], usable [B], points [B,H*W,D], component [B,H,W].

    points: in principal components, None where SCS samples the positions; component: the first one.
    """
    features, usable = without_degenerate(features)
    sampled = features[0, 0].numel() > POSITIONS
    points = principal_components(channels_standardised(features), 1 if sampled else DIMENSIONS)
    # Standardised, as shares of its gradient are the same on any scale.
    component = standardise(points[:, :, -1].unflatten(1, features.shape[2:]))
    return features, usable, None if sampled else points, component


def without_degenerate(features):
    """float32 features [B,C,H,W], degenerate ones set to 0, and which are usable, bool [B].

    A map is degenerate if the std of its L2 norm is under 1e-4 of its mean: constant maps, an untrained ViT's
    normalised tokens (rounding noise), NaN, infinity, a single pixel.
    """
    features = features.float()
    norm = norms(features).flatten(1)  # [B,H*W]
    usable = norm.std(1) > 1e-4 * norm.mean(1)
    return torch.where(usable[:, None, None, None], features, 0), usable


def norms(features):
    """L2 norm over the channels of [B,C,H,W]: [B,H,W]; on a CPU ten times faster than torch.linalg.vector_norm."""
    return features.square().sum(1).sqrt()


def standardise(maps):
    """[B,H,W] to mean 0 and (unbiased) std 1 for each map."""
    return (maps - maps.mean((1, 2), keepdim=True)) / maps.std((1, 2), keepdim=True).clamp_min(1e-8)


def feature_contrast(norm):
    """SFC of L2-norm maps [B,H,W]; on small maps a cell is one pixel and SFC 1, which says little."""
    rows, columns = min(CELLS, norm.shape[1]), min(CELLS, norm.shape[2])
    height, width = norm.shape[1] // rows, norm.shape[2] // columns  # of a cell; what is left over is cropped
    cells = standardise(norm)[:, : rows * height, : columns * width]
    cells = cells.reshape(-1, rows, height, columns, width).transpose(2, 3).flatten(3)  # [B,rows,columns,pixels]
    between = cells.mean(3).flatten(1).var(1, correction=0)
    within = cells.var(3, correction=0).mean((1, 2)).clamp_min(1e-6)
    return between / (between + within)


def channels_standardised(features):
    """[B,C,H,W] to positions [B,H*W,C], each channel of mean 0 and std 1 over the map."""
    channels = features.flatten(2)
    channels = channels - channels.mean(2, keepdim=True)
    std = torch.linalg.vector_norm(channels, dim=2, keepdim=True) / channels.shape[2] ** 0.5  # faster than std()
    return (channels / (std + 1e-6)).mT


def principal_components(points, dimensions):
    """Points [B,n,C] in their principal components, the first one last: [B,n,min(dimensions,n,C)]."""
    points = points - points.mean(1, keepdim=True)
    if points.shape[1] < points.shape[2]:  # the smaller of the two products has the same components
        squares, coordinates = torch.linalg.eigh(points @ points.mT)  # [B,n], [B,n,n], by rising variance
        return coordinates[:, :, -dimensions:] * squares[:, None, -dimensions:].clamp_min(0).sqrt()
    _, directions = torch.linalg.eigh(points.mT @ points / points.shape[1])  # [B,C,C], columns by rising variance
    return points @ directions[:, :, -dimensions:]


def clustering_score(features, points, seed):
    """SCS of [B,C,H,W]: how well positions fall into 6 to 10 clusters, by their silhouette."""
    positions = features[0, 0].numel()
    if positions < 8:
        return features.new_zeros(len(features))
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on any device
    chosen = torch.randperm(positions, generator=generator)[:POSITIONS].to(features.device)
    if points is None:
        points = principal_components(channels_standardised(features)[:, chosen], DIMENSIONS)  # [B,n,D]
    else:
        points = points[:, chosen]
    silhouettes = []
    seeds = spread_seeds(points[:, : max(len(chosen) // COARSE, 512)], max(CLUSTERS), generator)  # [B,RESTARTS,k,D]
    for k in CLUSTERS:
        labels = kmeans(points, seeds[:, :, :k])  # [B,n]
        # A part for the silhouette, each cluster with its share: sorted by label, every so many-th position.
        picks = torch.linspace(0, len(chosen) - 1, min(SILHOUETTE_POSITIONS, len(chosen))).round().long()
        picks = labels.argsort(dim=1, stable=True)[:, picks.to(labels.device)]  # [B,m]
        sample = points.take_along_dim(picks[..., None], 1)  # [B,m,D]
        silhouettes.append(silhouette(sample, labels.gather(1, picks), k))
    return (torch.stack(silhouettes).median(0).values + 1) / 2


# ------------------------------------------------------------------ edge fidelity (EF)
@torch.no_grad()
def edge_fidelity(features, images, prepared=None):
    """Score whether feature edges lie on the picture's edges and are sharp (paper, arXiv 2605.16864).

    features [B,C,H,W], any float type, any device; images [B,3,H0,W0] in [0,1], sRGB. Returns float32 [B] each:

        EC, NC, FAR   shares of the feature edges' strength in core, near and far zone of the picture's edges; sum to 1
        FC, FC_PCA    share of spectral power at high frequency, of the L2-norm map and of the principal component
        SP            1 / (1 + r / 64), r the radius at which the map's detail stops resembling itself, mostly 1
        EF          = 100 EC * NC * FC * SP                   the paper's form, in [0,25], as EC + NC <= 1
        EF_RELEASED = 100 NC * (1 - FAR) * FC_PCA * SP        what the authors' released code computes, in [0,100]

    Degenerate maps, and maps under 3 pixels high or wide, score 0. prepared: prepare(features).
    """
    with torch.autocast(features.device.type, enabled=False):
        features, usable, _, component = prepared or prepare(features)
        if min(features.shape[2:]) < 3:
            return {name: features.new_zeros(len(features)) for name in OF_A_MAP[3:]}
        _, core, near = edge_zones(images.float(), features.shape[2:])  # bool [B,H-2,W-2]
        strength, where = strongest(gradient(component)[:, 1:-1, 1:-1])  # [B,n]
        strength = strength / strength.sum(1, keepdim=True).clamp_min(1e-12)
        ec, nc, far = ((strength * z.flatten(1).gather(1, where)).sum(1) for z in (core, near, ~(core | near)))
        norm = norms(features)  # [B,H,W]
        fc = high_frequency_share(standardise(norm))
        fc_pca = high_frequency_share(component.clamp(-8, 8))
        sp = spatial_precision(norm)
        scores = {"EC": ec, "NC": nc, "FAR": far, "FC": fc, "FC_PCA": fc_pca, "SP": sp}
        scores["EF"] = 100 * ec * nc * fc * sp
        scores["EF_RELEASED"] = 100 * nc * (1 - far) * fc_pca * sp
        return {name: torch.where(usable, score, 0) for name, score in scores.items()}


def gradient(maps):
    """Sobel magnitude (kernel / 4, replicate padding) of [B,H,W]: [B,H,W], valid but at the border."""
    maps = F.pad(maps[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    down = (maps[:, :-2] + 2 * maps[:, 1:-1] + maps[:, 2:]) / 4
    across = (maps[:, :, :-2] + 2 * maps[:, :, 1:-1] + maps[:, :, 2:]) / 4
    return torch.hypot(down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2])


def picture_edges(images, size):
    """How strong the edges of images [B,3,H0,W0], sRGB in [0,1], are on a map of `size` (H,W): float32 [B,H,W]."""
    images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    linear = torch.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)  # sRGB to light
    return gradient(torch.einsum("bchw,c->bhw", linear, linear.new_tensor([0.2126, 0.7152, 0.0722])))  # BT.709


def strongest(strength):
    """The strongest tenth of [B,h,w], as (values, indices) [B,n] of the flattened map."""
    return strength.flatten(1).topk(math.ceil(TOP_SHARE * strength[0].numel()))


def edge_zones(images, size):
    """Find where the edges of images [B,3,H0,W0] lie on a map of `size` (H,W).

    Returns (centreline, core, near), bool [B,H-2,W-2]: the ridge of the edges, pixels within R_IN of it, those
    further out within R_OUT, by Chebyshev distance. The rest is far.
    """
    padded = picture_edges(images, size)  # [B,H,W]
    valid = padded[:, 1:-1, 1:-1]
    low, high = valid.amin((1, 2), keepdim=True), valid.amax((1, 2), keepdim=True)
    padded = ((padded - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)  # the border may lie outside
    valid = padded[:, 1:-1, 1:-1]
    edges = torch.zeros_like(valid).flatten(1).scatter(1, strongest(valid)[1], 1).view_as(valid)
    ridge = valid >= F.max_pool2d(padded, 3, stride=1) - 1e-6
    centreline = edges * ridge * (high - low >= 1e-6)  # a picture without contrast has no edges
    core = F.max_pool2d(centreline, 2 * R_IN + 1, stride=1, padding=R_IN) > 0
    reach = F.max_pool2d(centreline, 2 * R_OUT + 1, stride=1, padding=R_OUT) > 0
    return centreline > 0, core, reach & ~core


def high_frequency_share(maps):
    """FC [B] of standardised maps [B,H,W]: share of power at radius >= 0.15, DC counted, 1 being the corner."""
    height, width = maps.shape[1:]
    window = torch.outer(*(torch.hann_window(n, periodic=False, device=maps.device) for n in (height, width)))
    power = torch.fft.fftshift(torch.fft.fft2(maps * window), dim=(1, 2)).abs().square()  # [B,H,W]
    y, x = (torch.linspace(-1, 1, n, device=maps.device) for n in (height, width))
    radius = torch.hypot(y[:, None], x[None])
    high = radius / radius.max() >= HIGH_FREQUENCY  # [H,W]
    return (power * high).sum((1, 2)) / power.sum((1, 2)).clamp_min(1e-12)


def spatial_precision(norm):
    """SP of L2-norm maps [B,H,W], from the first radius at which their detail correlates under 0.5: [B]."""
    detail = standardise(norm - F.avg_pool2d(norm, 3, stride=1, padding=1))  # zero padding counted
    largest = max(1, math.floor(0.6 * min(detail.shape[1:])))
    radii = np.unique(np.geomspace(1, largest, RADII).round().astype(int)).tolist()
    found = torch.zeros(len(detail), device=detail.device)  # [B], 0 while it is searched for
    for r in radii:
        # Swapping the two sides turns an offset into its opposite: four offsets stand for all eight.
        lower, upper = detail[:, r:], detail[:, :-r]
        pairs = [(lower, upper), (detail[:, :, r:], detail[:, :, :-r])]
        pairs += [(lower[:, :, r:], upper[:, :, :-r]), (lower[:, :, :-r], upper[:, :, r:])]
        products = [(standardise(a) * standardise(b)).sum((1, 2)) / (a[0].numel() - 1) for a, b in pairs]
        similarity = torch.stack(products).mean(0)  # [B], of Pearson's r
        found = torch.where((found == 0) & (similarity < SP_THRESHOLD), float(r), found)
        if found.all():
            break
    return 1 / (1 + torch.where(found > 0, found, float(radii[-1])) / SP_SCALE)


# ------------------------------------------------------------------ edge readout (ER)
def edge_readout(read, count, each=map):
    """Score how well a linear readout of feature maps predicts the edges of pictures it was not fitted on (ours).

    read(i) yields (key, samples [n,C+1]) for each map of picture i, by readout_samples; it is called twice. each: what
    applies a function to all pictures, in order. Returns {key: ER of each picture, float64 [count], in [-1,1]}:

        w  = (G + RIDGE * C * I)^-1 g      ridge regression; G [C,C] and g [C], the correlations of channels with each
                                           other and with the edges, are means over the pictures of the other folds
        ER = Pearson's r of X w and the edges

    It is about 0 for a map that knows nothing of the picture but where in it a position lies, and compares maps of one
    stride and the same pictures: more pictures raise it. Folds are FOLDS blocks of neighbouring pictures, which may be
    frames of one film. ValueError for fewer pictures than folds.
    """
    if count < FOLDS:
        raise ValueError(f"{FOLDS} folds need as many pictures")
    folds = [i * FOLDS // count for i in range(count)]

    def correlate(i):
        return [(key, samples.mT @ samples / len(samples)) for key, samples in read(i)]

    sums = defaultdict(float)  # {(key, fold): [C+1,C+1]}
    for fold, of_picture in zip(folds, each(correlate, range(count)), strict=True):
        for key, matrix in of_picture:
            sums[key, fold] += matrix
    weights = {}
    for key, fold in sums:
        others = sum(sums[key, other] for other in range(FOLDS) if other != fold) / (count - folds.count(fold))
        others.diagonal().add_(RIDGE * (len(others) - 1))
        weights[key, fold] = torch.linalg.solve(others[:-1, :-1], others[:-1, -1])  # [C]

    def score(i):  # of what has mean 0, the cosine is Pearson's r
        pairs = ((key, s[:, :-1] @ weights[key, folds[i]], s[:, -1]) for key, s in read(i))
        return {key: F.cosine_similarity(predicted, edges, dim=0).item() for key, predicted, edges in pairs}

    scores = list(each(score, range(count)))
    return {key: np.array([of_picture[key] for of_picture in scores]) for key in scores[0]}


def readout_samples(features, edges, seed=0):
    """A map [1,C,H,W] and the picture's edges [1,H,W] as [n,C+1], the edges last, at READOUT_POSITIONS at most.

    Each column has mean 0 and std 1, and is what position does not explain: pictures of one kind share a layout, and
    to know that a street lies below and the sky above is not to see edges. 0 for degenerate maps and those too small.
    """
    chosen, waves = positions(*edges.shape[1:], seed, edges.device)
    points, _ = without_degenerate(features.flatten(2).index_select(2, chosen)[:, :, None])  # [1,C,1,n]
    columns = channels_standardised(torch.cat([points, edges.flatten(1)[:, None, None, chosen]], 1))[0]
    if len(columns) <= 2 * WAVES**2:
        return torch.zeros_like(columns)
    columns = columns - waves @ (waves.mT @ columns)
    left = torch.linalg.vector_norm(columns, dim=0) / len(columns) ** 0.5  # std, of 1
    return torch.where(left > 1e-3, columns / left, 0)  # where position explains all, what is left is rounding


@functools.lru_cache(64)  # the same for all maps of a size
def positions(height, width, seed, device):
    """At most READOUT_POSITIONS positions of a map, int64 [n], and cosines over them, orthonormal [n,WAVES**2]."""
    chosen = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))[:READOUT_POSITIONS]
    y, x = (math.pi * (torch.arange(side) + 0.5) / side for side in (height, width))
    waves = [torch.outer((i * y).cos(), (j * x).cos()).flatten() for i in range(WAVES) for j in range(WAVES)]
    return chosen.to(device), torch.linalg.qr(torch.stack(waves, 1)[chosen])[0].to(device)


# ------------------------------------------------------------------ controls and summary
def control_seed(seed, name, stride):
    """Noise is another for each picture and stride, and the same in every run."""
    return zlib.crc32(f"{seed} {name} {stride}".encode())


def control(source, image, stride, seed):
    """A map that needs no encoder, from image [1,3,H,W]: [1,64,H/stride,W/stride] of noise, or [1,3,...]."""
    height, width = image.shape[2] // stride, image.shape[3] // stride
    if source == "noise":
        return torch.randn(1, 64, height, width, generator=torch.Generator().manual_seed(seed)).to(image.device)
    if source == "shifted":
        image = image.roll((image.shape[2] // 3, image.shape[3] // 3), dims=(2, 3))
    return F.interpolate(image, (height, width), mode="bilinear", align_corners=False)


def summarise(values, sources, seed):
    """Means over images with 95 % bootstrap intervals, from values [image, source, stride, score].

    Returns {source: {"4": {"SC": {"mean", "low", "high"}, ...}}}. ER's interval is that of the pictures scored, with
    the readout as it was fitted.
    """
    means = np.tensordot(run.bootstrap(len(values), seed), values, axes=1)  # [resample, source, stride, score]
    low, high = np.percentile(means[1:], [2.5, 97.5], axis=0)
    summary = {source: {str(stride): {} for stride in STRIDES} for source in sources}
    for i, j, k in np.ndindex(low.shape):
        numbers = {"mean": means[0, i, j, k], "low": low[i, j, k], "high": high[i, j, k]}
        summary[sources[i]][str(STRIDES[j])][SCORES[k]] = numbers
    return summary


def print_profiles(metrics):
    """A row for each source and score, a column for each stride, controls last."""
    rows = [["source", "score", *(f"OS {stride}" for stride in STRIDES)]]
    for source, profile in metrics["scores"].items():
        for score, digits in {"SC": 3, "EF": 1, "EF_RELEASED": 1, "ER": 3}.items():
            means = [profile[str(stride)][score]["mean"] for stride in STRIDES]
            rows.append([source, score, *(run.number(mean, digits) for mean in means)])
    print(f"\n{run.table(rows)}")
    print(f"means over {metrics['images']} images; {', '.join(CONTROLS)} are controls, no encoder")
    for encoder in metrics["random_weights"]:
        print(f"WARNING: {encoder} has RANDOM weights: its numbers say nothing about the trained one")
    for encoder, counts in metrics["degenerate"].items():
        for stride, count in counts.items():
            if count:
                print(f"WARNING: {count} maps of {encoder} at OS {stride} are constant or not finite, and score 0")


# ------------------------------------------------------------------ k-means, in batches
def distances(centres, points):
    """Squared, of centres [B,...,D] to points [B,n,D], less the point's own square: [B,...,n]."""
    flat = centres.flatten(1, -2)
    squares = flat.square().sum(2, keepdim=True)
    return torch.baddbmm(squares, flat, points.mT, alpha=-2).unflatten(1, centres.shape[1:-1])


def spread_seeds(points, k, generator):
    """Greedy k-means++ on points [B,n,D]: RESTARTS times k of them, far from each other: [B,RESTARTS,k,D].

    Each further seed is the best of TRIALS drawn in proportion to their squared distance to the nearest seed.
    The first six of ten serve as six seeds.
    """
    n = points.shape[1]
    draws = torch.rand(k, RESTARTS, TRIALS, generator=generator).to(points.device)
    squares = points.square().sum(2)[:, None, None]  # [B,1,1,n]
    seeds = [points[:, (draws[0, :, :1] * n).long()]]  # [B,RESTARTS,1,D] each
    nearest = (distances(seeds[0], points) + squares).clamp_min(0)  # [B,RESTARTS,1,n]
    for draw in draws[1:]:
        cumulative = nearest[:, :, 0].cumsum(2)
        drawn = torch.searchsorted(cumulative, draw * cumulative[:, :, -1:], right=True).clamp_max(n - 1)
        tried = points.take_along_dim(drawn.flatten(1)[..., None], 1).unflatten(1, drawn.shape[1:])
        closer = (distances(tried, points) + squares).clamp_min(0).minimum(nearest)  # [B,RESTARTS,TRIALS,n]
        best = closer.sum(3, keepdim=True).argmin(2, keepdim=True)  # [B,RESTARTS,1,1]
        nearest = closer.take_along_dim(best, 2)
        seeds.append(tried.take_along_dim(best, 2))
    return torch.cat(seeds, dim=2)


def kmeans(points, seeds):
    """Cluster points [B,n,D], in random order, from seeds [B,RESTARTS,k,D]: labels int64 [B,n] of the best restart.

    Restarts race over a part of the points; only the FINALISTS with the least inertia go on over all of them.
    """
    centres = lloyd(points[:, : max(points.shape[1] // COARSE, 512)], seeds)
    inertia = distances(centres, points).amin(2).sum(2)  # [B,RESTARTS]
    best = inertia.topk(FINALISTS, largest=False).indices
    centres = lloyd(points, centres.take_along_dim(best[..., None, None], 1))
    distance = distances(centres, points)  # [B,FINALISTS,k,n]
    best = distance.amin(2).sum(2).argmin(1, keepdim=True)  # [B,1]
    return distance.take_along_dim(best[..., None, None], 1)[:, 0].argmin(1)


def lloyd(points, centres):
    """Lloyd's steps from centres [B,R,k,D] until they rest; one at rest waits for the others."""
    centres = centres.clone()
    threshold = LLOYD_TOLERANCE * points.var(1, correction=0).mean(1)[:, None]  # [B,1]
    moving = torch.ones(centres.shape[:2], dtype=torch.bool, device=points.device)
    for _ in range(LLOYD_STEPS):
        active = moving.any(0).nonzero()[:, 0]  # the restarts that still move on some map, A of them
        if len(active) == 0:
            break
        before = centres[:, active]  # [B,A,k,D]
        distance = distances(before, points)  # [B,A,k,n]
        # Two centres on the same spot share their points and stay together: no need for argmin, far slower. So is a
        # comparison that makes booleans.
        member = distance.eq_(distance.amin(2, keepdim=True))  # 1 or 0
        size = member.sum(3, keepdim=True)  # [B,A,k,1]
        after = (member.flatten(1, 2) @ points).view_as(before) / size.clamp_min(1)
        after = torch.where((size > 0) & moving[:, active, None, None], after, before)  # empty ones stay
        centres[:, active] = after
        moving[:, active] &= (after - before).square().sum((2, 3)) > threshold
    return centres


def silhouette(points, labels, k):
    """Mean silhouette [B] in [-1,1] of points [B,n,D] with labels [B,n] below k; 0 for a point alone."""
    distance = torch.cdist(points, points)  # [B,n,n]
    member = F.one_hot(labels, k).float()  # [B,n,k]
    size = member.sum(1, keepdim=True)  # [B,1,k]
    total = (member.mT @ distance).mT  # [B,n,k] summed distance to each cluster; twice as fast as distance @ member
    own_size = (size * member).sum(2)  # [B,n]
    inside = (total * member).sum(2) / (own_size - 1).clamp_min(1)
    others = (total / size.clamp_min(1)).masked_fill((size == 0) | (member > 0), torch.inf)
    outside = others.amin(2)
    scores = (outside - inside) / torch.maximum(outside, inside).clamp_min(1e-12)
    return torch.where((own_size > 1) & outside.isfinite(), scores, 0).mean(1)


# ------------------------------------------------------------------ the stage
def finished_run(folder):
    """run.json of a finished extraction, and the images that can be used."""
    found = run.read_stage(folder, "run.json", "01_extract.py")
    again = run.command("01_extract.py", folder)
    need("left_out" in found, f"{folder}: extraction has not ended: run `{again}` again, it goes on where it stopped")
    return found, [name for name in found["images"] if name not in found["left_out"]]


def read_maps(settings, found, name):
    """An image [1,3,H,W] in [0,1], and {encoder: pyramid {stride: [1,C,H/stride,W/stride]}} of it."""
    image, picture = read_run_picture(found, name)[None], run.fingerprint(Path(found["root"]) / name)
    maps = {}
    for encoder in found["encoders"]:
        native = run.read_features(settings.run, encoder, name, picture)  # {stride: [C,h,w]}
        native = {stride: feature[None].to(settings.device).float() for stride, feature in native.items()}
        maps[encoder] = pyramid(native, image.shape[2:])
    return image.to(settings.device), maps


def read_sources(settings, found, name):
    """The same with the controls' maps, after the encoders'."""
    image, maps = read_maps(settings, found, name)
    seeds = {stride: control_seed(settings.seed, name, stride) for stride in STRIDES}
    for source in CONTROLS:
        maps[source] = {stride: control(source, image, stride, seed) for stride, seed in seeds.items()}
    return image, maps


def score_image(settings, found, name):
    """Every score of one image of the run but ER: an array [source, stride, score], encoders first."""
    image, maps = read_sources(settings, found, name)
    values = []
    for levels in maps.values():
        for stride in STRIDES:
            prepared = prepare(levels[stride])  # once for both, as most of it is an eigendecomposition
            scores = structural_coherence(levels[stride], settings.seed, prepared)
            scores |= edge_fidelity(levels[stride], image, prepared)
            values.append([scores[score].item() for score in OF_A_MAP])
    return np.array(values).reshape(-1, len(STRIDES), len(OF_A_MAP))


def read_out(settings, found, names, pool):
    """ER of every image of the run: an array [image, source, stride], encoders first; NaN where they are too few."""

    def read(i):
        image, maps = read_sources(settings, found, names[i])
        edges = {stride: picture_edges(image, features.shape[2:]) for stride, features in maps["image"].items()}
        for source, levels in maps.items():
            for stride, features in levels.items():
                yield (source, stride), readout_samples(features, edges[stride], settings.seed)

    if len(names) < FOLDS:
        print(f"WARNING: the edge readout, ER, needs {FOLDS} images or more, {settings.run} has {len(names)}: left out")
        return np.full((len(names), len(found["encoders"]) + len(CONTROLS), len(STRIDES)), np.nan)
    scores = edge_readout(read, len(names), lambda do, images: tqdm(pool.map(do, images), "edge readout", len(names)))
    return np.stack(list(scores.values()), 1).reshape(len(names), -1, len(STRIDES))


def write_scores(path, values, sources, names):
    """Every component of every map, a row for each image, source and stride."""
    with run.whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "source", "stride", *SCORES])
        for i, j, k in np.ndindex(values.shape[:3]):
            table.writerow([names[i], sources[j], STRIDES[k], *(f"{value:.9g}" for value in values[i, j, k])])


def edges_at_peaks(settings, found, names, values):
    """Rows for draw_edges: three pictures, each encoder's edges at the stride where its mean EF peaks."""
    peaks = values[..., SCORES.index("EF")].mean(0).argmax(1)  # [source], the encoders first
    rows = []
    for i in run.evenly_spaced(range(len(names)), 3):
        image, maps = read_maps(settings, found, names[i])
        drawings = []
        # peaks and values go on with the controls, maps end with the encoders
        for (encoder, levels), peak, scores in zip(maps.items(), peaks, values[i], strict=False):
            stride, features = STRIDES[peak], levels[STRIDES[peak]]
            if min(features.shape[2:]) < 3:
                break
            centreline, core, near = edge_zones(image, features.shape[2:])  # bool [1,h-2,w-2]
            strength, where = strongest(gradient(prepare(features)[3])[:, 1:-1, 1:-1])  # [1,n]
            zones = torch.where(core, 1, torch.where(near, 2, 3)).flatten(1)
            edges = torch.zeros_like(zones).scatter(1, where, zones.gather(1, where) * (strength > 0))
            ec, nc, far = scores[peak, SCORES.index("EC") :][:3]
            title = f"{encoder}, OS {stride}\nEC {ec:.2f}, NC {nc:.2f}, FAR {far:.2f}"
            drawings.append((title, centreline[0].cpu(), edges.view_as(core)[0].cpu()))
        if len(drawings) == len(maps) and all(centreline.any() for _, centreline, _ in drawings):
            rows.append((image[0].cpu(), drawings))
        else:
            print(f"edges.png leaves out {names[i]}: no contrast, or a map under 3 pixels high or wide")
    return rows


def main():
    settings = run.parse(__doc__, Settings)
    folder = settings.run
    found, names = finished_run(folder)
    settings.seed = found["seed"] if settings.seed is None else settings.seed
    sources = [*found["encoders"], *CONTROLS]

    # Image by image, as their sizes may differ. The tensors are too small for two cores to share, so each worker has
    # an image and a core to itself; the numbers are the same however many workers there are.
    torch.set_num_threads(1)
    torch.linalg.eigh(torch.eye(2, device=settings.device))  # on a GPU two threads must not make the first call
    with ThreadPoolExecutor(settings.workers) as pool:
        scored = pool.map(lambda name: score_image(settings, found, name), names)
        values = np.stack(list(tqdm(scored, "metrics", len(names), unit="image")))
        flat = (values[:, : len(found["encoders"])] == 0).all(3).sum(0)  # degenerate maps, [encoder, stride]
        values = np.concatenate([values, read_out(settings, found, names, pool)[..., None]], axis=3)

    # Write every component of every map, and what it comes to.
    write_scores(folder / "metrics.csv", values, sources, names)
    random_weights = [encoder for encoder in found["encoders"] if found["weights"][encoder] == "none"]
    metrics = {"benchmark": found["benchmark"], "encoders": found["encoders"], "controls": list(CONTROLS)}
    metrics |= {"strides": list(STRIDES), "images": len(names), "random_weights": random_weights}
    metrics["degenerate"] = {
        encoder: {str(stride): int(count) for stride, count in zip(STRIDES, counts, strict=True)}
        for encoder, counts in zip(found["encoders"], flat, strict=True)
    }
    metrics["scores"] = summarise(values, sources, settings.seed)
    run.write_json(folder / "metrics.json", metrics)
    draw_profiles(folder / "metrics.png", metrics)
    if rows := edges_at_peaks(settings, found, names, values):
        draw_edges(folder / "edges.png", rows)
    print_profiles(metrics)
    print(f"\nwrote metrics.csv, metrics.json, metrics.png{', edges.png' if rows else ''} in {folder}")
    if (folder / "selection.json").is_file():
        print("selection.json is older than these metrics: 03_select.py makes it anew")
    print(f"next: {run.command('03_select.py', folder)}")


if __name__ == "__main__":
    run.start(main)
