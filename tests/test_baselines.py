"""The trained model against what it has to beat, on a small toycity and a short training."""

import importlib

from common.datasets import open_split

import baselines
import pytest

stage5 = importlib.import_module("05_eval")


def test_colour_and_position_alone_tell_something(data):
    train, val = open_split("toycity", data, "train"), open_split("toycity", data, "val")
    scores = stage5.headline(baselines.per_pixel(train, val), val.categories)
    assert 20 < scores["mIoU"] < 80 and scores["PQ_th"] < 20  # things are more than that


@pytest.mark.slow
def test_a_short_training_beats_both_baselines_on_every_score(stage, data, tmp_path):
    folder = tmp_path / "run"
    stage("01_extract", "--data", data, "--run", folder, "--limit", 2, "--size", "64x128")
    stage("02_metrics", "--run", folder)
    stage(
        "03_select",
        "--run",
        folder,
        "--master",
        "tiny_vit",
        "--auxiliary",
        "tiny_hiera",
        "--stride",
        8,
    )
    stage("04_train", "--run", folder, "--steps", 300)
    train, val = open_split("toycity", data, "train"), open_split("toycity", data, "val")
    model, settings = stage5.load_trained(folder)
    results = {
        "trained": stage5.evaluate(
            model, val, settings["recipe"]["test_size"], stage5.Settings(), range(len(val))
        ),
        "untrained": baselines.untrained(settings, val),
        "per pixel": baselines.per_pixel(train, val),
    }
    numbers = {name: stage5.headline(result, val.categories) for name, result in results.items()}
    print(numbers)
    assert list(numbers["trained"]) == [
        "mIoU",
        "mIoU_th",
        "boundary_mIoU",
        "AP",
        "AP50",
        "PQ",
        "PQ_th",
        "PQ_st",
    ]
    for baseline in ("untrained", "per pixel"):
        for score, value in numbers["trained"].items():
            assert value > numbers[baseline][score] + 2, (baseline, score, numbers)
    assert numbers["per pixel"]["mIoU"] > 20  # it has learned what there is to learn from colour
    assert numbers["trained"]["mIoU_th"] == pytest.approx(
        sum(
            results["trained"]["semantic"]["per_class"][name] for name in ("person", "car", "truck")
        )
        / 3
    )
