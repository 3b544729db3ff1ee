"""The scores written straight from their words, an oracle for 02_metrics.py.

It uses NumPy, SciPy and scikit-learn in double precision. It takes one map, features [C, H, W], and
one image [3, H0, W0] in [0, 1]. It shares nothing with 02_metrics.py but the words of the paper and
of its docstrings.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

SCORES = ("SFC", "EC", "NC", "FAR", "FC", "FC_PCA", "SP", "EF", "EF_RELEASED")


def is_degenerate(features):
    norm = np.linalg.norm(features, axis=0)
    if not np.isfinite(features).all() or norm.size < 2:
        return True
    return not norm.std(ddof=1) > 1e-4 * norm.mean()


def standardise(array):
    return (array - array.mean()) / max(array.std(ddof=1), 1e-8)


def standardised_positions(features):
    """Positions [H*W, C], each channel standardised."""
    flat = features.reshape(len(features), -1).T
    return (flat - flat.mean(0)) / (flat.std(0) + 1e-6)


def first_component(features):
    points = standardised_positions(features)
    component = PCA(1, svd_solver="full").fit_transform(points)[:, 0]
    return component.reshape(features.shape[1:])


# ------------------------------------------------------------------ Structural Coherence
def structured_feature_contrast(norm):
    norm = standardise(norm)
    rows, columns = min(16, norm.shape[0]), min(16, norm.shape[1])
    height, width = norm.shape[0] // rows, norm.shape[1] // columns
    means, variances = [], []
    for i in range(rows):
        for j in range(columns):
            cell = norm[i * height : (i + 1) * height, j * width : (j + 1) * width]
            means.append(cell.mean())
            variances.append(cell.var())
    between, within = np.var(means), max(np.mean(variances), 1e-6)
    return between / (between + within)


def structural_clustering_score(features, seed=0):
    """SCS of at most 4096 positions, with a silhouette of at most 2000 of them."""
    rng = np.random.default_rng(seed)
    points = standardised_positions(features)
    points = points[rng.permutation(len(points))[:4096]]
    points = PCA(min(32, *points.shape), svd_solver="full").fit_transform(points)
    silhouettes = []
    for k in (6, 8, 10):
        labels = KMeans(k, n_init=10, random_state=seed).fit_predict(points)
        chosen = np.arange(len(points))
        if len(points) > 2000:
            # Each cluster keeps its share.
            chosen = []
            for cluster in range(k):
                members = rng.permutation(np.flatnonzero(labels == cluster))
                count = max(1, round(2000 * len(members) / len(points)))
                chosen.extend(members[:count])
        silhouettes.append(silhouette_score(points[chosen], labels[chosen]))
    return (np.median(silhouettes) + 1) / 2


# ------------------------------------------------------------------ Edge Fidelity
def sobel(array):
    down = ndimage.sobel(array, 0, mode="nearest")
    across = ndimage.sobel(array, 1, mode="nearest")
    return np.hypot(down, across) / 4


def resize(channel, size):
    """Bilinear, corners not aligned, without antialiasing."""
    where = []
    for new, old in zip(size, channel.shape, strict=True):
        where.append(np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1))
    return ndimage.map_coordinates(channel, np.meshgrid(*where, indexing="ij"), order=1)


def image_edges(image, size):
    light = []
    for channel in image:
        srgb = resize(channel, size)
        light.append(np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4))
    return sobel(np.tensordot([0.2126, 0.7152, 0.0722], light, 1))


def thinned_image_edges(image, size):
    """bool [H-2, W-2]."""
    magnitude = image_edges(image, size)
    inside = magnitude[1:-1, 1:-1]
    low, contrast = inside.min(), inside.max() - inside.min()
    if contrast < 1e-6:
        return np.zeros(inside.shape, bool)
    magnitude = np.clip((magnitude - low) / contrast, 0, 1)
    inside = magnitude[1:-1, 1:-1]
    threshold = np.sort(inside.ravel())[-math.ceil(0.1 * inside.size)]
    peaks = inside >= ndimage.maximum_filter(magnitude, 3)[1:-1, 1:-1] - 1e-6
    return (inside >= threshold) & peaks


class Zones(NamedTuple):
    """bool [H-2, W-2] each."""

    core: np.ndarray
    near: np.ndarray
    far: np.ndarray


def find_zones(image, size, inner=2, outer=4):
    thinned = thinned_image_edges(image, size)
    distance = np.full(thinned.shape, 99)
    if thinned.any():
        distance = ndimage.distance_transform_cdt(~thinned, "chessboard")
    return Zones(distance <= inner, (distance > inner) & (distance <= outer), distance > outer)


def edge_concentration(component, zones):
    """The shares of edge strength in the core, near and far zone: EC, NC and FAR."""
    magnitude = sobel(component)[1:-1, 1:-1]
    threshold = np.sort(magnitude.ravel())[-math.ceil(0.1 * magnitude.size)]
    strength = np.where(magnitude >= threshold, magnitude, 0)
    return [strength[zone].sum() / strength.sum() for zone in zones]


def frequency_content(array):
    height, width = array.shape
    window = np.hanning(height)[:, None] * np.hanning(width)
    power = np.abs(np.fft.fftshift(np.fft.fft2(array * window))) ** 2
    radius = np.hypot(np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width))
    return power[radius / radius.max() >= 0.15].sum() / power.sum()


def resemblance_radius(norm):
    """The first radius at which the map's detail no longer resembles itself."""
    height, width = norm.shape
    padded = np.pad(norm, 1)
    blurred = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3)) / 9
    detail = norm - blurred
    largest = max(1, math.floor(0.6 * min(height, width)))
    radii = np.unique(np.round(np.logspace(0, np.log10(largest), 16)).astype(int))
    for radius in radii:
        similarities = []
        for dy in (-radius, 0, radius):
            for dx in (-radius, 0, radius):
                if dy == dx == 0:
                    continue
                a = detail[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
                b = detail[max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)]
                similarities.append(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        if np.mean(similarities) < 0.5:
            return radius
    return radii[-1]


def spatial_precision(norm):
    return 1 / (1 + resemblance_radius(norm) / 64)


# ------------------------------------------------------------------ all of them
def scores(features, image):
    """{score: float} for all of SCORES: all but SCS and SC."""
    features, image = np.asarray(features, float), np.asarray(image, float)
    if is_degenerate(features):
        return dict.fromkeys(SCORES, 0.0)
    norm, component = np.linalg.norm(features, axis=0), first_component(features)
    component = (component - component.min()) / (component.max() - component.min())
    ec, nc, far = edge_concentration(component, find_zones(image, norm.shape))
    fc = frequency_content(standardise(norm))
    fc_pca = frequency_content(np.clip(standardise(component), -8, 8))
    sp = spatial_precision(norm)
    return {
        "SFC": structured_feature_contrast(norm),
        "EC": ec,
        "NC": nc,
        "FAR": far,
        "FC": fc,
        "FC_PCA": fc_pca,
        "SP": sp,
        "EF": 100 * ec * nc * fc * sp,
        "EF_RELEASED": 100 * nc * (1 - far) * fc_pca * sp,
    }
