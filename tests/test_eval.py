"""Stage 5: inference rules on masks made by hand, and scores against other implementations."""

import importlib

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from common.benchmarks import open_split

stage5 = importlib.import_module("05_eval")
CATEGORIES = [
    {"id": 7, "isthing": False, "name": "road"},
    {"id": 23, "isthing": False, "name": "sky"},
    {"id": 26, "isthing": True, "name": "car"},
]


# ---------------------------------------------------------------------------------------------- inference


def queries(*entries, size=(8, 8)):
    """(class probabilities without no-object, rows from, rows to) -> what predict() returns."""
    classes = torch.tensor([[*p, 1 - sum(p)] for p, _, _ in entries])
    masks = torch.full((len(entries), *size), 0.1)
    for i, (_, begin, end) in enumerate(entries):
        masks[i, begin:end] = 0.9
    return classes, masks


def test_semantic_adds_the_votes_of_queries():
    # Two weak queries for class 1 outvote one stronger query for class 0 where they overlap.
    classes, masks = queries(([0.6, 0, 0], 0, 8), ([0, 0.4, 0], 0, 4), ([0, 0.4, 0], 0, 4))
    labels = stage5.semantic(classes, masks)
    assert (labels[:4] == 1).all() and (labels[4:] == 0).all()


def test_instances_score_class_times_mask_quality():
    classes, masks = queries(([0, 0.2, 0.7], 0, 4), ([0.9, 0, 0.05], 4, 8))
    found, labels, scores = stage5.instances(classes, masks, things=[1, 2])
    assert labels.tolist() == [2, 1, 2, 1]  # stuff never appears
    torch.testing.assert_close(scores, torch.tensor([0.7, 0.2, 0.05, 0.0]) * 0.9)
    assert found[0, :4].all() and not found[0, 4:].any() and torch.equal(found[1], found[0])
    # stuff counts among the best, and only then is left out: of 0.9 (stuff), 0.7 and 0.2 two things stay
    assert stage5.instances(classes, masks, things=[1, 2], top=3)[1].tolist() == [2, 1]


def test_panoptic_keeps_the_sure_and_the_visible():
    classes, masks = queries(
        ([0.95, 0, 0], 0, 4),  # stuff
        ([0.95, 0, 0], 6, 8),  # the same stuff elsewhere: one segment
        ([0, 0, 0.9], 4, 6),  # a thing
        ([0, 0, 0.85], 3, 6),  # a thing that keeps a third of its mask: dropped
        ([0, 0.79, 0], 0, 8),  # not sure enough
    )
    ids, segments = stage5.panoptic(classes, masks, things=[2])
    assert [s["label"] for s in segments] == [0, 2]
    assert ids[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 1, 1]


def test_panoptic_of_nothing_is_void():
    ids, segments = stage5.panoptic(*queries(([0.5, 0, 0], 0, 8)), things=[2])
    assert not ids.any() and segments == []


# ---------------------------------------------------------------------------------------------- scores


def test_semantic_score_equals_scikit_learn():
    rng = np.random.default_rng(0)
    score, truths, guesses = stage5.SemanticScore(["a", "b", "c", "absent"]), [], []
    for _ in range(5):
        target, pred = rng.integers(0, 3, (20, 30)), rng.integers(0, 4, (20, 30))
        target[rng.random((20, 30)) < 0.2] = 255
        score.update(torch.from_numpy(pred), torch.from_numpy(target))
        truths.append(target[target != 255])
        guesses.append(pred[target != 255])
    expected = 100 * jaccard_score(np.concatenate(truths), np.concatenate(guesses), labels=[0, 1, 2], average=None)
    result = score.result()
    np.testing.assert_allclose([result["per_class"][name] for name in "abc"], expected)
    assert np.isnan(result["per_class"]["absent"]) and result["mIoU"] == pytest.approx(expected.mean())


def panoptic_slowly(images, categories):
    """Panoptic quality written out from its definition, mask against mask."""
    rows = {c["id"]: [0.0, 0, 0, 0] for c in categories}  # IoU, hits, alarms, misses
    for pred, pred_segments, true, true_segments in images:
        used = set()
        for t in true_segments:
            if t.get("iscrowd"):
                continue
            hit = False
            for p in pred_segments:
                if p["category_id"] == t["category_id"]:
                    a, b = pred == p["id"], true == t["id"]
                    iou = (a & b).sum().item() / ((a | b).sum() - (a & (true == 0)).sum()).item()
                    if iou > 0.5:
                        hit = True
                        used.add(p["id"])
                        rows[t["category_id"]][0] += iou
                        rows[t["category_id"]][1] += 1
            rows[t["category_id"]][3] += not hit
        crowd = {t["category_id"]: t["id"] for t in true_segments if t.get("iscrowd")}
        for p in pred_segments:
            if p["id"] not in used:
                region = pred == p["id"]
                excused = (true[region] == 0).sum() + (true[region] == crowd.get(p["category_id"], -1)).sum()
                rows[p["category_id"]][2] += not excused / region.sum() > 0.5
    quality = {i: iou / (hits + fp / 2 + fn / 2) for i, (iou, hits, fp, fn) in rows.items() if hits + fp + fn}
    return {c["name"]: 100 * quality[c["id"]] for c in categories if c["id"] in quality}


def random_segments(rng):
    """Blocks of a grid with random categories, some of them void."""
    ids = torch.from_numpy(np.kron(rng.integers(0, 9, (4, 6)), np.ones((5, 5), int)))
    present = [i for i in ids.unique().tolist() if i]
    return ids, [{"id": i, "category_id": int(rng.choice([7, 23, 26]))} for i in present]


def test_panoptic_score_equals_its_definition():
    rng = np.random.default_rng(1)
    score, images = stage5.PanopticScore(CATEGORIES), []
    for _ in range(60):
        true, true_segments = random_segments(rng)
        pred = true.roll(int(rng.integers(0, 3)), 1)
        pred[torch.from_numpy(rng.random(pred.shape) < 0.1)] = 0
        pred_segments = [
            {"id": i, "category_id": next(s["category_id"] for s in true_segments if s["id"] == i)}
            for i in pred.unique().tolist()
            if i
        ]
        for segment in pred_segments:
            if rng.random() < 0.2:
                segment["category_id"] = 26
        crowded = set()
        for segment in true_segments:  # at most one crowd of a class, as in COCO
            if segment["category_id"] == 26 and not crowded:
                segment["iscrowd"] = 1
                crowded.add(26)
        images.append((pred, pred_segments, true, true_segments))
        score.update(*images[-1])
    expected, result = panoptic_slowly(images, CATEGORIES), score.result()
    assert min(expected.values()) > 5  # the cases are neither trivial nor hopeless
    for name, value in expected.items():
        assert result["per_class"][name] == pytest.approx(value, abs=1e-9)
    assert result["PQ_th"] == pytest.approx(expected["car"])
    assert result["PQ_st"] == pytest.approx((expected["road"] + expected["sky"]) / 2)


def test_panoptic_score_of_the_truth_is_100_and_of_nothing_0():
    rng = np.random.default_rng(2)
    perfect, nothing = stage5.PanopticScore(CATEGORIES), stage5.PanopticScore(CATEGORIES)
    for _ in range(5):
        ids, segments = random_segments(rng)
        perfect.update(ids, segments, ids, segments)
        nothing.update(torch.zeros_like(ids), [], ids, segments)
    assert perfect.result()["PQ"] == perfect.result()["SQ"] == 100 and nothing.result()["PQ"] == 0


def test_instance_score_of_the_truth_is_100_and_falls_with_errors(data):
    samples = open_split("toycity", data, "val")
    categories = [{"id": raw, "name": name, "isthing": thing} for raw, name, thing in samples.categories]
    truth = stage5.coco_annotations(samples, categories)
    assert {a["category_id"] for a in truth["annotations"]} == {24, 26, 27}
    scores = {name: stage5.CocoInstanceScore(truth) for name in ("perfect", "shifted", "wrong class", "none")}
    for sample in samples:
        things = [i for i, label in enumerate(sample["labels"].tolist()) if categories[label]["isthing"]]
        masks = torch.stack([sample["segments"] == i + 1 for i in things])
        ids = torch.tensor([categories[sample["labels"][i]]["id"] for i in things])
        sure = torch.linspace(0.9, 0.5, len(things))
        scores["perfect"].update(sample["image_id"], masks, ids, sure)
        scores["shifted"].update(sample["image_id"], masks.roll(4, dims=-1), ids, sure)
        scores["wrong class"].update(sample["image_id"], masks, ids.roll(1), sure)
        scores["none"].update(sample["image_id"], masks[:0], ids[:0], sure[:0])
    results = {name: score.result() for name, score in scores.items()}
    ap = {name: result["AP"] for name, result in results.items()}
    assert results["perfect"]["AP50"] == pytest.approx(100) and results["shifted"]["AP50"] > ap["shifted"]
    assert results["perfect"]["per_class"] == pytest.approx({"person": 100, "car": 100, "truck": 100})
    assert ap["perfect"] == pytest.approx(100) and ap["none"] == 0
    assert 5 < ap["shifted"] < 80 and ap["wrong class"] < 60
