"""Write toycity scenes in the layout, names and bit depths of each data set, for tests of the readers.

Each function writes a few scenes below `root`, the data set's folder, and returns what a reader must find:
{picture's name: (image uint8 [H, W, 3], {(class name, mask as bytes) of each thing})}.
"""

import json

from common import toycity
from common.datasets import CITYSCAPES, SYNTHIA

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from test_pictures import png16

NAMES = {raw: name for raw, name, _ in CITYSCAPES}
THINGS = (24, 26, 27)


def scenes(count, size=(128, 256)):
    """(image, label ids, instance ids) of toycity scenes with cars, one number a thing above 255 in each."""
    for index in range(count):
        image, labels, ids = (part[150:406:2, 200:712:2].copy() for part in toycity.scene("val", index))
        labels[labels == toycity.EGO] = ids[labels == toycity.EGO] = 1
        car = ids[ids // 1000 == 26]
        if len(car):
            ids[ids == car[0]] = 26300
        assert image.shape[:2] == size
        yield image, labels, ids


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def things(ids, classes=THINGS, names=NAMES):
    return {(names[v // 1000], (ids == v).tobytes()) for v in np.unique(ids) if v // 1000 in classes}


def cityscapes(root, split="val", count=2):
    found = {}
    for i, (image, labels, ids) in enumerate(scenes(count)):
        stem = f"{split}/bonn/bonn_000000_{i:06d}"
        save(root / f"leftImg8bit/{stem}_leftImg8bit.png", image)
        save(root / f"gtFine/{stem}_gtFine_labelIds.png", labels.astype(np.uint8))
        save(root / f"gtFine/{stem}_gtFine_instanceIds.png", ids.astype(np.uint16))
        found[f"leftImg8bit/{stem}_leftImg8bit.png"] = image, things(ids)
    return found


def coco(root, split="val2017", count=2):
    """Instances as polygons, run-length codes and crowds; panoptic PNGs; the last photograph grey and empty."""
    categories = [{"id": raw, "name": name, "isthing": int(thing)} for raw, name, thing in CITYSCAPES]  # ids with gaps
    images, instances, panoptic, found = [], [], [], {}
    for i, (image, labels, ids) in enumerate([*scenes(count - 1), *scenes(1)]):
        empty = i == count - 1
        if empty:
            image, labels, ids = image[..., 0], 0 * labels, 0 * ids
        height, width = ids.shape
        number = 1000 + 37 * i
        images.append({"id": number, "file_name": f"{number:012d}.jpg", "height": height, "width": width})
        (root / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / split / f"{number:012d}.jpg", quality=95)
        image = np.asarray(Image.open(root / split / f"{number:012d}.jpg").convert("RGB"))
        colours, segments, expected = np.zeros((height, width, 3), np.uint8), [], set()
        for k, value in enumerate(v for v in np.unique(ids) if (v // 1000 if v >= 1000 else v) in NAMES):
            mask, category = ids == value, int(value // 1000 if value >= 1000 else value)
            colour = (k + 1, 7 * k, 200)
            colours[mask] = colour
            identity = colour[0] + 256 * colour[1] + 65536 * colour[2]
            crowd = int(value == ids.max())  # one thing stands in for a crowd
            segments.append({"id": identity, "category_id": category, "iscrowd": crowd, "area": int(mask.sum())})
            if value // 1000 not in THINGS:
                continue
            code = rle.encode(np.asfortranarray(mask, np.uint8))
            rows, columns = np.nonzero(mask)
            if crowd:  # uncompressed
                runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [0]])))
                counts = np.diff(np.concatenate([[0], runs, [mask.size]])).tolist()
                shape = {"size": [height, width], "counts": counts}
            elif k % 2:  # a polygon: the box
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                x0, y0, x1, y1 = (int(side) for side in box)
                shape = [[x0, y0, x1, y0, x1, y1, x0, y1], [x0, y0, x0, y0]]  # and one of two corners
                mask = np.zeros_like(mask)
                mask[y0:y1, x0:x1] = True
            else:
                shape = {"size": [height, width], "counts": code["counts"].decode()}
            annotation = {"id": len(instances) + 1, "image_id": number, "category_id": category, "segmentation": shape}
            instances.append(annotation | {"iscrowd": crowd, "area": float(mask.sum()), "bbox": [0, 0, 1, 1]})
            expected.add((NAMES[category], mask.tobytes()))
        save(root / f"annotations/panoptic_{split}/{number:012d}.png", colours)
        file = {"image_id": number, "file_name": f"{number:012d}.png", "segments_info": segments}
        panoptic.append(file)
        found[f"{split}/{number:012d}.jpg"] = image, expected
    info = {"info": {"year": 2017}, "licenses": [{"id": 1, "name": "none"}], "images": images}
    thing_categories = [category for category in categories if category["isthing"]]
    for kind, annotations, table in (("instances", instances, thing_categories), ("panoptic", panoptic, categories)):
        content = info | {"annotations": annotations, "categories": table}
        (root / f"annotations/{kind}_{split}.json").write_text(json.dumps(content))
    return found


ADE20K = ["wall", "building, edifice", "sky", "floor, flooring", "tree", "ceiling", "road, route"]


def ade20k(root, split="validation", count=2):
    """Labels 0 to 7 of a table of seven classes; expected are the label maps."""
    root.mkdir(parents=True, exist_ok=True)
    lines = [f"{i}\t0.1576\t11664\t1172\t{name}" for i, name in enumerate(ADE20K, 1)]
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(lines) + "\n")
    found = {}
    for i, (image, labels, _) in enumerate(scenes(count)):
        name = f"images/{split}/ADE_val_{i:08d}.jpg"
        save(root / name, image)
        save(root / f"annotations/{split}/ADE_val_{i:08d}.png", (labels % 8).astype(np.uint8))
        found[name] = np.asarray(Image.open(root / name)), (labels % 8).astype(int)
    return found


def kitti360(root, split="val", count=2):
    """All values id*1000 + n; one car is number 0, one building a garage, confidence falls to the right."""
    drive, found, lines = "2013_05_28_drive_0000_sync", {}, []
    names = NAMES | {34: "building"}
    for i, (image, labels, ids) in enumerate(scenes(count)):
        ids = np.where(ids >= 1000, ids, np.where(labels == 1, 0, labels.astype(int) * 1000))
        ids[ids == 26300] = 26000
        half = (ids == 11000) & (np.arange(ids.shape[1]) > 128)
        ids[half] = 34001
        name = f"data_2d_raw/{drive}/image_00/data_rect/{i:010d}.png"
        save(root / name, image)
        labels_of = f"data_2d_semantics/train/{drive}/image_00"
        save(root / f"{labels_of}/instance/{i:010d}.png", ids.astype(np.uint16))
        confidence = np.tile(np.linspace(65535, 100, ids.shape[1]).astype(np.uint16), (ids.shape[0], 1))
        save(root / f"{labels_of}/confidence/{i:010d}.png", confidence)
        lines.append(f"{name} {labels_of}/semantic/{i:010d}.png\n")
        found[name] = image, things(ids, (11, 34, *THINGS), names)
    (root / f"data_2d_semantics/train/2013_05_28_drive_{split}_frames.txt").write_text("".join(lines))
    return found


def urbansyn(root, split="train", count=2):
    found, train_id = {}, {raw: i for i, (raw, _, _) in enumerate(CITYSCAPES)}
    for i, (image, labels, ids) in enumerate(scenes(count)):
        colours, entries = np.zeros((*ids.shape, 3), np.uint8), []
        for k, value in enumerate(np.unique(ids)):
            colour = [40 + k, (90 * k) % 256, (50 * k) % 256]
            colours[ids == value] = colour
            if value // 1000 in THINGS:
                entries.append({"color": [*colour, 255], "label": NAMES[value // 1000], "bbox": {}})
        save(root / f"rgb/rgb_{i:04d}.png", image)
        save(root / f"ss/ss_{i:04d}.png", np.vectorize(lambda raw: train_id.get(raw, 255))(labels).astype(np.uint8))
        save(root / f"panoptic/panoptic_{i:04d}.png", colours)
        (root / "bbox2d").mkdir(exist_ok=True)
        (root / f"bbox2d/bbox2d_{i:04d}.json").write_text(json.dumps(entries))
        found[f"rgb/rgb_{i:04d}.png"] = image, things(ids)
    return found


def synscapes(root, split="train", count=2):
    found = {}
    for i, (image, labels, ids) in enumerate(scenes(count), 1):
        numbers = np.where(ids >= 1000, ids * 300 + 5, 0)  # beyond 16 bits
        colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1)
        labels = labels.copy()
        car = np.argwhere(labels == 26)
        if len(car):
            labels[tuple(car[0])] = 7  # class and instance disagree on a pixel
        save(root / f"img/rgb/{i}.png", image)
        save(root / f"img/class/{i}.png", labels.astype(np.uint8))
        save(root / f"img/instance/{i}.png", colours.astype(np.uint8))
        found[f"img/rgb/{i}.png"] = image, things(ids)
    return found


def synthia(root, split="train", count=2):
    own = {raw: label for label, raw in reversed(SYNTHIA.items())} | {1: 0}
    found = {}
    for i, (image, labels, ids) in enumerate(scenes(count)):
        classes = np.vectorize(lambda raw: own.get(raw, 0))(labels)
        numbers = np.where(ids >= 1000, ids % 1000 + 500, 0)
        (root / "GT/LABELS").mkdir(parents=True, exist_ok=True)
        png16(root / f"GT/LABELS/{i:07d}.png", np.stack([classes, numbers, 0 * classes], -1))
        save(root / f"RGB/{i:07d}.png", image)
        found[f"RGB/{i:07d}.png"] = image, things(ids)
    return found


FOLDERS = {
    "cityscapes": cityscapes, "coco": coco, "ADEChallengeData2016": ade20k, "KITTI-360": kitti360,
    "urbansyn": urbansyn, "synscapes": synscapes, "synthia": synthia,
}  # fmt: skip
