"""The trained model against what it has to beat, on a small toycity and a short training."""

import importlib

from common.datasets import open_split

import baselines
import pytest

stage5 = importlib.import_module("05_eval")
SCORES = ["mIoU", "mIoU_th", "boundary_mIoU", "AP", "AP50", "PQ", "PQ_th", "PQ_st"]


def test_colour_and_position_alone_tell_something(data):
    train = open_split("toycity", data, "train")
    val = open_split("toycity", data, "val")
    scores = stage5.headline(baselines.per_pixel(train, val), val, "toycity")
    assert 20 < scores["mIoU"] < 80 and scores["PQ_th"] < 20  # things are more than that


@pytest.mark.slow
def test_a_short_training_beats_both_baselines_on_every_score(stage, data, tmp_path):
    folder = tmp_path / "run"
    pair = ("--master", "tiny_vit", "--auxiliary", "tiny_hiera", "--stride", 8)
    stage("01_extract", "--data", data, "--run", folder, "--limit", 2, "--size", "64x128")
    stage("02_metrics", "--run", folder)
    stage("03_select", "--run", folder, *pair)
    stage("04_train", "--run", folder, "--steps", 400)
    train = open_split("toycity", data, "train")
    val = open_split("toycity", data, "val")
    model, training = stage5.load_trained(folder)
    results = {
        "trained": baselines.evaluate(model, training, val),
        "untrained": baselines.untrained(training, val),
        "per pixel": baselines.per_pixel(train, val),
    }
    scores = {}
    for name, result in results.items():
        scores[name] = stage5.headline(result, val, "toycity")
    print(scores)
    assert list(scores["trained"]) == SCORES
    for baseline in ("untrained", "per pixel"):
        for name, value in scores["trained"].items():
            assert value > scores[baseline][name] + 2, (baseline, name, scores)
    assert scores["per pixel"]["mIoU"] > 20  # it has learned what there is to learn from colour
    per_class = results["trained"]["mIoU"]["per_class"]
    of_things = sum(per_class[name] for name in ("person", "car", "truck")) / 3
    assert scores["trained"]["mIoU_th"] == pytest.approx(of_things)
