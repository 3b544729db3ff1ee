"""Stage 2: measure which way each encoder leans, at each output stride, without labels.

    python 02_metrics.py                     the shipped example, runs/toycity
    python 02_metrics.py --run runs/mine     any run folder that 01_extract.py has filled

Structural Coherence (SC) asks whether a feature map is made of large, distinct regions. Edge
Fidelity (EF) asks whether its edges lie where the image's edges lie. Both follow the paper (arXiv
2605.16864). The edge readout (ER, ours), a linear probe, asks how well a map predicts the image's
edges, and compares encoders at one output stride. Three controls need no encoder and show what a
score is worth: white noise, the image itself, and the image shifted.

From Python, structural_coherence(features) and edge_fidelity(features, image) score one feature
map. The stage reads run.json and features/. It writes metrics.csv (a row for each image, source and
stride, where a source is an encoder or a control), metrics.json (means with 95 % bootstrap
intervals over the images), metrics.png (the scores by stride) and edges.png (each encoder's edges
at the stride where its EF peaks).
"""

import csv
import functools
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import run
from common.encoders import STRIDES, pyramid
from common.figures import EdgePanel, draw_edges, draw_profiles
from common.images import read_run_image
from common.run import CORES, DEVICES, flag, natural, positive, require

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

CONTROLS = ("noise", "image", "shifted")
SC_SCORES = (
    "SFC",  # structured feature contrast
    "SCS",  # structural clustering score
    "SC",  # Structural Coherence
)
EF_SCORES = (
    "EC",  # edge concentration: the share of edge strength in the core zone
    "NC",  # near-edge concentration: in the near zone
    "FAR",  # the rest
    "FC",  # frequency content of the feature norm
    "FC_PCA",  # of the first principal component, as in the authors' code
    "SP",  # spatial precision
    "EF",  # Edge Fidelity: the paper's product
    "EF_RELEASED",  # that of the authors' code
)
SCORES = (*SC_SCORES, *EF_SCORES, "ER")
PRINTED_DIGITS = {"SC": 3, "EF": 1, "EF_RELEASED": 1, "ER": 3}  # after the point

# structured feature contrast
CELLS = 16  # along each axis

# structural clustering score
MIN_POSITIONS = 8  # a map of fewer positions scores 0
MAX_POSITIONS = 4096
DIMENSIONS = 32  # principal components
CLUSTERS = (6, 8, 10)
RESTARTS = 10
LLOYD_STEPS = 100
# k-means has converged once its centres move by less than this share of the points' variance.
LLOYD_TOLERANCE = 1e-4
SILHOUETTE_POSITIONS = 2000

# edge concentration
TOP_SHARE = 0.1  # the strongest tenth of the gradients are edges
R_IN = 2  # the core zone around the image's edges, in map pixels
R_OUT = 4  # the near zone

# frequency content
HIGH_FREQUENCY = 0.15  # of the highest frequency (the spectrum's corner): from here on is detail
CLIP_PCA = 8  # standard deviations, where FC_PCA clips the component

# spatial precision
RADIUS_COUNT = 16  # radii that are tried
LARGEST_RADIUS = 0.6  # of the map's shorter side
SIMILARITY_THRESHOLD = 0.5  # of Pearson's correlation
SP_SCALE = 64  # map pixels at which SP falls to one half

# linear edge probe
PROBE_POSITIONS = 2048
FOLDS = 4
# Times the number of channels, so that a map and its copy with each channel twice get the same ER
RIDGE = 0.01
WAVES = 4  # cosines along each axis, which stand for position in the image, see probe_samples()

NOISE_CHANNELS = 64  # of the control


@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder")
    device: str = flag(DEVICES[0], choices=DEVICES)
    workers: int = flag(CORES, "images at a time, each on a core of its own", type=positive)
    seed: int | None = flag(
        None, "seed of samples, noise and resamples (default: the run's)", type=natural
    )


# ------------------------------------------------------------------ what both scores start from
def channel_norm(features):
    """L2 norm over the channels of [..., C, H, W]: [..., H, W]."""
    # On a CPU ten times faster than torch.linalg.vector_norm
    return features.square().sum(-3).sqrt()


def is_degenerate(features):
    """Is there nothing to measure in a feature map [C, H, W]?

    So it is if the standard deviation of its L2 norm is under 1e-4 of the mean: for constant maps,
    for an untrained ViT's tokens (LayerNorm gives all of them one length), for NaN and infinity,
    and for a single pixel.
    """
    norm = channel_norm(features)
    return not norm.std() > 1e-4 * norm.mean()  # "<=" would be False for NaN


def standardise(values):
    """Bring a map [H, W] to mean 0 and (unbiased) standard deviation 1."""
    return (values - values.mean()) / values.std().clamp_min(1e-8)


def standardised_positions(features):
    """A map [C, H, W] as positions [H*W, C], each channel with mean 0 and standard deviation 1."""
    channels = features.flatten(1)
    channels = channels - channels.mean(1, keepdim=True)
    std = torch.linalg.vector_norm(channels, dim=1, keepdim=True) / channels.shape[1] ** 0.5
    return (channels / (std + 1e-6)).T


def principal_components(positions, count):
    """Positions [n, C] in their first principal components: [n, min(count, n, C)]."""
    positions = positions - positions.mean(0)
    if len(positions) < positions.shape[1]:
        # Cheaper with few positions: the eigenvectors of their n x n products, times the roots of
        # the eigenvalues, are the positions in their principal components.
        variances, coordinates = torch.linalg.eigh(positions @ positions.T)  # rising variance
        components = coordinates * variances.clamp_min(0).sqrt()
    else:
        _, directions = torch.linalg.eigh(positions.T @ positions / len(positions))
        components = positions @ directions[:, -count:]
    return components[:, -count:].flip(1)


# ------------------------------------------------------------------ Structural Coherence, SC
@torch.no_grad()
def structural_coherence(features, seed=0):
    """Score how far a feature map is made of large, distinct regions (paper, arXiv 2605.16864).

        SC = sqrt(SFC * SCS)

    features: [C, H, W], any float type, any device. Returns {"SFC", "SCS", "SC": float in [0, 1]}.
    A degenerate map scores 0. seed: for the choice of positions and the start of k-means.
    ValueError for a batch of maps.
    """
    if features.ndim != 3:
        raise ValueError(f"expected one map [C, H, W], got {list(features.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        if is_degenerate(features):
            return dict.fromkeys(SC_SCORES, 0.0)
        sfc = structured_feature_contrast(channel_norm(features))
        scs = structural_clustering_score(features, seed)
    return {"SFC": sfc, "SCS": scs, "SC": math.sqrt(sfc * scs)}


def structured_feature_contrast(norm):
    """SFC of an L2-norm map [H, W]: how much it differs between cells rather than inside them.

        SFC = V / (V + N)    V: variance of the cells' means, N: mean of the cells' variances

    On small maps a cell is one pixel and SFC is 1, which says little.
    """
    rows = min(CELLS, norm.shape[0])
    columns = min(CELLS, norm.shape[1])
    height = norm.shape[0] // rows  # of a cell
    width = norm.shape[1] // columns
    # Standardised, so that the floor of 1e-6 below means the same on any map
    cells = standardise(norm)[: rows * height, : columns * width]
    cells = cells.reshape(rows, height, columns, width).transpose(1, 2)
    cells = cells.flatten(2)  # [rows, columns, pixels of a cell]
    between = cells.mean(2).var(correction=0)
    within = cells.var(2, correction=0).mean().clamp_min(1e-6)
    return (between / (between + within)).item()


def structural_clustering_score(features, seed):
    """SCS of a map [C, H, W]: how well its positions fall into 6, 8 and 10 clusters.

    SCS = (median of the mean silhouettes + 1) / 2
    """
    positions = standardised_positions(features)  # [H*W, C]
    if len(positions) < MIN_POSITIONS:
        return 0.0
    # Drawn on the CPU, so that the sample is the same on any device.
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(positions), generator=generator)[:MAX_POSITIONS]
    points = principal_components(positions[sample.to(positions.device)], DIMENSIONS)  # [n, D]
    silhouettes = []
    for k in CLUSTERS:
        labels = kmeans(points, k, generator)  # [n]
        # A stratified sample: evenly spaced among the positions sorted by label, so that each
        # cluster keeps its share.
        count = min(SILHOUETTE_POSITIONS, len(points))
        places = torch.linspace(0, len(points) - 1, count, device=points.device).round().long()
        picks = labels.argsort(stable=True)[places]
        silhouettes.append(silhouette(points[picks], labels[picks], k))
    return (float(np.median(silhouettes)) + 1) / 2


# ------------------------------------------------------------------ Edge Fidelity, EF
@torch.no_grad()
def edge_fidelity(features, image):
    """Score whether a map's edges lie on the image's edges and are sharp (arXiv 2605.16864).

        EF = 100 * EC * NC * FC * SP                           the paper's, in [0, 25]
        EF_RELEASED = 100 * NC * (1 - FAR) * FC_PCA * SP       the authors' code's, in [0, 100]

    features: [C, H, W], any float type, any device. image: [3, H0, W0], sRGB in [0, 1]. Returns a
    float for each of EF_SCORES. EC, NC and FAR sum to 1, so EF is at most 25. A degenerate map, and
    one of less than 3 pixels along an axis, scores 0. ValueError for a batch or whole numbers.
    """
    if features.ndim != 3 or image.ndim != 3:
        raise ValueError("expected one map [C, H, W] and one image [3, H, W]")
    if not image.is_floating_point():
        raise ValueError("expected an image of floating-point numbers in [0, 1]")
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        if is_degenerate(features) or min(features.shape[1:]) < 3:
            return dict.fromkeys(EF_SCORES, 0.0)
        norm = channel_norm(features)
        component = first_component(features)
        edges = locate_edges(component, image.float())
        scores = edge_concentration(edges)
        scores["FC"] = frequency_content(standardise(norm))
        scores["FC_PCA"] = frequency_content(component.clamp(-CLIP_PCA, CLIP_PCA))
        scores["SP"] = spatial_precision(norm)
    scores["EF"] = 100 * scores["EC"] * scores["NC"] * scores["FC"] * scores["SP"]
    released = scores["NC"] * (1 - scores["FAR"]) * scores["FC_PCA"] * scores["SP"]
    scores["EF_RELEASED"] = 100 * released
    return scores


def first_component(features):
    """The first principal component of a map [C, H, W], standardised: [H, W]."""
    component = principal_components(standardised_positions(features), 1)
    return standardise(component.reshape(features.shape[1:]))


class Edges(NamedTuple):
    """Where a map has edges, and where they lie beside the image's.

    All are [H-2, W-2]: the outermost pixels are left out, as their gradient rests on padding.
    """

    strength: torch.Tensor  # of the map's edges, 0 elsewhere
    thinned: torch.Tensor  # bool: the image's edges, one pixel thin
    zone: torch.Tensor  # 1 core, 2 near, 3 far from the image's edges


def locate_edges(component, image):
    """Find the edges of a map, from its first component [H, W], and the zones around the image's.

    Zones count in map pixels, in squares around the thinned image edges: core is within R_IN, near
    is further out within R_OUT, far is the rest.
    """
    gradient = sobel(component)[1:-1, 1:-1]
    strength = gradient * strongest(gradient)
    thinned = thinned_image_edges(image, component.shape)
    core = dilate(thinned, R_IN)
    near = dilate(thinned, R_OUT) & ~core
    zone = torch.full(thinned.shape, 3, device=thinned.device)
    zone[core] = 1
    zone[near] = 2
    return Edges(strength, thinned, zone)


def edge_concentration(edges):
    """EC, NC and FAR: the shares of the map's edge strength in the core, near and far zone."""
    total = edges.strength.sum().clamp_min(1e-12)
    scores = {}
    for zone, name in enumerate(("EC", "NC", "FAR"), 1):
        scores[name] = (edges.strength[edges.zone == zone].sum() / total).item()
    return scores


def sobel(values):
    """Magnitude of the Sobel gradient (kernel / 4, replicate padding) of a map [H, W]."""
    values = F.pad(values[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    smoothed_down = (values[:-2] + 2 * values[1:-1] + values[2:]) / 4
    smoothed_across = (values[:, :-2] + 2 * values[:, 1:-1] + values[:, 2:]) / 4
    difference_across = smoothed_down[:, 2:] - smoothed_down[:, :-2]
    difference_down = smoothed_across[2:] - smoothed_across[:-2]
    return torch.hypot(difference_across, difference_down)


def strongest(gradient):
    """The strongest tenth of a map [h, w], bool."""
    count = math.ceil(TOP_SHARE * gradient.numel())
    chosen = torch.zeros_like(gradient, dtype=torch.bool).flatten()
    chosen[gradient.flatten().topk(count).indices] = True
    return chosen.view_as(gradient)


def dilate(mask, radius):
    """All pixels within a square of `radius` around those of a mask [h, w]."""
    size = 2 * radius + 1
    return F.max_pool2d(mask[None].float(), size, stride=1, padding=radius)[0] > 0


def image_edges(image, size):
    """Strength of the edges of an image [3, H0, W0], sRGB in [0, 1], on a map of `size`: [H, W]."""
    image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
    # From sRGB to linear light, and its luminance by BT.709
    linear = torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)
    luminance = torch.einsum("chw,c->hw", linear, linear.new_tensor([0.2126, 0.7152, 0.0722]))
    return sobel(luminance)


def thinned_image_edges(image, size):
    """The image's edges on a map of `size`, where largest among 3 x 3 pixels: bool [H-2, W-2]."""
    gradient = image_edges(image, size)  # [H, W]
    inner = gradient[1:-1, 1:-1]
    low = inner.min()
    contrast = inner.max() - low
    if contrast < 1e-6:  # an image without contrast has no edges
        return torch.zeros_like(inner, dtype=torch.bool)
    # Stretched to [0, 1], so that the tolerance of 1e-6 below means the same on any image. Pixels
    # of the border, whose gradient rests on padding, may exceed that range and are clamped.
    gradient = ((gradient - low) / contrast).clamp(0, 1)
    inner = gradient[1:-1, 1:-1]
    is_maximum = inner >= F.max_pool2d(gradient[None], 3, stride=1)[0] - 1e-6
    return strongest(inner) & is_maximum


def frequency_content(values):
    """FC of a standardised map [H, W]: its share of spectral power at radius >= 0.15.

    Radius 1 is the corner of the spectrum. The power at frequency 0 is not left out of the sum.
    """
    height, width = values.shape
    rows = torch.hann_window(height, periodic=False, device=values.device)
    columns = torch.hann_window(width, periodic=False, device=values.device)
    spectrum = torch.fft.fftshift(torch.fft.fft2(values * torch.outer(rows, columns)))
    power = spectrum.abs().square()  # [H, W]
    # The design's radius: on an even side, frequency 0 lies half a step off the centre of the grid.
    y = torch.linspace(-1, 1, height, device=values.device)
    x = torch.linspace(-1, 1, width, device=values.device)
    radius = torch.hypot(y[:, None], x[None])
    high = radius / radius.max() >= HIGH_FREQUENCY
    return (power[high].sum() / power.sum().clamp_min(1e-12)).item()


def spatial_precision(norm):
    """SP of an L2-norm map [H, W]: how soon its detail stops resembling itself when shifted.

        SP = 1 / (1 + r / 64)    r: first radius, in map pixels, at which Pearson's correlation of
                                 the map's detail with itself, over 8 directions, is below 0.5

    On real maps r is nearly always 1.
    """
    # The mean of 3 x 3 pixels, with zeros for those beyond the border
    blurred = F.avg_pool2d(norm[None], 3, stride=1, padding=1)[0]
    detail = standardise(norm - blurred)
    height, width = detail.shape
    largest = max(1, math.floor(LARGEST_RADIUS * min(height, width)))
    # Up to 16 radii at equal ratios; rounding makes some of them equal.
    radii = np.unique(np.geomspace(1, largest, RADIUS_COUNT).round().astype(int)).tolist()
    for r in radii:
        similarities = []
        # The correlation with the opposite shift is the same, so four directions do for eight.
        for dy, dx in ((r, 0), (0, r), (r, r), (r, -r)):
            left = max(0, -dx)  # how much of each side falls away
            right = max(0, dx)
            # What the map and the map shifted by (dy, dx) have in common
            here = detail[dy:, right : width - left]
            there = detail[: height - dy, left : width - right]
            products = standardise(here) * standardise(there)
            similarities.append(products.sum() / (here.numel() - 1))
        if torch.stack(similarities).mean() < SIMILARITY_THRESHOLD:
            break
    # Where none is below the threshold, r is the largest radius.
    return 1 / (1 + r / SP_SCALE)


# ------------------------------------------------------------------ linear edge probe, ER
class EdgeProbe:
    """Predicts the edges of images from a source's maps at one stride, by ridge regression (ours).

        w  = (G + RIDGE * C * I)^-1 g    G [C, C]: correlations of the channels with each other
                                         g [C]: of the channels with the edges
        ER = Pearson's r of X w with an image's edges, in [-1, 1]; X [n, C] are its positions

    G and g are means over the images of the other folds. Folds are blocks of neighbouring images,
    as those may be frames of one video. ER is about 0 for a map that encodes position only, and
    nothing that the image shows. Compare it at one stride and over the same images only: with more
    images to fit, it rises.
    """

    def __init__(self, image_count):
        self.image_count = image_count  # at least FOLDS
        self.sums = [0.0] * FOLDS  # of the correlations [C+1, C+1] of each fold's images

    def fold(self, index):
        return index * FOLDS // self.image_count

    def add(self, index, correlation):
        """Count image `index`, by the correlations of its probe_samples [C+1, C+1]."""
        self.sums[self.fold(index)] += correlation

    def fit(self):
        """Solve the regression for each fold, from all others. ValueError for too few images."""
        if self.image_count < FOLDS:
            raise ValueError(f"{FOLDS} folds need as many images, there are {self.image_count}")
        self.weights = []
        folds = [self.fold(index) for index in range(self.image_count)]
        for fold in range(FOLDS):
            other_sums = self.sums[:fold] + self.sums[fold + 1 :]  # two lists, joined
            # [C+1, C+1], the edges last
            mean = sum(other_sums) / (self.image_count - folds.count(fold))
            channels = len(mean) - 1
            gram = mean[:-1, :-1] + RIDGE * channels * torch.eye(channels, device=mean.device)
            self.weights.append(torch.linalg.solve(gram, mean[:-1, -1]))  # [C]

    def score(self, index, samples):
        """ER of image `index`, from its probe_samples [n, C+1]."""
        predicted = samples[:, :-1] @ self.weights[self.fold(index)]
        # Of two columns with mean 0, the cosine is Pearson's r.
        return F.cosine_similarity(predicted, samples[:, -1], dim=0).item()


def probe_samples(features, edges, seed=0):
    """A map [C, H, W] and the image's edges [H, W] at some positions: [n, C+1], the edges last.

    Position is regressed out of each column: images of one kind share a layout, and to know that a
    street lies below and the sky above is not to see edges. Columns have mean 0 and standard
    deviation 1. They are 0 for a degenerate map, and for one that is too small.
    """
    sample, waves = probe_positions(*edges.shape, seed, edges.device)
    points = features.flatten(1).index_select(1, sample)[:, None]  # [C, 1, n], a map of one row
    if is_degenerate(points):
        points = torch.zeros_like(points)
    edges = edges.flatten()[None, None, sample]  # [1, 1, n]
    columns = standardised_positions(torch.cat([points, edges]))  # [n, C+1]
    if len(columns) <= 2 * WAVES**2:  # position would explain most of so few
        return torch.zeros_like(columns)
    columns = columns - waves @ (waves.T @ columns)
    std = columns.square().mean(0).sqrt()
    # Where position explains all of a column, what is left is rounding.
    return torch.where(std > 1e-3, columns / std, 0)


@functools.lru_cache(64)  # the same for all maps of a size
def probe_positions(height, width, seed, device):
    """Positions of a map, int64 [n], and cosines over them, orthonormal [n, WAVES**2]."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(height * width, generator=generator)[:PROBE_POSITIONS]
    y = math.pi * (torch.arange(height) + 0.5) / height
    x = math.pi * (torch.arange(width) + 0.5) / width
    waves = []
    for i in range(WAVES):
        for j in range(WAVES):
            waves.append(torch.outer((i * y).cos(), (j * x).cos()).flatten()[sample])
    orthonormal = torch.linalg.qr(torch.stack(waves, 1)).Q
    return sample.to(device), orthonormal.to(device)


# ------------------------------------------------------------------ scores of a run's images
def control_map(control, image, stride, seed):
    """A map that needs no encoder: [64, H/stride, W/stride] of noise, or [3, ...] of the image."""
    height = image.shape[1] // stride
    width = image.shape[2] // stride
    if control == "noise":
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(NOISE_CHANNELS, height, width, generator=generator).to(image.device)
    if control == "shifted":
        image = image.roll((image.shape[1] // 3, image.shape[2] // 3), dims=(1, 2))
    return F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0]


def control_seed(seed, name, stride):
    """Noise differs from image to image and from stride to stride, and is the same in every run."""
    return zlib.crc32(f"{seed} {name} {stride}".encode())


def read_image_and_maps(settings, run_config, name):
    """An image of the run [3, H, W] and the maps of all sources, encoders first.

    The maps are {(source, stride): [C, H/stride, W/stride]}.
    """
    image = read_run_image(run_config, name).to(settings.device)
    maps = {}
    for encoder in run_config["encoders"]:
        native = {}
        for stride, features in run.read_features(settings.run, encoder, name).items():
            native[stride] = features[None].to(settings.device).float()
        for stride, level in pyramid(native, image.shape[1:]).items():
            maps[encoder, stride] = level[0]
    for control in CONTROLS:
        for stride in STRIDES:
            seed = control_seed(settings.seed, name, stride)
            maps[control, stride] = control_map(control, image, stride, seed)
    return image, maps


def score_image(settings, run_config, name):
    """SC and EF of all maps of an image, and the correlations for the edge probe.

    Returns {(source, stride): {score: float}} and {(source, stride): [C+1, C+1]}.
    """
    image, maps = read_image_and_maps(settings, run_config, name)
    scores = {}
    correlations = {}
    for key, features in maps.items():
        coherence = structural_coherence(features, settings.seed)
        fidelity = edge_fidelity(features, image)
        scores[key] = {**coherence, **fidelity, "ER": math.nan}
        samples = probe_samples(features, image_edges(image, features.shape[1:]), settings.seed)
        correlations[key] = samples.T @ samples / len(samples)
    return scores, correlations


def probe_image(settings, run_config, name, index, probes):
    """ER of all maps of an image: {(source, stride): float}."""
    image, maps = read_image_and_maps(settings, run_config, name)
    scores = {}
    for key, features in maps.items():
        samples = probe_samples(features, image_edges(image, features.shape[1:]), settings.seed)
        scores[key] = probes[key].score(index, samples)
    return scores


def score_images(settings, run_config, names):
    """All scores of all images: for each image {(source, stride): {score: float}}.

    The images are read twice, as the edge probe must be fitted before it can score.
    """
    table = []
    probes = {}
    # Image by image, as their sizes may differ. The tensors are too small for several cores to
    # share, so each worker has an image and a core to itself.
    with ThreadPoolExecutor(settings.workers) as pool:
        scored = pool.map(functools.partial(score_image, settings, run_config), names)
        for index, (scores, correlations) in enumerate(tqdm(scored, "metrics", len(names))):
            table.append(scores)
            for key, correlation in correlations.items():
                probes.setdefault(key, EdgeProbe(len(names))).add(index, correlation)
        if len(names) < FOLDS:
            print(f"WARNING: the edge probe needs {FOLDS} images, there are {len(names)}: no ER")
            return table
        for probe in probes.values():
            probe.fit()

        def probe_at(index):
            return probe_image(settings, run_config, names[index], index, probes)

        probed = pool.map(probe_at, range(len(names)))
        for scores, er_of in zip(table, tqdm(probed, "edge probe", len(names)), strict=True):
            for key, er in er_of.items():
                scores[key]["ER"] = er
    return table


# ------------------------------------------------------------------ means and figures
def summarise(table, sources, seed):
    """Means over images with 95 % bootstrap intervals.

    Returns {source: {"4": {"SC": {"mean", "low", "high"}, ...}}}. The interval of ER is over the
    images scored: the regression is not fitted again.
    """
    weights = run.bootstrap_weights(len(table), seed)  # [1 + resamples, images]
    summary = {}
    for source in sources:
        summary[source] = {}
        for stride in STRIDES:
            summary[source][str(stride)] = {}
            for name in SCORES:
                means = weights @ [scores[source, stride][name] for scores in table]
                low, high = np.percentile(means[1:], [2.5, 97.5])
                numbers = {"mean": means[0], "low": low, "high": high}
                summary[source][str(stride)][name] = numbers
    return summary


def count_degenerate(table, encoders):
    """How many images have a degenerate map: {encoder: {"4": count, ...}}."""
    counts = {}
    for encoder in encoders:
        counts[encoder] = {}
        for stride in STRIDES:
            count = 0
            for scores in table:
                # SP is above 0 for all other maps of three pixels or more.
                score = scores[encoder, stride]
                count += score["SFC"] == 0 and score["SP"] == 0
            counts[encoder][str(stride)] = count
    return counts


def write_scores(path, table, names):
    """Write every score of every map, a row for each image, source and stride."""
    with (
        run.whole_file(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["image", "source", "stride", *SCORES])
        for name, scores in zip(names, table, strict=True):
            for (source, stride), values in scores.items():
                numbers = [f"{values[score]:.9g}" for score in SCORES]
                writer.writerow([name, source, stride, *numbers])


def edge_rows(settings, run_config, names, summary):
    """Rows for draw_edges: three images, with each encoder's edges where its mean EF peaks."""
    rows = []
    for name in run.evenly_spaced(names, 3):
        image, maps = read_image_and_maps(settings, run_config, name)
        panels = []
        for encoder in run_config["encoders"]:
            ef = {s: summary[encoder][str(s)]["EF"]["mean"] for s in STRIDES}
            stride = max(ef, key=ef.get)
            features = maps[encoder, stride]
            if min(features.shape[1:]) < 3:
                continue
            if is_degenerate(features):
                features = torch.zeros_like(features)  # without edges, as its scores say
            edges = locate_edges(first_component(features), image)
            shares = edge_concentration(edges)
            words = ", ".join(f"{part} {share:.2f}" for part, share in shares.items())
            zones = torch.where(edges.strength > 0, edges.zone, 0)
            title = f"{encoder}, OS {stride}\n{words}"
            panels.append(EdgePanel(title, edges.thinned.cpu(), zones.cpu()))
        has_edges = all(panel.thinned.any() for panel in panels)
        if len(panels) == len(run_config["encoders"]) and has_edges:
            rows.append((image.cpu(), panels))
        else:
            print(f"edges.png leaves out {name}: no contrast, or a map of less than 3 pixels")
    return rows


def report(metrics, folder):
    """Print a row for each source and score, controls last, and what may make scores useless."""
    rows = [["source", "score", *(f"OS {stride}" for stride in STRIDES)]]
    for source, profile in metrics["scores"].items():
        for score, digits in PRINTED_DIGITS.items():
            means = [profile[str(stride)][score]["mean"] for stride in STRIDES]
            rows.append([source, score, *(run.number(mean, digits) for mean in means)])
    print(f"\n{run.table(rows)}")
    print(f"means over {metrics['images']} images; {', '.join(CONTROLS)} are controls, no encoder")
    for encoder in metrics["random_weights"]:
        print(f"WARNING: {encoder} has RANDOM weights: its scores say nothing about a trained one")
    for encoder, counts in metrics["degenerate"].items():
        for stride, count in counts.items():
            if count:
                maps = f"{count} maps of {encoder} at OS {stride}"
                print(f"WARNING: {maps} are constant or not finite, and score 0")
    written = ["metrics.csv", "metrics.json", "metrics.png"]
    if (folder / "edges.png").is_file():
        written.append("edges.png")
    print(f"\nwrote {', '.join(written)} in {folder}")
    if (folder / "selection.json").is_file():
        print("selection.json is older than these metrics: 03_select.py makes it anew")
    print(f"next: {run.command('03_select.py', folder)}")


# ------------------------------------------------------------------ k-means and silhouette
def kmeans(points, k, generator):
    """Cluster points [n, D] by k-means: labels int64 [n] of the best of RESTARTS starts.

    All starts take Lloyd's steps side by side, until the best of them has converged.
    """
    centres = first_centres(points, k, generator)  # [R, k, D]
    threshold = LLOYD_TOLERANCE * points.var(0, correction=0).mean()
    for _ in range(LLOYD_STEPS):
        distance = squared_distances(centres, points)  # [R, k, n]
        nearest = distance.amin(1, keepdim=True)  # [R, 1, n]
        best = nearest.sum(2).argmin()  # by its inertia
        # Which centre is nearest? argmin() would be slow, so each distance is compared with the
        # smallest one, and the result overwrites it. Centres on one spot then share their points.
        member = distance.eq_(nearest)  # [R, k, n], 1.0 or 0.0
        size = member.sum(2, keepdim=True)  # [R, k, 1]
        means = member @ points / size.clamp_min(1)
        moved = torch.where(size > 0, means, centres)  # the centre of an empty cluster stays
        movement = (moved - centres).square().sum((1, 2))  # [R]
        centres = moved
        if movement[best] <= threshold:
            break
    return squared_distances(centres[best], points).argmin(0)


def first_centres(points, k, generator):
    """Points [RESTARTS, k, D] far from each other, for k-means to start from (k-means++).

    Each is drawn in proportion to its squared distance to the nearest one before it.
    """
    first = torch.randint(len(points), (RESTARTS, 1), generator=generator)
    centres = points[first.to(points.device)]  # [R, 1, D]
    nearest = torch.tensor(torch.inf, device=points.device)
    for _ in range(k - 1):
        distance = squared_distances(centres[:, -1], points)  # [R, n], to the last one
        nearest = torch.minimum(nearest, distance)
        likelihood = nearest.cpu() + 1e-12  # there may be fewer different points than centres
        drawn = torch.multinomial(likelihood, 1, generator=generator)
        centres = torch.cat([centres, points[drawn.to(points.device)]], dim=1)
    return centres


def squared_distances(centres, points):
    """Squared distances of centres [..., D] to points [n, D]: [..., n]."""
    flat = centres.flatten(0, -2)
    # |c - p|^2 = |c|^2 + |p|^2 - 2 c.p
    squares = flat.square().sum(1, keepdim=True) + points.square().sum(1)
    distances = torch.addmm(squares, flat, points.T, alpha=-2)
    return distances.clamp_min(0).unflatten(0, centres.shape[:-1])


def silhouette(points, labels, k):
    """Mean silhouette, in [-1, 1], of points [n, D] with labels [n] below k (Rousseeuw 1987).

        s = (b - a) / max(a, b)    a: mean distance to the points of the same cluster,
                                   b: to those of the nearest other cluster

    A point that is alone in its cluster has 0.
    """
    distance = torch.cdist(points, points)  # [n, n]
    member = F.one_hot(labels, k).float()  # [n, k]
    size = member.sum(0)  # [k]
    total = (member.T @ distance).T  # [n, k], twice as fast as distance @ member
    size_of_own = size[labels]  # [n]
    inside = total.gather(1, labels[:, None])[:, 0] / (size_of_own - 1).clamp_min(1)
    own_or_empty = (member > 0) | (size == 0)
    outside = (total / size.clamp_min(1)).masked_fill(own_or_empty, torch.inf).amin(1)
    scores = (outside - inside) / torch.maximum(outside, inside).clamp_min(1e-12)
    return torch.where((size_of_own > 1) & outside.isfinite(), scores, 0).mean().item()


# ------------------------------------------------------------------ the stage
def finished_run(folder):
    """Read run.json of a finished extraction, and list the images that can be used."""
    run_config = run.read_stage(folder, "run.json", "01_extract.py")
    require(
        "left_out" in run_config,
        f"the extraction into {folder} has not ended: start 01_extract.py again with the "
        "flags it had, it goes on where it stopped",
    )
    return run_config, [n for n in run_config["images"] if n not in run_config["left_out"]]


def main():
    settings = run.parse(__doc__, Settings)
    folder = settings.run
    run_config, names = finished_run(folder)
    if settings.seed is None:
        settings.seed = run_config["seed"]
    encoders = run_config["encoders"]

    torch.set_num_threads(1)
    # On a GPU the first eigh loads its library, which two threads must not do at once.
    torch.linalg.eigh(torch.eye(2, device=settings.device))
    table = score_images(settings, run_config, names)
    write_scores(folder / "metrics.csv", table, names)
    metrics = {
        "benchmark": run_config["benchmark"],
        "encoders": encoders,
        "controls": list(CONTROLS),
        "strides": list(STRIDES),
        "images": len(names),
        "random_weights": [e for e in encoders if run_config["weights"][e] == "none"],
        "degenerate": count_degenerate(table, encoders),
        "scores": summarise(table, [*encoders, *CONTROLS], settings.seed),
    }
    run.write_json(folder / "metrics.json", metrics)
    draw_profiles(folder / "metrics.png", metrics)
    (folder / "edges.png").unlink(missing_ok=True)
    rows = edge_rows(settings, run_config, names, metrics["scores"])
    if rows:
        draw_edges(folder / "edges.png", rows)
    report(metrics, folder)


if __name__ == "__main__":
    run.start(main)
