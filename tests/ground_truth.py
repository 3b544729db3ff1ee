"""Does SC agree with the benchmark's own segments? Run by hand on a run folder that 02_metrics.py has filled.

    python tests/ground_truth.py --run runs/toycity
    python tests/ground_truth.py --run runs/mine --data /datasets    # labels elsewhere than in stage 1

SC_GT is SC with true segments in place of cells and of clusters (paper, arXiv 2605.16864). Writes ground_truth.csv and
ground_truth.json into the run folder: Spearman's rho of SC and SC_GT over images, encoders and strides.
"""

import csv
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import run  # noqa: E402
from common.datasets import open_split  # noqa: E402
from common.encoders import STRIDES  # noqa: E402
from common.run import DEVICES, RESAMPLES, UserError, flag, need  # noqa: E402

metrics = importlib.import_module("02_metrics")


@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder")
    data: Path | None = flag(None, "data root (default: as in stage 1)")
    device: str = flag(DEVICES[0], choices=DEVICES)
    seed: int | None = flag(None, "seed of sampling and bootstrap (default: the run's)")


@torch.no_grad()
def coherence_with_truth(features, segments, seed=0):
    """SC with true segments in place of cells and of clusters, void left out: the paper's SC_GT.

    features [B,C,H,W]; segments int [B,H,W], 0 void. Returns {"SFC_GT", "SCS_GT", "SC_GT"}, float32 [B] in [0,1], NaN
    where fewer than two segments or eight positions are left. Segments count by their area.
    """
    features, usable, *_ = metrics.prepare(features)
    generator, rows = torch.Generator().manual_seed(seed), []
    for feature, segment in zip(features, segments, strict=True):
        inside = segment.flatten() > 0
        _, labels = segment.flatten()[inside].unique(return_inverse=True)  # [n]
        n, k = len(labels), int(labels.max()) + 1 if len(labels) else 0
        if n < 8 or k < 2:
            rows.append(features.new_full((2,), torch.nan))
            continue
        channels = feature.flatten(1)[:, inside]  # [C,n]
        norm = metrics.standardise(torch.linalg.vector_norm(channels, dim=0)[None, None])[0, 0]  # [n]
        member = F.one_hot(labels, k).float()  # [n,k]
        area = member.sum(0)
        means = norm @ member / area
        within = ((norm - means[labels]).square().sum() / n).clamp_min(1e-6)
        between = (area / n * (means - norm.mean()).square()).sum()
        order = torch.randperm(n, generator=generator).to(labels.device)
        chosen = order[: metrics.POSITIONS]
        points = metrics.channels_standardised(channels[None, :, None])[:, chosen]
        points = metrics.principal_components(points, metrics.DIMENSIONS)
        picks = torch.linspace(0, len(chosen) - 1, min(metrics.SILHOUETTE_POSITIONS, len(chosen))).round().long()
        picks = labels[chosen].argsort(stable=True)[picks.to(labels.device)]  # stratified
        spread = metrics.silhouette(points[:, picks], labels[chosen][picks][None], k)[0]
        rows.append(torch.stack([between / (between + within), (spread + 1) / 2]))
    sfc, scs = torch.stack(rows).T
    scores = {"SFC_GT": sfc, "SCS_GT": scs, "SC_GT": (sfc * scs).sqrt()}
    return {name: torch.where(usable | score.isnan(), score, 0) for name, score in scores.items()}


def read_coherence(folder, found, names):
    """SC [image, encoder, stride] out of metrics.csv; UserError if it is missing or of other images."""
    again = run.command("02_metrics.py", folder)
    need((folder / "metrics.csv").is_file(), f"{folder / 'metrics.csv'} is missing: run `{again}` first")
    with open(folder / "metrics.csv", newline="") as file:
        table = {(row["image"], row["source"], int(row["stride"])): float(row["SC"]) for row in csv.DictReader(file)}
    try:
        sc = [table[name, encoder, stride] for name in names for encoder in found["encoders"] for stride in STRIDES]
    except KeyError as error:
        raise UserError(f"{folder / 'metrics.csv'} lacks {error}: run `{again}` again") from None
    return np.array(sc).reshape(len(names), -1, len(STRIDES))


def true_coherence(settings, found, names):
    """SC_GT [image, encoder, stride]; UserError where masks overlap."""
    samples = open_split(found["benchmark"], settings.data or Path(found["data"]), "train")
    place, truth = {name: i for i, name in enumerate(samples.names)}, []
    for name in tqdm(names, "ground truth", unit="image"):
        sample = samples[place[name]]
        need("segments" in sample, f"{found['benchmark']} has overlapping masks: SC_GT wants one of segments")
        for levels in metrics.read_maps(settings, found, name)[1].values():
            for feature in levels.values():
                segments = sample["segments"][None, None].float().to(settings.device)
                segments = F.interpolate(segments, feature.shape[2:], mode="nearest-exact")[:, 0].long()
                truth.append(coherence_with_truth(feature, segments, settings.seed)["SC_GT"].item())
    return np.array(truth).reshape(len(names), -1, len(STRIDES))


def compare_with_truth(sc, truth, encoders, seed):
    """How SC ranks maps beside SC_GT: {"rho", "low", "high", "of_means": {the same}, "maps", "SC_GT": means}.

    sc, truth [image, encoder, stride]. rho is Spearman's over images, encoders and strides, and again over encoders and
    strides, of means over images (what the paper's 0.726 most likely is). Intervals are a bootstrap over images.
    """

    def of_maps(chosen):
        return stats.spearmanr(sc[chosen].ravel(), truth[chosen].ravel(), nan_policy="omit").statistic

    def of_means(chosen):
        means = np.nanmean(truth[chosen], axis=0).ravel()
        return stats.spearmanr(sc[chosen].mean(0).ravel(), means, nan_policy="omit").statistic

    def interval(rho):
        draws = np.random.default_rng(seed).integers(len(sc), size=(RESAMPLES, len(sc)))
        low, high = np.nanpercentile([rho(draw) for draw in draws], [2.5, 97.5])
        return {"rho": float(rho(slice(None))), "low": float(low), "high": float(high)}

    means = np.nanmean(truth, axis=0)  # [encoder, stride]
    result = interval(of_maps) | {"of_means": interval(of_means), "maps": int(np.isfinite(truth).sum())}
    result["SC_GT"] = {
        encoder: dict(zip(map(str, STRIDES), row, strict=True))
        for encoder, row in zip(encoders, means.tolist(), strict=True)
    }
    return result


def main():
    settings = run.parse(__doc__, Settings)
    folder = settings.run
    found, names = metrics.finished_run(folder)
    settings.seed = found["seed"] if settings.seed is None else settings.seed
    need(found["benchmark"], f"{folder} holds pictures without labels: SC_GT needs a run made with --benchmark")
    sc = read_coherence(folder, found, names)
    truth = true_coherence(settings, found, names)
    with run.whole_file(folder / "ground_truth.csv") as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "encoder", "stride", "SC", "SC_GT"])
        for i, j, k in np.ndindex(sc.shape):
            numbers = (f"{array[i, j, k]:.9g}" for array in (sc, truth))
            table.writerow([names[i], found["encoders"][j], STRIDES[k], *numbers])
    result = compare_with_truth(sc, truth, found["encoders"], settings.seed)
    run.write_json(folder / "ground_truth.json", result)
    points = len(found["encoders"]) * len(STRIDES)
    for rho, what in [
        (result, f"{result['maps']} maps"),
        (result["of_means"], f"{points} means of encoder and stride"),
    ]:
        interval = f"{rho['low']:.3f} to {rho['high']:.3f}"
        print(f"SC and SC_GT: Spearman's rho {rho['rho']:.3f} ({interval}) over {what}")
    print("the paper gives 0.726, most likely over means")
    print(f"wrote ground_truth.csv and ground_truth.json in {folder}")


if __name__ == "__main__":
    run.start(main)
