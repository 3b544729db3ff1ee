"""The metrics written straight from their words with NumPy, SciPy and scikit-learn, in double precision: an oracle.

One map at a time: features [C, H, W], image [3, H0, W0] in [0, 1]. Nothing here is shared with 02_metrics.py but the
words of the paper and of its docstrings.
"""

import math

import numpy as np
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score


def degenerate(features):
    norm = np.linalg.norm(features, axis=0)
    return not np.isfinite(features).all() or norm.size < 2 or not norm.std(ddof=1) > 1e-4 * norm.mean()


def standardised(array):
    return (array - array.mean()) / max(array.std(ddof=1), 1e-8)


def positions(features):
    """Channels standardised, [H * W, C]."""
    flat = features.reshape(len(features), -1).T
    return (flat - flat.mean(0)) / (flat.std(0) + 1e-6)


def structure_contrast(features):
    norm = standardised(np.linalg.norm(features, axis=0))
    rows, columns = (min(16, side) for side in norm.shape)
    height, width = norm.shape[0] // rows, norm.shape[1] // columns
    means, variances = [], []
    for i in range(rows):
        for j in range(columns):
            cell = norm[i * height : (i + 1) * height, j * width : (j + 1) * width]
            means.append(cell.mean())
            variances.append(cell.var())
    between, within = np.var(means), max(np.mean(variances), 1e-6)
    return between / (between + within)


def clustering(features, seed=0):
    """SCS with scikit-learn's parts; no more than 4096 positions, and no more than 2000 for the silhouette."""
    rng = np.random.default_rng(seed)
    points = positions(features)
    points = points[rng.permutation(len(points))[:4096]]
    points = PCA(min(32, *points.shape), svd_solver="full").fit_transform(points)
    scores = []
    for k in (6, 8, 10):
        labels = KMeans(k, n_init=10, random_state=seed).fit_predict(points)
        chosen = np.arange(len(points))
        if len(points) > 2000:  # stratified by cluster
            shares = [rng.permutation(np.flatnonzero(labels == c)) for c in range(k)]
            chosen = np.concatenate([s[: max(1, round(2000 * len(s) / len(points)))] for s in shares])
        scores.append(silhouette_score(points[chosen], labels[chosen]))
    return (np.median(scores) + 1) / 2


def sobel(array):
    return np.hypot(ndimage.sobel(array, 0, mode="nearest"), ndimage.sobel(array, 1, mode="nearest")) / 4


def resized(channel, size):
    """Bilinear, corners not aligned, no antialiasing."""
    where = []
    for new, old in zip(size, channel.shape, strict=True):
        where.append(np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1))
    return ndimage.map_coordinates(channel, np.meshgrid(*where, indexing="ij"), order=1)


def zones(image, size, inner=2, outer=4):
    """core, near, far: bool [H - 2, W - 2]."""
    light = []
    for channel in image:
        srgb = resized(channel, size)
        light.append(np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4))
    magnitude = sobel(np.tensordot([0.2126, 0.7152, 0.0722], light, 1))
    inside = magnitude[1:-1, 1:-1]
    spread = inside.max() - inside.min()
    centreline = np.zeros(inside.shape, bool)
    if spread >= 1e-6:
        magnitude = np.clip((magnitude - inside.min()) / spread, 0, 1)
        inside = magnitude[1:-1, 1:-1]
        threshold = np.sort(inside.ravel())[-math.ceil(0.1 * inside.size)]
        peaks = inside >= ndimage.maximum_filter(magnitude, 3)[1:-1, 1:-1] - 1e-6
        centreline = (inside >= threshold) & peaks
    distance = (
        ndimage.distance_transform_cdt(~centreline, "chessboard") if centreline.any() else np.full(inside.shape, 99)
    )
    return distance <= inner, (distance > inner) & (distance <= outer), distance > outer


def component(features):
    points = positions(features)
    return PCA(1, svd_solver="full").fit_transform(points)[:, 0].reshape(features.shape[1:])


def high_frequency(array):
    height, width = array.shape
    window = np.hanning(height)[:, None] * np.hanning(width)
    power = np.abs(np.fft.fftshift(np.fft.fft2(array * window))) ** 2
    radius = np.hypot(*np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"))
    return power[radius / radius.max() >= 0.15].sum() / power.sum()


def resemblance_radius(norm):
    """r_tau: the first radius at which the map's detail no longer resembles itself."""
    height, width = norm.shape
    padded = np.pad(norm, 1)
    detail = norm - sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3)) / 9
    largest = max(1, math.floor(0.6 * min(height, width)))
    radii = np.unique(np.round(np.logspace(0, np.log10(largest), 16)).astype(int))
    for radius in radii:
        similarities = []
        for dy in (-radius, 0, radius):
            for dx in (-radius, 0, radius):
                if (dy, dx) != (0, 0):
                    a = detail[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
                    b = detail[max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)]
                    similarities.append(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        if np.mean(similarities) < 0.5:
            return radius
    return radii[-1]


def scores(features, image):
    """Every component but SCS and SC, and both forms of EF."""
    features, image = np.asarray(features, float), np.asarray(image, float)
    names = ("SFC", "EC", "NC", "FAR", "FC", "FC_PCA", "SP", "EF", "EF_RELEASED")
    if degenerate(features):
        return dict.fromkeys(names, 0.0)
    norm, principal = np.linalg.norm(features, axis=0), component(features)
    core, near, far = zones(image, norm.shape)
    principal = (principal - principal.min()) / (principal.max() - principal.min())
    magnitude = sobel(principal)[1:-1, 1:-1]
    threshold = np.sort(magnitude.ravel())[-math.ceil(0.1 * magnitude.size)]
    strength = np.where(magnitude >= threshold, magnitude, 0)
    ec, nc, fa = (strength[zone].sum() / strength.sum() for zone in (core, near, far))
    fc = high_frequency(standardised(norm))
    fc_pca = high_frequency(np.clip(standardised(principal), -8, 8))
    sp = 1 / (1 + resemblance_radius(norm) / 64)
    ef, released = 100 * ec * nc * fc * sp, 100 * nc * (1 - fa) * fc_pca * sp
    values = (structure_contrast(features), ec, nc, fa, fc, fc_pca, sp, ef, released)
    return dict(zip(names, values, strict=True))
