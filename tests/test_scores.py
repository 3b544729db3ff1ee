"""The scores, against the official tools or against their rules written out slowly.

cityscapesScripts can be installed here. KITTI-360's rules and panopticapi's are written out.
"""

import importlib
import json

from common.datasets import CITYSCAPES_CATEGORIES, CITYSCAPES_THINGS

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as instance_tool
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as pixel_tool
from PIL import Image
from pycocotools import mask as rle
from scipy import ndimage

stage5 = importlib.import_module("05_eval")
THING_IDS = {category.name: category.id for category in CITYSCAPES_THINGS}
CLASS_NAMES = [category.name for category in CITYSCAPES_CATEGORIES]
SIZE = (72, 120)


# ------------------------------------------------------------------ the official tool


@pytest.fixture
def official(monkeypatch):
    """Make cityscapesScripts 2.3.0 run with today's NumPy.

    NumPy has no in1d any more, and the script cannot write NumPy's integers to JSON.
    """
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    for tool in (instance_tool, pixel_tool):
        monkeypatch.setattr(tool, "writeDict2JSON", lambda content, path: None)
        monkeypatch.setattr(tool.args, "quiet", True)
        monkeypatch.setattr(tool.args, "JSONOutput", False)


def official_instance_ap(folder, truths, texts):
    """The results of cityscapesScripts' instance evaluation.

    truths: PNGs of instance ids. texts: what save_instances() wrote, below the folder.
    """
    instance_tool.args.gtInstancesFile = str(folder / "no_cache.json")
    instance_tool.args.predictionPath = str(folder)
    predictions = [str(path) for path in texts]
    truths = [str(path) for path in truths]
    return instance_tool.evaluateImgLists(predictions, truths, instance_tool.args)


def save_instances(folder, stem, masks, label_ids, confidences):
    """Write an image's instances as cityscapesScripts reads them, and return the text file.

    It has a line for each mask: the mask's PNG, its raw label id and its confidence.
    """
    lines = []
    for number, mask in enumerate(masks):
        name = f"{stem}_{number:03}.png"
        Image.fromarray(255 * np.asarray(mask, np.uint8)).save(folder / name)
        lines.append(f"{name} {int(label_ids[number])} {float(confidences[number])}\n")
    text = folder / f"{stem}.txt"
    text.write_text("".join(lines))
    return text


def same(ours, theirs):
    assert ours == pytest.approx(theirs, abs=1e-9, nan_ok=True)


# ------------------------------------------------------------------ instances


def rectangle(rng, smallest=4, largest=40):
    height, width = rng.integers(smallest, largest, 2)
    top, left = rng.integers(0, SIZE[0] - 3), rng.integers(0, SIZE[1] - 3)
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def random_truth(rng, classes):
    """Raw ids of one image: stuff, void, caravans, groups, and instances large and tiny.

    Some instances have a number above 255.
    """
    ids = np.full(SIZE, rng.choice([7, 11, 21, 23]))
    for _ in range(rng.integers(0, 4)):
        ids[rectangle(rng)] = rng.choice([0, 1, 3, 4, 6, 9, 10, 14, 18, 22, 29, 30, 29001])
    for _ in range(rng.integers(0, 3)):
        ids[rectangle(rng)] = rng.choice(classes)  # a group
    for number in range(rng.integers(0, 9)):
        ids[rectangle(rng, 3, 30)] = rng.choice(classes) * 1000 + number * 97
    return ids


def random_predictions(rng, ids, classes):
    """Masks near the truth or elsewhere: doubled, overlapping, on void, on groups, empty.

    Some scores are tied.
    """
    masks, labels = [], []
    for value in np.unique(ids):
        label = value // 1000 if value >= 1000 else value
        if label in classes:
            for _ in range(rng.integers(0, 4)):
                mask = np.roll(ids == value, rng.integers(-2, 3, 2), (0, 1))
                masks.append(mask & (rng.random(SIZE) > rng.choice([0, 0.1, 0.4])))
                labels.append(label if rng.random() < 0.85 else rng.choice(classes))
        elif label in (0, 1, 4, 29) and rng.random() < 0.5:
            masks.append(ids == value)
            labels.append(rng.choice(classes))
    for _ in range(rng.integers(0, 4)):
        masks.append(rectangle(rng) if rng.random() < 0.9 else np.zeros(SIZE, bool))
        labels.append(rng.choice([*classes, 7]))
    masks = np.array(masks, bool).reshape(-1, *SIZE)
    return masks, np.array(labels, int), rng.choice(np.linspace(0.1, 0.9, 7), len(masks))


def random_set(seed, count, classes=(24, 25, 26, 33)):
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        ids = random_truth(rng, classes)
        images.append((ids, *random_predictions(rng, ids, classes)))
    return images


def scored(images, label_ids=THING_IDS, weights=None):
    score = stage5.CityscapesInstanceScore(label_ids)
    for i, (ids, masks, labels, scores) in enumerate(images):
        score.update(
            masks=torch.from_numpy(masks),
            labels=torch.from_numpy(labels),
            scores=torch.from_numpy(scores),
            instance_ids=torch.from_numpy(ids),
            weights=None if weights is None else torch.from_numpy(weights[i]),
        )
    return score.result()


@pytest.mark.parametrize("count, sets", [(300, 1), (4, 30)])
def test_cityscapes_ap_equals_the_official_tool(count, sets, official, tmp_path):
    """One set of many images, and many of few, where classes lack truth or predictions."""
    seen_nan = seen_zero = 0
    for seed in range(sets):
        images = random_set(seed + 10 * count, count)
        truths = []
        texts = []
        for i, (ids, masks, labels, scores) in enumerate(images):
            stem = f"bonn_{seed:06d}_{i:06d}"
            truths.append(tmp_path / f"{stem}_gtFine_instanceIds.png")
            Image.fromarray(ids.astype(np.uint16)).save(truths[-1])
            texts.append(save_instances(tmp_path, stem, masks, labels, scores))
        theirs = official_instance_ap(tmp_path, truths, texts)["averages"]
        ours = scored(images)
        same(ours["AP"], 100 * theirs["allAp"])
        same(ours["AP50"], 100 * theirs["allAp50%"])
        for name, value in ours["per_class"].items():
            same(value, 100 * theirs["classes"][name]["ap"])
            seen_nan += np.isnan(value)
            seen_zero += value == 0
        assert 1 < ours["AP"] < 95  # neither hopeless nor trivial
    assert seen_nan and (sets == 1 or seen_zero)


def instance_ap_slowly(images, classes, weights):
    """AP by KITTI-360's rules, written from their description: float [classes, thresholds].

    It takes one class, one threshold and one image after the other.
    """
    table = []
    for label in classes:
        row = []
        for threshold in np.arange(0.5, 1.0, 0.05):
            points = []  # (score, is it right?)
            wanted = 0  # instances that there are to find
            for image, weight in zip(images, weights, strict=True):
                ids, masks, labels, scores = image
                true = []
                for value in np.unique(ids):
                    of_class = 11 if value // 1000 == 34 else value // 1000
                    if value and of_class == label:
                        true.append((ids == value, weight[ids == value].sum()))
                wanted += sum(area >= 100 for _, area in true)
                finders = {t: [] for t in range(len(true))}
                for mask, predicted, score in zip(masks, labels, scores, strict=True):
                    area = weight[mask].sum()
                    if predicted != label or area < 1e-8:
                        continue
                    found, excused = False, weight[mask & (ids == 0)].sum()
                    for t, (true_mask, true_area) in enumerate(true):
                        shared = weight[mask & true_mask].sum()
                        if shared / (area + true_area - shared) > threshold:
                            found = True
                            finders[t].append(score)
                        if true_area < 100:
                            excused += shared
                    if not found and excused / area <= threshold:
                        points.append((score, False))
                for t, (_, true_area) in enumerate(true):
                    if true_area >= 100 and finders[t]:
                        best, *rest = sorted(finders[t], reverse=True)
                        points += [(best, True), *((score, False) for score in rest)]
            if not wanted:
                row.append(np.nan)
                continue
            # The curve from the highest score down. It has an artificial first point at recall 0
            # and precision 1.
            curve = [(0.0, 1.0)]
            for least in sorted({score for score, _ in points}, reverse=True):
                taken = [right for score, right in points if score >= least]
                curve.append((sum(taken) / wanted, sum(taken) / len(taken)))
            ap = 0.0
            for i, (_, precision) in enumerate(curve):
                before = curve[i - 1][0] if i else 0.0
                after = curve[i + 1][0] if i + 1 < len(curve) else curve[i][0]
                ap += precision * (after - before) / 2  # half the way to both neighbours
            row.append(100 * ap)
        table.append(row)
    return np.array(table)


@pytest.mark.parametrize("seed", range(4))
def test_kitti360_ap_equals_its_rules(seed):
    rng = np.random.default_rng(seed)
    classes = (11, 24, 26, 33)
    images = []
    weights = []
    for ids, *_ in random_set(seed, 80, classes):
        # All values are id * 1000 + n. 26000 is an instance, 0 is void.
        ids = np.where(ids < 1000, ids * 1000 * (ids > 6), ids)
        is_building = (ids >= 11000) & (ids < 12000)
        if rng.random() < 0.5:
            ids = np.where(is_building, ids + 23000, ids)  # garages
        as_buildings = np.where(ids >= 34000, ids - 23000, ids)
        masks, labels, scores = random_predictions(rng, as_buildings, classes)
        # Where next to nothing counts, a prediction has no weight and is no prediction.
        edge = np.zeros((1, *SIZE), bool)
        edge[:, :, :9] = True
        masks = np.concatenate([masks, edge])
        images.append((ids, masks, np.append(labels, 26), np.append(scores, 0.95)))
        weights.append(ndimage.gaussian_filter(rng.random(SIZE), 4) ** 2 * 4)
        weights[-1][:, :10] = 1e-12
    ours = scored(images, {str(label): label for label in classes}, weights)
    expected = instance_ap_slowly(images, classes, weights)
    for label, row in zip(classes, expected, strict=True):
        same(ours["per_class"][str(label)], row.mean())
    same(ours["AP"], np.nanmean(expected))
    same(ours["AP50"], np.nanmean(expected[:, 0]))
    assert 1 < ours["AP"] < 95


def test_ids_may_stand_for_names_and_nothing_may_be_there():
    score = stage5.CityscapesInstanceScore([24, 26])
    assert np.isnan(score.result()["AP"])
    ids = torch.full((20, 20), 26000)
    nothing = torch.zeros(0, 20, 20, dtype=torch.bool)
    score.update(nothing, torch.zeros(0).long(), torch.zeros(0), ids)
    assert score.result()["per_class"][26] == 0 and np.isnan(score.result()["per_class"][24])
    score.update(torch.ones(1, 20, 20, dtype=torch.bool), torch.tensor([26]), torch.ones(1), ids)
    assert score.result()["AP50"] == pytest.approx(50)


def test_an_excluded_class_has_no_part_in_the_means():
    score = stage5.CityscapesInstanceScore({"car": 26, "bus": 28}, excluded_from_mean=("bus",))
    ids = torch.full((20, 20), 26000)
    ids[:10] = 28000
    found = ids[None] == 28000
    score.update(found, torch.tensor([28]), torch.ones(1), ids)
    result = score.result()
    assert result["per_class"] == pytest.approx({"car": 0, "bus": 100})
    assert result["AP"] == result["AP50"] == 0


# ------------------------------------------------------------------ semantic


def random_labels(rng, smooth=3):
    """Regions of all 19 classes, int [H, W]."""
    noise = rng.random((len(CLASS_NAMES), *SIZE))
    return ndimage.gaussian_filter(noise, (0, smooth, smooth)).argmax(0)


def test_semantic_score_equals_the_official_tool(official, tmp_path):
    rng = np.random.default_rng(0)
    raw = np.array([category.id for category in CITYSCAPES_CATEGORIES])
    score = stage5.SemanticScore(CLASS_NAMES)
    truths = []
    predictions = []
    for i in range(200):
        target = random_labels(rng)
        pred = np.where(rng.random(SIZE) < 0.6, target, random_labels(rng))
        void = rng.random(SIZE) < 0.1
        truth = np.where(void, rng.choice([0, 3, 9, 29]), raw[target])
        stem = f"bonn_000000_{i:06d}"
        truths.append(str(tmp_path / f"{stem}_gtFine_labelIds.png"))
        Image.fromarray(truth.astype(np.uint8)).save(truths[-1])
        predictions.append(str(tmp_path / f"{stem}_pred.png"))
        Image.fromarray(raw[pred].astype(np.uint8)).save(predictions[-1])
        # The tool asks for instances as well.
        instances = tmp_path / f"{stem}_gtFine_instanceIds.png"
        Image.fromarray(raw[target].astype(np.uint16)).save(instances)
        score.update(torch.from_numpy(pred), torch.from_numpy(np.where(void, 255, target)))
    theirs = pixel_tool.evaluateImgLists(predictions, truths, pixel_tool.args)
    ours = score.result()
    same(ours["mIoU"], 100 * theirs["averageScoreClasses"])
    for name, value in ours["per_class"].items():
        same(value, 100 * theirs["classScores"][name])


def test_boundary_miou_equals_its_definition():
    rng = np.random.default_rng(1)
    score = stage5.SemanticScore(CLASS_NAMES)
    hit = np.zeros(19)
    union = np.zeros(19)
    for _ in range(20):
        target = random_labels(rng, 6)
        pred = np.roll(target, rng.integers(-3, 4, 2), (0, 1))
        void = ndimage.gaussian_filter(rng.random(SIZE), 3) > 0.52
        target[void] = 255
        score.update(torch.from_numpy(pred), torch.from_numpy(target))
        pred = np.where(void, 255, pred)
        distance = round(0.02 * np.hypot(*SIZE))
        assert distance == 3
        for label in range(19):
            edges = []
            for labels in (target, pred):
                mask = labels == label
                inner = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=distance)
                edges.append(mask & ~inner)
            hit[label] += (edges[0] & edges[1]).sum()
            union[label] += (edges[0] | edges[1]).sum()
    result = score.result()
    assert result["boundary_mIoU"] == pytest.approx(100 * (hit / union).mean(), abs=1e-9)
    assert result["boundary_mIoU"] < result["mIoU"] - 5


def test_a_class_absent_from_the_truth_is_left_out():
    score = stage5.SemanticScore(["a", "b", "absent"])
    target = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])
    score.update(torch.tensor([[0, 2, 1, 1], [0, 0, 1, 0]]), target)
    result = score.result()
    assert result["per_class"]["a"] == 75 and result["per_class"]["b"] == 100
    assert result["mIoU"] == 87.5
    assert np.isnan(result["per_class"]["absent"])


# ------------------------------------------------------------------ panoptic

CATEGORIES = [
    {"id": 7, "isthing": False, "name": "road"},
    {"id": 23, "isthing": False, "name": "sky"},
    {"id": 26, "isthing": True, "name": "car"},
]


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
                crowd_id = crowd.get(p["category_id"], -1)
                excused = (true[region] == 0).sum() + (true[region] == crowd_id).sum()
                rows[p["category_id"]][2] += not excused / region.sum() > 0.5
    table = {}
    for category in categories:
        iou, hits, fp, fn = rows[category["id"]]
        weight = hits + fp / 2 + fn / 2
        if weight:
            qualities = [iou / weight, iou / max(hits, 1), hits / weight]  # PQ, SQ, RQ
            table[category["name"]] = 100 * np.array(qualities)
    return table


def random_segments(rng, scale=1):
    """Blocks of a grid with random categories, some of them void. `scale` spreads the ids."""
    blocks = np.kron(rng.integers(0, 9, (4, 6)), np.ones((5, 5), int))
    ids = torch.from_numpy(blocks) * scale
    present = [i for i in ids.unique().tolist() if i]
    return ids, [{"id": i, "category_id": int(rng.choice([7, 23, 26]))} for i in present]


@pytest.mark.parametrize("scale", [1, 1_700_003])  # COCO's colours make such large ids
def test_panoptic_score_equals_its_definition(scale):
    rng = np.random.default_rng(1)
    score = stage5.PanopticScore(CATEGORIES)
    images = []
    for _ in range(300):
        true, true_segments = random_segments(rng, scale)
        pred = true.roll(int(rng.integers(0, 3)), 1)
        pred[torch.from_numpy(rng.random(pred.shape) < 0.1)] = 0
        category_of = {s["id"]: s["category_id"] for s in true_segments}
        present = [i for i in pred.unique().tolist() if i]
        pred_segments = [{"id": i, "category_id": category_of[i]} for i in present]
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
    expected = panoptic_slowly(images, CATEGORIES)
    result = score.result()
    assert min(pq for pq, _, _ in expected.values()) > 5  # not hopeless
    for name, (pq, _, _) in expected.items():
        same(result["per_class"][name], pq)
    pq, sq, rq = np.mean(list(expected.values()), 0)
    same(result["PQ"], pq)
    same(result["SQ"], sq)
    same(result["RQ"], rq)
    same(result["PQ_th"], expected["car"][0])
    same(result["PQ_st"], (expected["road"][0] + expected["sky"][0]) / 2)


def test_panoptic_score_of_the_truth_is_100_and_of_nothing_0():
    rng = np.random.default_rng(2)
    perfect = stage5.PanopticScore(CATEGORIES)
    nothing = stage5.PanopticScore(CATEGORIES)
    for _ in range(5):
        ids, segments = random_segments(rng)
        perfect.update(ids, segments, ids, segments)
        nothing.update(torch.zeros_like(ids), [], ids, segments)
    assert perfect.result()["PQ"] == perfect.result()["SQ"] == 100
    assert nothing.result()["PQ"] == 0


# ------------------------------------------------------------------ COCO


def coco_mask(mask):
    """A mask bool [H, W] as COCO's JSON has it, in run-length encoding."""
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def coco_truth(file):
    """Write a COCO instances file of twelve images: {image id: [(mask, category id)]}."""
    images = []
    annotations = []
    masks = {}
    for image_id, (ids, *_) in enumerate(random_set(5, 12), 40):
        images.append({"id": image_id, "height": SIZE[0], "width": SIZE[1]})
        masks[image_id] = []
        for value in np.unique(ids):
            mask = ids == value
            if value < 24000 or mask.sum() <= 9:
                continue
            label = int(value // 1000)
            masks[image_id].append((mask, label))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": label,
                "segmentation": coco_mask(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "bbox": [0, 0, 1, 1],
            }
            annotations.append(annotation)
    names = {24: "person", 25: "rider", 26: "car", 29: "caravan", 33: "bicycle", 32: "absent"}
    categories = [{"id": raw, "name": name} for raw, name in names.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return masks


def test_coco_ap_of_the_truth_is_100_and_falls_with_errors(tmp_path):
    masks = coco_truth(tmp_path / "truth.json")
    results = {}
    for kind, shift in (("perfect", 0), ("shifted", 2), ("none", 0)):
        score = stage5.CocoInstanceScore(tmp_path / "truth.json")
        for image_id, entries in masks.items():
            if kind == "none":
                entries = []
            found = np.array([mask for mask, _ in entries], bool).reshape(-1, *SIZE)
            found = torch.from_numpy(np.roll(found, shift, -1))
            labels = torch.tensor([label for _, label in entries], dtype=torch.int64)
            score.update(image_id, found, labels, torch.linspace(0.9, 0.5, len(entries)))
        results[kind] = score.result()
    perfect = results["perfect"]
    assert perfect["AP"] == pytest.approx(100) and np.isnan(perfect["per_class"]["absent"])
    assert set(perfect) == {"AP", "AP50", "AP75", "APs", "APm", "APl", "per_class"}
    assert 10 < results["shifted"]["AP"] < 90
    assert results["shifted"]["AP50"] > results["shifted"]["AP"]
    assert results["none"]["AP"] == 0
