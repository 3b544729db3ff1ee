"""Stage 2: measure which way each encoder leans, stride by stride, without labels.

Structural Coherence (SC) asks whether a feature map is made of large, distinct regions; Edge Fidelity (EF) asks whether
its edges lie where the picture's edges lie. Both follow the paper (arXiv 2605.16864). Three controls that need no
encoder are measured beside the encoders (white noise, the picture itself, the picture shifted), for a score means
something only where it clears them.

    python 02_metrics.py                     # the embedded benchmark, runs/toycity
    python 02_metrics.py --run runs/mine     # any run folder that 01_extract.py has filled
    python 02_metrics.py --ground-truth      # does SC agree with the true segments? Needs a benchmark's labels

Reads run.json and features/. Writes metrics.csv (a row per image, source and stride), metrics.json (means with 95 %
bootstrap intervals over the images), metrics.png (the profiles) and edges.png (where each encoder's edges lie).
"""

import csv
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from tqdm import tqdm

from common import run
from common.benchmarks import open_split, read_image, resize_image, working_size
from common.encoders import STRIDES, pyramid
from common.figures import draw_profiles

CONTROLS = ("noise", "image", "shifted")
SCORES = ("SFC", "SCS", "SC", "EC", "NC", "FAR", "FC", "FC_PCA", "SP", "EF", "EF_RELEASED", "EF_CC")

# structural coherence
CELLS = 16  # SFC: cells along each axis
POSITIONS, DIMENSIONS = 4096, 32  # SCS: at most so many positions, of at most so many principal components
CLUSTERS = (6, 8, 10)
RESTARTS, TRIALS, COARSE, FINALISTS = 40, 4, 4, 4  # restarts race over a quarter of the positions, four go on over all
LLOYD_STEPS, LLOYD_TOLERANCE = 100, 1e-4  # stop once the centres move by less than this share of the variance
SILHOUETTE_POSITIONS = 2000

# edge fidelity
TOP_SHARE = 0.1  # the strongest tenth of the gradients are edges
R_IN, R_OUT = 2, 4  # zones around the picture's edges, in map pixels
HIGH_FREQUENCY = 0.15  # radius of the spectrum from which on power counts as detail
RADII, SP_THRESHOLD, SP_SCALE = 16, 0.5, 64

RESAMPLES = 1000  # bootstrap


# ------------------------------------------------------------------------------------- structural coherence (SC)


@torch.no_grad()
def structural_coherence(features, seed=0, components=None):
    """Score how far feature maps are made of large, distinct regions (paper, arXiv 2605.16864).

    features [B,C,H,W], any float type, any device. Returns {"SFC", "SCS", "SC"}, each float32 [B] in [0,1]:

        SFC = V / (V + N)                       V variance of cell means, N mean variance in cells, of the L2-norm map
        SCS = (median_k silhouette + 1) / 2     over k-means clusterings with k = 6, 8, 10
        SC  = sqrt(SFC * SCS)

    None of them changes when the channels are permuted or all features scaled; SFC stays when the features are rotated,
    SCS when each channel is scaled. Degenerate maps score 0. Every map of a batch is sampled at the same random
    positions, drawn from `seed`: a map's score does not depend on what else is in the batch. components: what
    components_of(features) gave, to spare computing them twice.
    """
    with torch.autocast(features.device.type, enabled=False):
        features, usable = blank_degenerate(features)
        sfc = feature_contrast(torch.linalg.vector_norm(features, dim=1))
        scs = clustering_score(features, seed, components)
        scores = {"SFC": sfc, "SCS": scs, "SC": (sfc * scs).sqrt()}
    return {name: torch.where(usable, score, 0) for name, score in scores.items()}


def blank_degenerate(features):
    """Return (features in float32 with degenerate maps set to 0, usable bool [B]).

    A map is degenerate if the std of its L2 norm is under 1e-4 of its mean: constant maps, and the normalised tokens of
    an untrained ViT, whose variation is rounding noise. NaN, infinity and a single pixel fail the comparison as well.
    """
    features = features.float()
    norm = torch.linalg.vector_norm(features, dim=1).flatten(1)  # [B,H*W]
    usable = norm.std(1) > 1e-4 * norm.mean(1)  # [B]
    return torch.where(usable[:, None, None, None], features, 0), usable


def components_of(features):
    """Principal components [B,H*W,<=32] of maps [B,C,H,W], for both scores; None where SCS samples the positions."""
    with torch.autocast(features.device.type, enabled=False):
        features, _ = blank_degenerate(features)
        _, channels, height, width = features.shape
        if height * width > POSITIONS:
            return None
        return principal_components(channels_standardised(features), min(DIMENSIONS, channels, height * width))


def standardise(maps):
    """[B,H,W] to mean 0 and (unbiased) std 1 for each map."""
    return (maps - maps.mean((1, 2), keepdim=True)) / maps.std((1, 2), keepdim=True).clamp_min(1e-8)


def feature_contrast(norm):
    """SFC of L2-norm maps [B,H,W]. On small maps a cell is one pixel, N is 0 and SFC 1: there it says little."""
    rows, columns = min(CELLS, norm.shape[1]), min(CELLS, norm.shape[2])
    height, width = norm.shape[1] // rows, norm.shape[2] // columns  # of a cell; what is left over is cropped
    cells = standardise(norm)[:, : rows * height, : columns * width]
    cells = cells.reshape(-1, rows, height, columns, width).transpose(2, 3).flatten(3)  # [B,rows,columns,pixels]
    between = cells.mean(3).flatten(1).var(1, correction=0)
    within = cells.var(3, correction=0).mean((1, 2)).clamp_min(1e-6)
    return between / (between + within)


def channels_standardised(features):
    """[B,C,H,W] to positions [B,H*W,C] whose every channel has mean 0 and std 1 over the map."""
    channels = features.flatten(2)
    channels = channels - channels.mean(2, keepdim=True)
    return (channels / (channels.std(2, keepdim=True, correction=0) + 1e-6)).mT


def principal_components(points, dimensions):
    """Project points [B,n,C] on their first `dimensions` principal components: [B,n,dimensions]."""
    points = points - points.mean(1, keepdim=True)
    if points.shape[1] < points.shape[2]:  # the smaller of the two products has the same components
        squares, coordinates = torch.linalg.eigh(points @ points.mT)  # [B,n], [B,n,n], by rising variance
        return coordinates[:, :, -dimensions:] * squares[:, None, -dimensions:].clamp_min(0).sqrt()
    _, directions = torch.linalg.eigh(points.mT @ points / points.shape[1])  # [B,C,C], columns by rising variance
    return points @ directions[:, :, -dimensions:]


def clustering_score(features, seed, components=None):
    """SCS of [B,C,H,W]: how well a map's positions fall into 6 to 10 clusters, by their silhouette."""
    batch, channels, height, width = features.shape
    if height * width < 8:
        return features.new_zeros(batch)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, for the same draws whatever the device
    chosen = torch.randperm(height * width, generator=generator)[:POSITIONS].to(features.device)
    if components is None:
        points = channels_standardised(features)[:, chosen]
        points = principal_components(points, min(DIMENSIONS, channels, len(chosen)))  # [B,n,D]
    else:
        points = components[:, chosen]
    silhouettes = []
    seeds = spread_seeds(points[:, : max(len(chosen) // COARSE, 512)], max(CLUSTERS), generator)  # [B,RESTARTS,k,D]
    for k in CLUSTERS:
        labels = kmeans(points, seeds[:, :, :k])  # [B,n]
        picks = stratified(labels)  # [B,m]
        sample = points.gather(1, picks[..., None].expand(-1, -1, points.shape[2]))  # [B,m,D]
        silhouettes.append(silhouette(sample, labels.gather(1, picks), k))
    return (torch.stack(silhouettes).median(0).values + 1) / 2


def stratified(labels):
    """Places [B,m] of at most SILHOUETTE_POSITIONS of the labels [B,n], whose positions stand in random order.

    Evenly spaced picks from positions sorted by label, in random order within one, are a stratified sample.
    """
    n = labels.shape[1]
    picks = torch.linspace(0, n - 1, min(SILHOUETTE_POSITIONS, n)).round().long()
    return labels.argsort(dim=1, stable=True)[:, picks.to(labels.device)]


def distances(centres, points):
    """Squared, of centres [B,*,D] to points [B,n,D], less the point's own square, which is the same for all centres."""
    return torch.baddbmm(centres.square().sum(2, keepdim=True), centres, points.mT, alpha=-2)  # [B,*,n]


def spread_seeds(points, k, generator):
    """Greedy k-means++ on points [B,n,D]: RESTARTS times k of them, far from each other: [B,RESTARTS,k,D].

    Each further seed is the best of TRIALS points drawn in proportion to their squared distance to the nearest seed.
    The first six of ten seeds are six seeds: one drawing serves every number of clusters.
    """
    batch, n, dimensions = points.shape
    draws = torch.rand(k, RESTARTS, TRIALS, generator=generator).to(points.device)
    squares = points.square().sum(2)[:, None]  # [B,1,n]
    seeds = [points[:, (draws[0, :, 0] * n).long()]]  # [B,RESTARTS,D] each
    nearest = (distances(seeds[0], points) + squares).clamp_min(0)  # [B,RESTARTS,n]
    for draw in draws[1:]:
        cumulative = nearest.cumsum(2)
        drawn = torch.searchsorted(cumulative, draw * cumulative[:, :, -1:], right=True).clamp_max(n - 1)
        tried = points.gather(1, drawn.flatten(1)[..., None].expand(-1, -1, dimensions))  # [B,RESTARTS*TRIALS,D]
        closer = (distances(tried, points) + squares).clamp_min(0).unflatten(1, (RESTARTS, TRIALS))
        closer = torch.minimum(closer, nearest[:, :, None])  # [B,RESTARTS,TRIALS,n]
        best = closer.sum(3).argmin(2, keepdim=True)  # [B,RESTARTS,1]
        nearest = closer.gather(2, best[..., None].expand(-1, -1, -1, n))[:, :, 0]
        tried = tried.unflatten(1, (RESTARTS, TRIALS))
        seeds.append(tried.gather(2, best[..., None].expand(-1, -1, -1, dimensions))[:, :, 0])
    return torch.stack(seeds, dim=2)


def kmeans(points, seeds):
    """Cluster points [B,n,D], in random order, from seeds [B,RESTARTS,k,D]: labels int64 [B,n] of the best restart.

    Most of the work of restarts goes into those that lose, so they race over a part of the points, and only the
    FINALISTS with the least inertia go on over all of them.
    """
    batch, n, _ = points.shape
    centres = lloyd(points[:, : max(n // COARSE, 512)], seeds)
    inertia = distances(centres.flatten(1, 2), points).unflatten(1, centres.shape[1:3]).amin(2).sum(2)
    best = inertia.topk(FINALISTS, largest=False).indices  # [B,FINALISTS]
    centres = lloyd(points, centres.gather(1, best[:, :, None, None].expand(-1, -1, *centres.shape[2:])))
    distance = distances(centres.flatten(1, 2), points).unflatten(1, centres.shape[1:3])  # [B,FINALISTS,k,n]
    best = distance.amin(2).sum(2).argmin(1)  # [B]
    return distance[torch.arange(batch, device=points.device), best].argmin(1)


def lloyd(points, centres):
    """Lloyd's steps from centres [B,R,k,D] until they rest; one that rests waits while the others go on."""
    centres = centres.clone()
    threshold = LLOYD_TOLERANCE * points.var(1, correction=0).mean(1)[:, None]  # [B,1]
    moving = torch.ones(centres.shape[:2], dtype=torch.bool, device=points.device)
    for _ in range(LLOYD_STEPS):
        active = moving.any(0).nonzero()[:, 0]  # the restarts that still move on some map, A of them
        if len(active) == 0:
            break
        before = centres[:, active]  # [B,A,k,D]
        distance = distances(before.flatten(1, 2), points).unflatten(1, before.shape[1:3])  # [B,A,k,n]
        # Two centres on the same spot share their points and stay together: no need for argmin, which is far slower.
        member = (distance == distance.amin(2, keepdim=True)).float()
        size = member.sum(3, keepdim=True)  # [B,A,k,1]
        after = (member.flatten(1, 2) @ points).unflatten(1, before.shape[1:3]) / size.clamp_min(1)
        after = torch.where((size > 0) & moving[:, active, None, None], after, before)  # empty ones keep their centre
        centres[:, active] = after
        moving[:, active] &= (after - before).square().sum((2, 3)) > threshold
    return centres


def silhouette(points, labels, k):
    """Mean silhouette (Euclidean, 0 for a point alone) of points [B,n,D] with labels [B,n] in 0..k-1: [B] in [-1,1]."""
    distance = torch.cdist(points, points)  # [B,n,n]
    member = F.one_hot(labels, k).float()  # [B,n,k]
    size = member.sum(1, keepdim=True)  # [B,1,k]
    total = distance @ member  # [B,n,k] summed distance to each cluster
    own = labels[..., None]  # [B,n,1]
    own_size = size.expand_as(total).gather(2, own)
    inside = total.gather(2, own) / (own_size - 1).clamp_min(1)
    others = (total / size.clamp_min(1)).masked_fill((size == 0) | (member > 0), torch.inf)
    outside = others.amin(2, keepdim=True)
    scores = (outside - inside) / torch.maximum(outside, inside).clamp_min(1e-12)
    return torch.where((own_size > 1) & outside.isfinite(), scores, 0).mean((1, 2))


# ------------------------------------------------------------------------------------------- edge fidelity (EF)


@torch.no_grad()
def edge_fidelity(features, images, components=None):
    """Score whether feature edges lie on the picture's edges and are sharp (paper, arXiv 2605.16864).

    features [B,C,H,W], any float type, any device; images [B,3,H0,W0] in [0,1], sRGB. Returns float32 [B] each:

        EC, NC, FAR   shares of the feature edges' strength in core, near and far zone of the picture's edges; sum to 1
        FC, FC_PCA    share of spectral power at high frequency, of the L2-norm map and of the principal component
        SP            1 / (1 + r / 64), r the radius at which the map's detail stops resembling itself: nearly always 1
                      on real maps, so that SP is the same for all
        EF          = 100 EC * NC * FC * SP                   the paper's form, in [0,100]
        EF_RELEASED = 100 NC * (1 - FAR) * FC_PCA * SP        what the authors' released code computes, in [0,100]
        EF_CC       = 100 (EC - a) / (1 - a) * FC_PCA * SP    corrected for chance, ours: a is the core's share of the
                      area, what EC is when edges fall anywhere; below 0 where they shun the picture's edges

    None of them changes when the channels are permuted or all features scaled. FC and SP stay when the features are
    rotated, the others when each channel is scaled. Degenerate maps, and maps under 3 pixels high or wide, score 0.
    components: what components_of(features) gave, to spare computing them twice.
    """
    with torch.autocast(features.device.type, enabled=False):
        features, usable = blank_degenerate(features)
        batch, _, height, width = features.shape
        if min(height, width) < 3:
            return {name: features.new_zeros(batch) for name in SCORES[3:]}
        norm = torch.linalg.vector_norm(features, dim=1)  # [B,H,W]
        if components is None:
            components = principal_components(channels_standardised(features), 1)
        component = components[:, :, -1].reshape(batch, height, width)
        component = standardise(component)  # shares of its gradient are the same on any scale

        _, core, near = edge_zones(images.float(), (height, width))  # bool [B,H-2,W-2]
        strength, where = strongest(gradient(component)[:, 1:-1, 1:-1])  # [B,n]
        strength = strength / strength.sum(1, keepdim=True).clamp_min(1e-12)
        ec, nc, far = ((strength * z.flatten(1).gather(1, where)).sum(1) for z in (core, near, ~(core | near)))
        chance = core.float().mean((1, 2))

        fc = high_frequency_share(standardise(norm))
        fc_pca = high_frequency_share(component.clamp(-8, 8))
        sp = spatial_precision(norm)
        corrected = torch.where(chance < 1, (ec - chance) / (1 - chance).clamp_min(1e-6), 0)
        scores = {"EC": ec, "NC": nc, "FAR": far, "FC": fc, "FC_PCA": fc_pca, "SP": sp}
        scores["EF"] = 100 * ec * nc * fc * sp
        scores["EF_RELEASED"] = 100 * nc * (1 - far) * fc_pca * sp
        scores["EF_CC"] = 100 * corrected * fc_pca * sp
    return {name: torch.where(usable, score, 0) for name, score in scores.items()}


def gradient(maps):
    """Sobel magnitude (kernel / 4, replicate padding) of [B,H,W]: [B,H,W]. Its valid area is all but the border."""
    maps = F.pad(maps[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    down = (maps[:, :-2] + 2 * maps[:, 1:-1] + maps[:, 2:]) / 4
    across = (maps[:, :, :-2] + 2 * maps[:, :, 1:-1] + maps[:, :, 2:]) / 4
    return torch.hypot(down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2])


def strongest(strength):
    """The strongest tenth of the pixels of [B,h,w], as (values, indices) [B,n] of the flattened map."""
    return strength.flatten(1).topk(math.ceil(TOP_SHARE * strength[0].numel()))


def edge_zones(images, size):
    """Find where the edges of images [B,3,H0,W0] lie on a map of `size` (H,W).

    Returns (centreline, core, near), bool [B,H-2,W-2]: the ridge of the edges, the valid pixels within R_IN of it, and
    those further out but within R_OUT, both by Chebyshev distance. The rest is far.
    """
    images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    linear = torch.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)  # sRGB to light
    luminance = torch.einsum("bchw,c->bhw", linear, linear.new_tensor([0.2126, 0.7152, 0.0722]))  # BT.709
    padded = gradient(luminance)  # [B,H,W], with the border
    valid = padded[:, 1:-1, 1:-1]
    low, high = valid.amin((1, 2), keepdim=True), valid.amax((1, 2), keepdim=True)
    padded = (padded - low) / (high - low).clamp_min(1e-12)
    valid = padded[:, 1:-1, 1:-1]
    edges = torch.zeros_like(valid).flatten(1).scatter(1, strongest(valid)[1], 1).view_as(valid)
    ridge = valid >= F.max_pool2d(padded, 3, stride=1) - 1e-6  # the border, no edge itself, may outshine its neighbours
    centreline = edges * ridge * (high - low >= 1e-6)  # a picture without contrast has no edges
    core = F.max_pool2d(centreline, 2 * R_IN + 1, stride=1, padding=R_IN) > 0
    reach = F.max_pool2d(centreline, 2 * R_OUT + 1, stride=1, padding=R_OUT) > 0
    return centreline > 0, core, reach & ~core


def high_frequency_share(maps):
    """FC of standardised maps [B,H,W]: share of power at radius >= 0.15, DC counted, 1 the spectrum's corner: [B]."""
    height, width = maps.shape[1:]
    window = torch.outer(*(torch.hann_window(n, periodic=False, device=maps.device) for n in (height, width)))
    power = torch.fft.fftshift(torch.fft.fft2(maps * window), dim=(1, 2)).abs().square()  # [B,H,W]
    y, x = (torch.linspace(-1, 1, n, device=maps.device) for n in (height, width))
    radius = torch.hypot(y[:, None], x[None])
    high = radius / radius.max() >= HIGH_FREQUENCY  # [H,W]
    return (power * high).sum((1, 2)) / power.sum((1, 2)).clamp_min(1e-12)


def spatial_precision(norm):
    """SP of L2-norm maps [B,H,W]: 1 / (1 + r / 64), r the first radius at which their detail correlates under 0.5."""
    detail = standardise(norm - F.avg_pool2d(norm, 3, stride=1, padding=1))  # zero padding counted
    height, width = detail.shape[1:]
    largest = max(1, math.floor(0.6 * min(height, width)))
    radii = np.unique(np.geomspace(1, largest, RADII).round().astype(int)).tolist()
    found = torch.full(detail.shape[:1], float(radii[-1]), device=detail.device)  # [B]
    searching = torch.ones_like(found, dtype=torch.bool)
    for r in radii:
        # Swapping the two sides turns an offset into its opposite: four offsets stand for all eight.
        overlaps = [
            (detail[:, r:], detail[:, :-r]),
            (detail[:, :, r:], detail[:, :, :-r]),
            (detail[:, r:, r:], detail[:, :-r, :-r]),
            (detail[:, r:, :-r], detail[:, :-r, r:]),
        ]
        similarity = torch.stack([correlation(*sides) for sides in overlaps]).mean(0)  # [B]
        fallen = searching & (similarity < SP_THRESHOLD)
        found = torch.where(fallen, float(r), found)
        searching &= ~fallen
        if not searching.any():
            break
    return 1 / (1 + found / SP_SCALE)


def correlation(a, b):
    """Normalised cross-correlation of two stacks of maps [B,h,w], each less its own mean: [B] in [-1,1]."""
    a, b = a - a.mean((1, 2), keepdim=True), b - b.mean((1, 2), keepdim=True)
    power = a.square().sum((1, 2)) * b.square().sum((1, 2))
    return (a * b).sum((1, 2)) / power.sqrt().clamp_min(1e-12)


# ----------------------------------------------------------------------------------------------- ground truth


@torch.no_grad()
def coherence_with_truth(features, segments, seed=0):
    """SC with true segments in place of cells and of clusters, void left out: the paper's SC_GT.

    features [B,C,H,W]; segments int [B,H,W], 0 void. Returns {"SFC_GT", "SCS_GT", "SC_GT"}, float32 [B] in [0,1], NaN
    where fewer than two segments or eight positions are left. Segments count by their area.
    """
    features, usable = blank_degenerate(features)
    generator, rows = torch.Generator().manual_seed(seed), []
    for feature, segment in zip(features, segments, strict=True):
        inside = segment.flatten() > 0
        _, labels = segment.flatten()[inside].unique(return_inverse=True)  # [n]
        n, k = len(labels), int(labels.max()) + 1 if len(labels) else 0
        if n < 8 or k < 2:
            rows.append(features.new_full((2,), torch.nan))
            continue
        channels = feature.flatten(1)[:, inside]  # [C,n]
        norm = standardise(torch.linalg.vector_norm(channels, dim=0)[None, None])[0, 0]  # [n]
        member = F.one_hot(labels, k).float()  # [n,k]
        area = member.sum(0)
        means = norm @ member / area
        within = ((norm - means[labels]).square().sum() / n).clamp_min(1e-6)
        between = (area / n * (means - norm.mean()).square()).sum()
        order = torch.randperm(n, generator=generator).to(labels.device)
        chosen = order[:POSITIONS]
        points = channels_standardised(channels[None, :, None])[:, chosen]
        points = principal_components(points, min(DIMENSIONS, len(channels), len(chosen)))
        picks = stratified(labels[chosen][None])[0]
        spread = silhouette(points[:, picks], labels[chosen][picks][None], k)[0]
        rows.append(torch.stack([between / (between + within), (spread + 1) / 2]))
    sfc, scs = torch.stack(rows).T
    scores = {"SFC_GT": sfc, "SCS_GT": scs, "SC_GT": (sfc * scs).sqrt()}
    return {name: torch.where(usable | score.isnan(), score, 0) for name, score in scores.items()}


def compare_with_truth(folder, settings, data, sc, seed, device):
    """How SC ranks maps beside SC_GT: {"rho", "low", "high", "maps", "SC_GT": {encoder: {stride: mean}}}.

    sc [image, encoder, stride]. rho is Spearman's over images, encoders and strides, the interval a bootstrap over the
    images. Writes ground_truth.csv. Raises UserError where masks overlap.
    """
    samples = open_split(settings["benchmark"], data, "train")
    place, truth = {name: i for i, name in enumerate(samples.names)}, []
    for name in tqdm(settings["images"], "ground truth", unit="image"):
        sample = samples[place[name]]
        if "segments" not in sample:
            raise run.UserError(f"{settings['benchmark']} has overlapping masks: --ground-truth wants one of segments")
        size = working_size(*sample["image"].shape[1:], settings["size"])
        for encoder in settings["encoders"]:
            native = run.read_features(run.feature_path(folder, encoder, name))
            native = {stride: feature[None].to(device).float() for stride, feature in native.items()}
            for feature in pyramid(native, size).values():
                segments = sample["segments"][None, None].float().to(device)
                segments = F.interpolate(segments, feature.shape[2:], mode="nearest-exact")[:, 0].long()
                truth.append(coherence_with_truth(feature, segments, seed)["SC_GT"].item())
    truth = np.array(truth).reshape(sc.shape)
    with run.whole_file(folder / "ground_truth.csv") as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "encoder", "stride", "SC", "SC_GT"])
        for i, j, k in np.ndindex(sc.shape):
            numbers = (f"{array[i, j, k]:.9g}" for array in (sc, truth))
            table.writerow([settings["images"][i], settings["encoders"][j], STRIDES[k], *numbers])

    def rho(chosen):
        return stats.spearmanr(sc[chosen].ravel(), truth[chosen].ravel(), nan_policy="omit").statistic

    draws = np.random.default_rng(seed).integers(len(sc), size=(RESAMPLES, len(sc)))
    low, high = np.nanpercentile([rho(draw) for draw in draws], [2.5, 97.5])
    means = {
        encoder: {str(stride): float(np.nanmean(truth[:, j, k])) for k, stride in enumerate(STRIDES)}
        for j, encoder in enumerate(settings["encoders"])
    }
    result = {"rho": rho(slice(None)), "low": low, "high": high}
    return {key: float(value) for key, value in result.items()} | {
        "maps": int(np.isfinite(truth).sum()),
        "SC_GT": means,
    }


# ------------------------------------------------------------------------------------------- controls and summary


def control(source, image, stride, seed):
    """A feature map that needs no encoder, from image [1,3,H,W]: [1,64,H/stride,W/stride] of noise, or [1,3,...]."""
    height, width = image.shape[2] // stride, image.shape[3] // stride
    if source == "noise":
        return torch.randn(1, 64, height, width, generator=torch.Generator().manual_seed(seed)).to(image.device)
    if source == "shifted":
        image = image.roll((image.shape[2] // 3, image.shape[3] // 3), dims=(2, 3))
    return F.interpolate(image, (height, width), mode="bilinear", align_corners=False)


def summarise(values, sources, seed):
    """Means over images with 95 % bootstrap intervals, from values [image, source, stride, score].

    Returns {source: {"4": {"SC": {"mean", "low", "high"}, ...}}}. EF_SHARE is mean EF_CC / mean EF_CC of the image
    itself, for EF_CC rises with stride for encoders and image alike; None where the image's is not above 0.
    """
    images = len(values)
    # Drawing images with replacement is drawing how often each one counts: a resample's mean is a weighted mean.
    weights = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), RESAMPLES) / images
    weights = np.concatenate([np.full((1, images), 1 / images), weights])  # the first row is the plain mean
    means = np.tensordot(weights, values, axes=1)  # [1 + RESAMPLES, source, stride, score]
    ef_cc = means[..., SCORES.index("EF_CC")]
    reference = ef_cc[:, [sources.index("image")]]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(reference > 0, ef_cc / reference, np.nan)
    means = np.concatenate([means, share[..., None]], axis=3)
    low, high = np.percentile(means[1:], [2.5, 97.5], axis=0)
    summary = {source: {str(stride): {} for stride in STRIDES} for source in sources}
    for (s, stride, score), mean in np.ndenumerate(means[0]):
        numbers = {"mean": mean, "low": low[s, stride, score], "high": high[s, stride, score]}
        numbers = {key: float(number) if np.isfinite(number) else None for key, number in numbers.items()}
        summary[sources[s]][str(STRIDES[stride])][(*SCORES, "EF_SHARE")[score]] = numbers
    return summary


def print_profiles(metrics):
    """The profile table: a row for each source and score, a column for each stride, controls last."""
    wide = max(14, *(len(source) + 2 for source in metrics["scores"]))
    print(f"\n{'source':{wide}}{'score':14}" + "".join(f"{f'OS {stride}':>9}" for stride in STRIDES))
    for source, profile in metrics["scores"].items():
        for score in ("SC", "EF", "EF_RELEASED", "EF_CC", "EF_SHARE"):
            means = [profile[str(stride)][score]["mean"] for stride in STRIDES]
            digits = 3 if score in ("SC", "EF_SHARE") else 1
            cells = "".join(f"{'-' if mean is None else f'{mean:.{digits}f}':>9}" for mean in means)
            print(f"{source if score == 'SC' else '':{wide}}{score:14}{cells}")
    print(f"means over {metrics['images']} images; {', '.join(CONTROLS)} are controls, no encoder")
    for encoder in metrics["random_weights"]:
        print(f"WARNING: {encoder} has RANDOM weights (--weights none): its numbers say nothing about the trained one")


# ------------------------------------------------------------------------------------------------------ the stage


def score_image(folder, settings, name, seed, device):
    """Every score of every source at every stride for one image of the run, as an array [source, stride, score]."""
    image = resize_image(read_image(Path(settings["root"]) / name), settings["size"])[None].to(device)  # [1,3,H,W]
    values = []
    for source in (*settings["encoders"], *CONTROLS):
        if source in CONTROLS:
            seeds = {stride: zlib.crc32(f"{seed} {name} {stride}".encode()) for stride in STRIDES}
            maps = {stride: control(source, image, stride, seeds[stride]) for stride in STRIDES}
        else:
            native = run.read_features(run.feature_path(folder, source, name))  # {stride: float16 [C,h,w]}
            native = {stride: features[None].to(device).float() for stride, features in native.items()}
            maps = pyramid(native, image.shape[2:])
        for stride in STRIDES:
            parts = components_of(maps[stride])
            scores = structural_coherence(maps[stride], seed, parts) | edge_fidelity(maps[stride], image, parts)
            values.append([scores[score].item() for score in SCORES])
    return np.array(values).reshape(-1, len(STRIDES), len(SCORES))


def edges_of(folder, settings, name, stride, device):
    """A row of stage 3's edges.png: a picture, and each encoder's edges at a stride with the shares of their zones.

    Returns (image [3,H,W], [(title, centreline bool [h,w], edges int [h,w])]), edges 0 for none, 1 core, 2 near and
    3 far.
    """
    image = resize_image(read_image(Path(settings["root"]) / name), settings["size"])[None].to(device)
    drawings = []
    for encoder in settings["encoders"]:
        native = run.read_features(run.feature_path(folder, encoder, name))
        feature = pyramid({s: m[None].to(device).float() for s, m in native.items()}, image.shape[2:])[stride]
        component = principal_components(channels_standardised(feature), 1)  # [1,h*w,1]
        shares = edge_fidelity(feature, image, component)
        size = feature.shape[2:]
        centreline, core, near = (zone[0] for zone in edge_zones(image, size))  # bool [h-2,w-2]
        _, where = strongest(gradient(component.reshape(1, *size))[:, 1:-1, 1:-1])
        edges = torch.where(core, 1, torch.where(near, 2, 3)).flatten()
        kept = torch.zeros_like(edges).scatter(0, where[0], 1)
        edges = (edges * kept).view_as(core)
        parts = ", ".join(f"{part} {shares[part].item():.2f}" for part in ("EC", "NC", "FAR"))
        drawings.append((f"{encoder}, OS {stride}\n{parts}", centreline.cpu(), edges.cpu()))
    return image[0].cpu(), drawings


def main():
    parser = run.arguments(__doc__)
    parser.add_argument("--ground-truth", action="store_true", help="compare SC with the benchmark's own segments")
    parser.add_argument("--data", type=Path, help="data root, for --ground-truth (default: as in stage 1)")
    parser.add_argument("--seed", type=int, help="seed of sampling, noise and bootstrap (default: the run's)")
    args = parser.parse_args()
    folder = args.run
    settings = run.read_stage(folder, "run.json", "01_extract.py")
    seed = settings["seed"] if args.seed is None else args.seed
    encoders, names = settings["encoders"], settings["images"]
    if args.ground_truth and settings["benchmark"] is None:
        raise run.UserError(f"{folder} holds pictures without labels: --ground-truth needs a run made with --benchmark")
    sources = [*encoders, *CONTROLS]

    # Score image by image, for their sizes may differ. The tensors are too small for two cores to share one, so each
    # worker has an image to itself and a single core; the numbers are then the same however many workers there are.
    torch.set_num_threads(1)
    torch.linalg.eigh(
        torch.eye(2, device=args.device)
    )  # on a GPU the first call of all must not be made by two threads
    with ThreadPoolExecutor(max(1, args.workers)) as pool:
        scored = pool.map(lambda name: score_image(folder, settings, name, seed, args.device), names)
        values = np.stack(list(tqdm(scored, desc="metrics", unit="image", total=len(names))))

    # Write every component of every map, and what it comes to.
    with run.whole_file(folder / "metrics.csv") as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "source", "stride", *SCORES])
        for i, j, k in np.ndindex(values.shape[:3]):
            table.writerow([names[i], sources[j], STRIDES[k], *(f"{value:.9g}" for value in values[i, j, k])])
    metrics = {
        "benchmark": settings["benchmark"],
        "encoders": encoders,
        "controls": list(CONTROLS),
        "strides": list(STRIDES),
        "images": len(names),
        "random_weights": [name for name in encoders if settings["weights"][name] == "none"],
        "scores": summarise(values, sources, seed),
    }
    if args.ground_truth:
        sc, data = values[:, : len(encoders), :, SCORES.index("SC")], args.data or Path(settings["data"])
        metrics["ground_truth"] = compare_with_truth(folder, settings, data, sc, seed, args.device)
    run.write_json(folder / "metrics.json", metrics)
    draw_profiles(folder / "metrics.png", metrics)
    print_profiles(metrics)
    if args.ground_truth:
        found = metrics["ground_truth"]
        interval = f"{found['low']:.3f} to {found['high']:.3f}"
        print(
            f"SC and SC_GT: Spearman's rho {found['rho']:.3f} ({interval}) over {found['maps']} maps (the paper: 0.726)"
        )
    truth = ", ground_truth.csv" if args.ground_truth else ""
    print(f"\nwrote metrics.csv{truth}, metrics.json and metrics.png in {folder}")
    if (folder / "selection.json").is_file():
        print("selection.json is older than these metrics: 03_select.py makes it anew, and marks it in metrics.png")
    print(f"next: {run.command('03_select.py', folder)}")


if __name__ == "__main__":
    run.start(main)
