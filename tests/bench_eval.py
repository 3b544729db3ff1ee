"""How fast and how lean the scores are, on images of 1024 x 2048 with 100 masks each.

    python tests/bench_eval.py                  Cityscapes' AP beside cityscapesScripts, and PQ
    python tests/bench_eval.py --stream 500     memory, after so many images

All are timed on the same predictions, in one run. cityscapesScripts is timed as people run it:
masks are written, and its evaluation reads them. It is timed once more for its matching alone, with
all masks in memory.
"""

import argparse
import importlib
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as tool
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.datasets import CITYSCAPES_CATEGORIES, CITYSCAPES_THINGS  # noqa: E402

from test_scores import official_instance_ap, save_instances  # noqa: E402

stage5 = importlib.import_module("05_eval")
HEIGHT, WIDTH, MASKS = 1024, 2048, 100
THINGS = [category.id for category in CITYSCAPES_THINGS]


class Street(NamedTuple):
    """The truth of an image, and predictions."""

    ids: torch.Tensor  # int64 [H, W], Cityscapes' instance ids
    masks: torch.Tensor  # bool [MASKS, H, W]
    labels: torch.Tensor  # int64 [MASKS], raw ids
    scores: torch.Tensor  # float64 [MASKS]


def ellipse(rng):
    """A mask as large as things are on streets: mostly small, some large."""
    radius = 8 + 160 * rng.random() ** 3
    y = rng.integers(0, HEIGHT)
    x = rng.integers(0, WIDTH)
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    return ((rows - y) / radius) ** 2 + ((columns - x) / radius / 1.5) ** 2 < 1


def street(rng):
    """A Street with 40 things, stuff and void. Some predictions are near the truth."""
    bands = rng.choice([7, 11, 21, 23, 4], 8)
    ids = np.repeat(bands, HEIGHT // 8)[:, None].repeat(WIDTH, 1)
    for number in range(40):
        ids[ellipse(rng)] = rng.choice(THINGS) * 1000 + number
    masks = []
    labels = []
    for value in np.unique(ids[ids >= 1000]):
        masks.append(np.roll(ids == value, rng.integers(-4, 5, 2), (0, 1)))
        labels.append(value // 1000)
    while len(masks) < MASKS:
        masks.append(ellipse(rng))
        labels.append(rng.choice(THINGS))
    return Street(
        torch.from_numpy(ids),
        torch.from_numpy(np.stack(masks)),
        torch.tensor(np.array(labels)),
        torch.from_numpy(rng.random(MASKS)),
    )


def seconds(call, *arguments):
    """How long a call takes, and its result."""
    began = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - began, result


def stem_of(index):
    return f"bonn_000000_{index:06d}"


def truth_file(folder, index):
    return folder / f"{stem_of(index)}_gtFine_instanceIds.png"


def our_ap(images):
    score = stage5.CityscapesInstanceScore(THINGS)
    for image in images:
        score.update(image.masks, image.labels, image.scores, image.ids)
    return score.result()["AP"]


def official_ap(folder, images):
    """AP as people compute it: masks and lists are written to disk and evaluated from there."""
    truths = []
    texts = []
    for i, image in enumerate(images):
        masks = image.masks.numpy()
        texts.append(save_instances(folder, stem_of(i), masks, image.labels, image.scores))
        truths.append(truth_file(folder, i))
    return 100 * official_instance_ap(folder, truths, texts)["averages"]["allAp"]


def matching_alone(folder, images):
    """Seconds of the official assignment of predictions to the truth, with all masks in memory."""
    total = 0.0
    from_disk = tool.Image
    for i, image in enumerate(images):
        truth = str(truth_file(folder, i).absolute())
        instances = tool.instances2dict([truth], False)[truth]
        instances = tool.filterGtInstances(instances, tool.args)
        opened = {}
        predictions = {}
        for number in range(MASKS):
            mask = 255 * image.masks[number].numpy().astype(np.uint8)
            opened[str(number)] = Image.fromarray(mask)
            label = int(image.labels[number])
            predictions[str(number)] = {"labelID": label, "conf": float(image.scores[number])}
        ids = image.ids.numpy().astype(np.int32)
        tool.Image = SimpleNamespace(open=opened.__getitem__)
        try:
            took, _ = seconds(tool.assignGt2Preds, instances, ids, predictions, tool.args)
        finally:
            tool.Image = from_disk
        total += took
    return total


def panoptic_seconds(images):
    """Seconds of the panoptic updates, with 60 predicted segments and ids as large as COCO's."""
    score = stage5.PanopticScore([category._asdict() for category in CITYSCAPES_CATEGORIES])
    total = 0.0
    for image in images:
        pred_ids = torch.zeros_like(image.ids)
        for number, mask in enumerate(image.masks[:60], 1):
            pred_ids[mask] = number
        pred_segments = []
        for number in pred_ids.unique().tolist():
            if number:
                category = int(image.labels[number - 1])
                pred_segments.append({"id": number, "category_id": category})
        true_ids = torch.where(image.ids == 4, 0, 397 * image.ids)
        true_segments = []
        for value in image.ids.unique().tolist():
            if value != 4:
                category = value // 1000 if value >= 1000 else value
                true_segments.append({"id": 397 * value, "category_id": category})
        took, _ = seconds(score.update, pred_ids, pred_segments, true_ids, true_segments)
        total += took
    return total


def stream(count):
    """Print how much memory the AP of `count` images takes."""
    rng = np.random.default_rng(0)
    images = [street(rng), street(rng)]
    score = stage5.CityscapesInstanceScore(THINGS)
    for i in range(count):
        image = images[i % 2]
        score.update(image.masks, image.labels, torch.rand(MASKS), image.ids)
        if i + 1 in (10, count):
            print_peak(f"after {i + 1} images")
    score.result()
    print_peak("after the result")


def print_peak(when):
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory {gigabytes:.2f} GB {when}")


def compare(count):
    """Print a table of times on `count` images."""
    # NumPy has no in1d any more, and the tool cannot write NumPy's integers to JSON.
    setattr(np, "in1d", np.isin)  # noqa: B010
    tool.writeDict2JSON = lambda content, path: None
    tool.args.quiet = True
    tool.args.JSONOutput = False
    tool.setInstanceLabels(tool.args)

    rng = np.random.default_rng(0)
    images = [street(rng) for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for i, image in enumerate(images):
            Image.fromarray(image.ids.numpy().astype(np.uint16)).save(truth_file(folder, i))
        ours, ap = seconds(our_ap, images)
        official, expected = seconds(official_ap, folder, images)
        matching = matching_alone(folder, images)
    panoptic = panoptic_seconds(images)

    assert abs(ap - expected) < 1e-9, (ap, expected)
    print(f"{count} images of {HEIGHT} x {WIDTH} with {MASKS} masks each, AP {ap:.3f} by both")
    print("seconds an image")
    print(f"  this project                          {ours / count:8.3f}")
    for name, total in (
        ("cityscapesScripts, its matching alone", matching),
        ("cityscapesScripts, as people run it  ", official),
    ):
        print(f"  {name} {total / count:8.3f}   {total / ours:6.1f} times as long")
    print(f"  panoptic quality                      {panoptic / count:8.3f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5, help="how many are timed (default: 5)")
    parser.add_argument("--stream", type=int, help="measure memory instead, on so many images")
    args = parser.parse_args()
    if args.stream:
        stream(args.stream)
    else:
        compare(args.images)


if __name__ == "__main__":
    main()
