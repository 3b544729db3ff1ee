"""How fast and how lean the scores are: 100 masks an image at 1024 x 2048, the same predictions for all, in one run.

    python tests/bench_eval.py                  a table: Cityscapes' AP beside cityscapesScripts, panoptic quality
    python tests/bench_eval.py --stream 500     memory, after so many images of streaming

cityscapesScripts is timed as people run it (masks written, and read by its evaluation) and once more for its matching
alone, with every mask already in memory.
"""

import argparse
import importlib
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as tool
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.datasets import CITYSCAPES, CITYSCAPES_THINGS  # noqa: E402

stage5 = importlib.import_module("05_eval")
HEIGHT, WIDTH, MASKS = 1024, 2048, 100
THINGS = [raw for raw, _, _ in CITYSCAPES_THINGS]


def ellipse(rng):
    """A thing as large as they are on streets: mostly small, some large."""
    radius = 8 + 160 * rng.random() ** 3
    y, x = rng.integers(0, HEIGHT), rng.integers(0, WIDTH)
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    return ((rows - y) / radius) ** 2 + ((columns - x) / radius / 1.5) ** 2 < 1


def street(rng):
    """Instance ids int64 [H, W] with 40 things, stuff and void; 100 masks bool, their raw labels and scores."""
    ids = np.repeat(rng.choice([7, 11, 21, 23, 4], 8), HEIGHT // 8)[:, None].repeat(WIDTH, 1)
    for number in range(40):
        ids[ellipse(rng)] = rng.choice(THINGS) * 1000 + number
    masks, labels = [], []
    for value in np.unique(ids[ids >= 1000]):
        masks.append(np.roll(ids == value, rng.integers(-4, 5, 2), (0, 1)))
        labels.append(value // 1000)
    while len(masks) < MASKS:
        masks.append(ellipse(rng))
        labels.append(rng.choice(THINGS))
    return tuple(map(torch.from_numpy, (ids, np.stack(masks), np.array(labels), rng.random(MASKS))))


def seconds(call, *arguments):
    began = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - began, result


def ours(images):
    score = stage5.CityscapesInstanceScore(THINGS)
    for ids, masks, labels, scores in images:
        score.update(masks, labels, scores, ids)
    return score.result()["AP"]


def official(folder, images):
    """As people run it: masks and lists written to disk, evaluated from there."""
    truths, texts = [], []
    for i, (_, masks, labels, scores) in enumerate(images):
        stem = f"bonn_000000_{i:06d}"
        stage5.save_instances(folder, stem, masks, labels, scores)
        truths.append(str(folder / f"{stem}_gtFine_instanceIds.png"))
        texts.append(str(folder / f"{stem}.txt"))
    return 100 * tool.evaluateImgLists(texts, truths, tool.args)["averages"]["allAp"]


def matching_alone(folder, images):
    """The official assignment of predictions to the truth, all masks in memory: seconds."""
    total, opened = 0.0, tool.Image
    for i, (ids, masks, labels, scores) in enumerate(images):
        truth = folder / f"bonn_000000_{i:06d}_gtFine_instanceIds.png"
        instances = tool.filterGtInstances(tool.instances2dict([str(truth)], False)[str(truth.absolute())], tool.args)
        pictures = {str(k): Image.fromarray(255 * mask.numpy().astype(np.uint8)) for k, mask in enumerate(masks)}
        info = {k: {"labelID": int(labels[int(k)]), "conf": float(scores[int(k)])} for k in pictures}
        tool.Image = SimpleNamespace(open=pictures.__getitem__)
        try:
            took, _ = seconds(tool.assignGt2Preds, instances, ids.numpy().astype(np.int32), info, tool.args)
        finally:
            tool.Image = opened
        total += took
    return total


def panoptic_milliseconds(images):
    """A panoptic update of 60 predicted segments, on ids as COCO's colours make them."""
    score = stage5.PanopticScore([{"id": raw, "name": name, "isthing": thing} for raw, name, thing in CITYSCAPES])
    total = 0.0
    for ids, masks, labels, _ in images:
        pred = torch.zeros_like(ids)
        for k, mask in enumerate(masks[:60]):
            pred[mask] = k + 1
        kept = [k for k in range(60) if (pred == k + 1).any()]
        segments = [{"id": k + 1, "category_id": int(labels[k])} for k in kept]
        present = [v for v in ids.unique().tolist() if v != 4]
        true_segments = [{"id": 397 * v, "category_id": v // 1000 if v >= 1000 else v} for v in present]
        true_ids = torch.where(ids == 4, 0, 397 * ids)
        took, _ = seconds(score.update, pred, segments, true_ids, true_segments)
        total += took
    return 1000 * total / len(images)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--stream", type=int, help="measure memory instead, over so many images")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    if args.stream:
        images = [street(rng) for _ in range(2)]
        score, size = stage5.CityscapesInstanceScore(THINGS), "peak memory {:.2f} GB after {} images"
        for i in range(args.stream):
            ids, masks, labels, _ = images[i % 2]
            score.update(masks, labels, torch.rand(MASKS), ids)
            if i + 1 in (10, args.stream):
                print(size.format(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, i + 1))
        score.result()
        print(size.format(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, args.stream), "and the result")
        return

    setattr(np, "in1d", np.isin)  # noqa: B010  gone from NumPy 2.4; cityscapesScripts 2.3.0 calls it
    tool.writeDict2JSON = lambda content, path: None  # nor can it write NumPy's integers
    tool.args.quiet, tool.args.JSONOutput = True, False
    tool.setInstanceLabels(tool.args)
    images = [street(rng) for _ in range(args.images)]
    with tempfile.TemporaryDirectory() as folder:
        tool.args.predictionPath, tool.args.gtInstancesFile = folder, f"{folder}/none.json"
        for i, (ids, *_) in enumerate(images):
            file = Path(folder) / f"bonn_000000_{i:06d}_gtFine_instanceIds.png"
            Image.fromarray(ids.numpy().astype(np.uint16)).save(file)
        fast, ap = seconds(ours, images)
        slow, expected = seconds(official, Path(folder), images)
        matching = matching_alone(Path(folder), images)
    assert abs(ap - expected) < 1e-9, (ap, expected)
    n = len(images)
    print(f"{n} images of {HEIGHT} x {WIDTH}, {MASKS} masks each; AP {ap:.3f} by both; seconds an image")
    print(f"  this project                          {fast / n:8.3f}")
    print(f"  cityscapesScripts, its matching alone {matching / n:8.3f}   {matching / fast:6.1f} times as long")
    print(f"  cityscapesScripts, as people run it   {slow / n:8.3f}   {slow / fast:6.1f} times as long")
    print(f"  panoptic quality                      {panoptic_milliseconds(images) / 1000:8.3f}")


if __name__ == "__main__":
    main()
