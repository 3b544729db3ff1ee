"""What a model of toycity has to beat: itself untrained, and a classifier that knows no shapes.

    python tests/baselines.py      beside the results of runs/toycity, once 05_eval.py has run

The per-pixel classifier sees the colour and the position of one pixel. Its things are the connected
regions of a class, and the confidence of each is its mean probability.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from sklearn.ensemble import HistGradientBoostingClassifier

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import run  # noqa: E402
from common.datasets import open_split  # noqa: E402
from common.model import build_model  # noqa: E402

stage5 = importlib.import_module("05_eval")
STEP = 4  # every fourth pixel of every fourth row
SMALLEST = 400  # pixels of a segment, as smaller regions are mostly specks


def colours_and_positions(image: torch.Tensor) -> np.ndarray:
    """uint8 [3, H, W] -> float [H/4 * W/4, 5]: red, green, blue, row, column."""
    small = image[:, ::STEP, ::STEP].numpy().transpose(1, 2, 0) / 255
    height, width, _ = small.shape
    rows = np.arange(height) / height
    columns = np.arange(width) / width
    position = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=2)
    return np.concatenate([small, position], axis=2).reshape(-1, 5)


def fit_classifier(train, seed):
    """Fit the per-pixel classifier to 200,000 pixels of a training split."""
    random = np.random.default_rng(seed)
    points = []
    targets = []
    for sample in train:
        class_of = torch.tensor([255, *sample["labels"].tolist()])  # 255 is void
        classes = class_of[sample["segments"].long()]  # [H, W]
        target = classes[::STEP, ::STEP].flatten().numpy()
        chosen = random.choice(np.flatnonzero(target != 255), 200_000 // len(train))
        points.append(colours_and_positions(sample["image"])[chosen])
        targets.append(target[chosen])
    classifier = HistGradientBoostingClassifier(max_iter=60, random_state=seed)
    return classifier.fit(np.concatenate(points), np.concatenate(targets))


def find_regions(best, isthing):
    """The regions of each class in a map of classes [H, W]: [(label, mask bool [H, W])]."""
    found = []
    for label, is_thing in enumerate(isthing):
        regions = best == label
        count = 1
        if is_thing:
            regions, count = ndimage.label(regions)
        for region in range(1, count + 1):
            mask = regions == region
            if mask.sum() >= SMALLEST:
                found.append((label, mask))
    return found


def per_pixel(train, val, seed: int = 0) -> dict:
    """Train and score the per-pixel classifier. Results are as of stage 5's evaluate()."""
    classifier = fit_classifier(train, seed)
    isthing = [category.isthing for category in val.categories]
    scores = {metric: stage5.make_score(metric, val) for metric in val.metrics}
    for sample in val:
        height, width = sample["image"].shape[1:]
        probability = classifier.predict_proba(colours_and_positions(sample["image"]))
        probability = probability.reshape(height // STEP, width // STEP, -1)
        probability = probability.repeat(STEP, 0).repeat(STEP, 1)  # [H, W, classes]
        best = classifier.classes_[probability.argmax(2)]  # [H, W]

        ids = np.zeros((height, width), int)
        segments = []
        masks = []
        label_ids = []
        confidences = []
        for label, mask in find_regions(best, isthing):
            category_id = val.categories[label].id
            segments.append({"id": len(segments) + 1, "category_id": category_id})
            ids[mask] = len(segments)
            if isthing[label]:
                masks.append(mask)
                label_ids.append(category_id)
                confidences.append(probability.max(2)[mask].mean())

        truth = sample["truth"]
        scores["mIoU"].update(torch.from_numpy(best), **truth["mIoU"])
        scores["PQ"].update(torch.from_numpy(ids), segments, **truth["PQ"])
        # There may be none.
        masks = torch.from_numpy(np.array(masks, bool).reshape(-1, height, width))
        label_ids = torch.tensor(label_ids)
        confidences = torch.tensor(confidences)
        scores["AP"].update(masks, label_ids, confidences, **truth["AP"])
    return {metric: score.result() for metric, score in scores.items()}


def untrained(training: dict, val) -> dict:
    """Score the model of a run before its first step: pretrained encoders, random decoder."""
    torch.manual_seed(training["seed"])
    model = build_model(training, training["weights"])
    return evaluate(model, training, val)


def evaluate(model, training: dict, val) -> dict:
    """Score a model on all images of a validation split."""
    size = training["recipe"]["test_size"]
    return stage5.evaluate(model, val, size, stage5.Settings(), range(len(val)))


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--run", type=Path, default=Path("runs/toycity"))
    args = parser.parse_args()
    data = Path(json.loads((args.run / "run.json").read_text())["data"])
    train = open_split("toycity", data, "train")
    val = open_split("toycity", data, "val")
    _, training = stage5.load_trained(args.run)
    rows = {
        "untrained": stage5.headline(untrained(training, val), val, "toycity"),
        "colour and position": stage5.headline(per_pixel(train, val), val, "toycity"),
        "trained": json.loads((args.run / "results.json").read_text())["scores"],
    }
    table = [["", *rows["trained"]]]
    for name, scores in rows.items():
        table.append([name, *map(run.number, scores.values())])
    print(run.table(table))


if __name__ == "__main__":
    main()
