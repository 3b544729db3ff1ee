"""What a model of toycity has to beat: the same model untrained, and a classifier that knows no shapes.

    python tests/baselines.py                 beside the results of runs/toycity, once 05_eval.py has run

The per-pixel classifier sees the colour and the position of one pixel. Its things are the connected regions of a
class, scored by their mean probability.
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


def colours_and_positions(image: torch.Tensor) -> np.ndarray:
    """uint8 [3, H, W] -> float [H/4 * W/4, 5]: red, green, blue, row, column."""
    small = image[:, ::STEP, ::STEP].numpy().transpose(1, 2, 0) / 255
    height, width = small.shape[:2]
    position = np.stack(
        np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij"), axis=2
    )
    return np.concatenate([small, position], axis=2).reshape(-1, 5)


def per_pixel(train, val, seed: int = 0) -> dict:
    """Train and score the per-pixel classifier; results as of stage 5's evaluate()."""
    rng = np.random.default_rng(seed)
    points, targets = [], []
    names = [name for _, name, _ in train.categories]
    for sample in train:
        known = torch.tensor([255, *sample["labels"].tolist()])[
            sample["segments"].long()
        ]  # [H, W], 255 void
        target = known[::STEP, ::STEP].flatten().numpy()
        chosen = rng.choice(np.flatnonzero(target != 255), 200_000 // len(train))
        points.append(colours_and_positions(sample["image"])[chosen])
        targets.append(target[chosen])
    classifier = HistGradientBoostingClassifier(max_iter=60, random_state=seed)
    classifier.fit(np.concatenate(points), np.concatenate(targets))

    categories = [
        {"id": raw, "name": name, "isthing": thing} for raw, name, thing in val.categories
    ]
    scores = {"semantic": stage5.SemanticScore(names), "panoptic": stage5.PanopticScore(categories)}
    scores["instance"] = stage5.CityscapesInstanceScore(
        {c["name"]: c["id"] for c in categories if c["isthing"]}
    )
    for sample in val:
        height, width = sample["image"].shape[1:]
        probability = classifier.predict_proba(
            colours_and_positions(sample["image"])
        )  # [pixels, classes]
        probability = (
            probability.reshape(height // STEP, width // STEP, -1).repeat(STEP, 0).repeat(STEP, 1)
        )
        best = classifier.classes_[probability.argmax(2)]  # [H, W]
        scores["semantic"].update(torch.from_numpy(best), *sample["truth"]["semantic"])
        ids, segments, masks, labels, sure = np.zeros((height, width), int), [], [], [], []
        for label, category in enumerate(categories):
            regions, count = (
                ndimage.label(best == label) if category["isthing"] else (best == label, 1)
            )
            for region in range(1, count + 1):
                mask = regions == region
                if mask.sum() < 400:  # specks, mostly
                    continue
                segments.append({"id": len(segments) + 1, "category_id": category["id"]})
                ids[mask] = len(segments)
                if category["isthing"]:
                    masks.append(torch.from_numpy(mask))
                    labels.append(category["id"])
                    sure.append(probability.max(2)[mask].mean())
        scores["panoptic"].update(torch.from_numpy(ids), segments, *sample["truth"]["panoptic"])
        masks = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)
        scores["instance"].update(
            masks, torch.tensor(labels), torch.tensor(sure), *sample["truth"]["instance"]
        )
    return {task: scores[task].result() for task in ("semantic", "instance", "panoptic")}


def untrained(settings: dict, val) -> dict:
    """The model of a run as it was before its first step: pretrained encoders, random decoder."""
    torch.manual_seed(settings["seed"])
    model = build_model(settings, settings["weights"])
    return stage5.evaluate(
        model, val, settings["recipe"]["test_size"], stage5.Settings(), range(len(val))
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/toycity"))
    args = parser.parse_args()
    data = Path(json.loads((args.run / "run.json").read_text())["data"])
    train, val = open_split("toycity", data, "train"), open_split("toycity", data, "val")
    _, settings = stage5.load_trained(args.run)
    rows = {"untrained": untrained(settings, val), "colour and position": per_pixel(train, val)}
    numbers = {name: stage5.headline(results, val.categories) for name, results in rows.items()}
    numbers["trained"] = json.loads((args.run / "results.json").read_text())["benchmarks"][
        "toycity"
    ]["scores"]
    table = [["", *numbers["trained"]]]
    table += [[name, *map(run.number, row.values())] for name, row in numbers.items()]
    print(run.table(table))


if __name__ == "__main__":
    main()
