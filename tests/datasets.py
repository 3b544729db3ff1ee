"""Write toycity scenes in the layout, names and bit depths of each data set, to test the readers.

Each function writes a few scenes below `root`, the data set's folder. It returns what a reader must
find: {image's name: (image uint8 [H, W, 3], {(class name, mask as bytes) of each thing})}.
"""

import json

from common import toycity
from common.datasets import CITYSCAPES_CATEGORIES, SYNTHIA_IDS

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from test_images import png16

NAMES = {category.id: category.name for category in CITYSCAPES_CATEGORIES}
THINGS = (24, 26, 27)
DRIVE = "2013_05_28_drive_0000_sync"


def scenes(count, size=(128, 256)):
    """Yield (image, label ids, instance ids) of toycity scenes with cars.

    One thing in each scene has a number above 255.
    """
    for index in range(count):
        scene = toycity.scene("val", index)
        image, labels, ids = (part[150:406:2, 200:712:2].copy() for part in scene)
        labels[labels == toycity.EGO] = 1
        ids[ids == toycity.EGO] = 1
        car = ids[ids // 1000 == 26]
        if len(car):
            ids[ids == car[0]] = 26300
        assert image.shape[:2] == size
        yield image, labels, ids


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def things(ids, classes=THINGS, names=NAMES):
    """{(class name, mask as bytes)} of each thing in a map of Cityscapes' instance ids."""
    found = set()
    for value in np.unique(ids):
        if value // 1000 in classes:
            found.add((names[value // 1000], (ids == value).tobytes()))
    return found


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
    """Instances as polygons, run lengths and crowds, and panoptic PNGs. The ids have gaps.

    The last image is grey and has no label.
    """
    images = []
    instances = []
    panoptic = []
    found = {}
    for i, (image, _, ids) in enumerate([*scenes(count - 1), *scenes(1)]):
        if i == count - 1:
            image = image[..., 0]
            ids = 0 * ids
        number = 1000 + 37 * i
        height, width = ids.shape
        name = f"{number:012d}.jpg"
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        file = root / split / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file, quality=95)
        colours = np.zeros((height, width, 3), np.uint8)
        segments = []
        expected = set()
        labelled = [v for v in np.unique(ids) if (v // 1000 if v >= 1000 else v) in NAMES]
        for k, value in enumerate(labelled):
            mask = ids == value
            category = int(value // 1000 if value >= 1000 else value)
            iscrowd = int(value == ids.max())  # one thing stands in for a crowd
            colours[mask] = (k + 1, 7 * k, 200)
            segment = {"id": k + 1 + 256 * 7 * k + 65536 * 200, "category_id": category}
            segments.append({**segment, "iscrowd": iscrowd, "area": int(mask.sum())})
            if value // 1000 not in THINGS:
                continue
            if iscrowd:
                segmentation = run_lengths(mask)
            elif k % 2:
                segmentation, mask = box(mask)
            else:
                code = rle.encode(np.asfortranarray(mask, np.uint8))
                segmentation = {"size": [height, width], "counts": code["counts"].decode()}
            annotation = {
                "id": len(instances) + 1,
                "image_id": number,
                "category_id": category,
                "segmentation": segmentation,
                "iscrowd": iscrowd,
                "area": float(mask.sum()),
                "bbox": [0, 0, 1, 1],
            }
            instances.append(annotation)
            expected.add((NAMES[category], mask.tobytes()))
        save(root / f"annotations/panoptic_{split}/{number:012d}.png", colours)
        label_file = f"{number:012d}.png"
        panoptic.append({"image_id": number, "file_name": label_file, "segments_info": segments})
        found[f"{split}/{name}"] = np.asarray(Image.open(file).convert("RGB")), expected

    categories = []
    for category in CITYSCAPES_CATEGORIES:
        categories.append({**category._asdict(), "isthing": int(category.isthing)})
    info = {"info": {"year": 2017}, "licenses": [{"id": 1, "name": "none"}], "images": images}
    content = {**info, "annotations": panoptic, "categories": categories}
    (root / f"annotations/panoptic_{split}.json").write_text(json.dumps(content))
    thing_categories = [category for category in categories if category["isthing"]]
    content = {**info, "annotations": instances, "categories": thing_categories}
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return found


def run_lengths(mask):
    """A mask as COCO's uncompressed run lengths."""
    columns = mask.T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[0], columns, [0]])))
    counts = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts}


def box(mask):
    """The bounding box of a mask: as polygons, of which one has two corners, and as a mask."""
    rows, columns = np.nonzero(mask)
    x0, y0 = int(columns.min()), int(rows.min())
    x1, y1 = int(columns.max() + 1), int(rows.max() + 1)
    filled = np.zeros_like(mask)
    filled[y0:y1, x0:x1] = True
    return [[x0, y0, x1, y0, x1, y1, x0, y1], [x0, y0, x0, y0]], filled


ADE20K = ["wall", "building, edifice", "sky", "floor, flooring", "tree", "ceiling", "road, route"]


def ade20k(root, split="validation", count=2):
    """Labels 0 to 7 of a table of seven classes. What is expected are the label maps."""
    root.mkdir(parents=True, exist_ok=True)
    lines = ["Idx\tRatio\tTrain\tVal\tName"]
    for i, name in enumerate(ADE20K, 1):
        lines.append(f"{i}\t0.1576\t11664\t1172\t{name}")
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    found = {}
    for i, (image, labels, _) in enumerate(scenes(count)):
        name = f"images/{split}/ADE_val_{i:08d}.jpg"
        save(root / name, image)
        save(root / f"annotations/{split}/ADE_val_{i:08d}.png", (labels % 8).astype(np.uint8))
        found[name] = np.asarray(Image.open(root / name)), (labels % 8).astype(int)
    return found


def kitti360(root, split="val", count=2):
    """All values are id * 1000 + n. Confidence falls to the right.

    One car is number 0, and one building a garage.
    """
    found = {}
    lines = []
    names = {**NAMES, 34: "building"}
    for i, (image, labels, ids) in enumerate(scenes(count)):
        ids = np.where(ids >= 1000, ids, np.where(labels == 1, 0, labels.astype(int) * 1000))
        ids[ids == 26300] = 26000
        half = (ids == 11000) & (np.arange(ids.shape[1]) > 128)
        ids[half] = 34001
        name = f"data_2d_raw/{DRIVE}/image_00/data_rect/{i:010d}.png"
        save(root / name, image)
        labels_of = f"data_2d_semantics/train/{DRIVE}/image_00"
        save(root / f"{labels_of}/instance/{i:010d}.png", ids.astype(np.uint16))
        row = np.linspace(65535, 100, ids.shape[1]).astype(np.uint16)
        confidence = np.tile(row, (ids.shape[0], 1))
        save(root / f"{labels_of}/confidence/{i:010d}.png", confidence)
        lines.append(f"{name} {labels_of}/semantic/{i:010d}.png\n")
        found[name] = image, things(ids, (11, 34, *THINGS), names)
    table = root / f"data_2d_semantics/train/2013_05_28_drive_{split}_frames.txt"
    table.write_text("".join(lines))
    return found


def urbansyn(root, split="train", count=2):
    """One thing that the JSON names has no pixel in the image."""
    train_id = np.full(256, 255, np.uint8)
    for i, category in enumerate(CITYSCAPES_CATEGORIES):
        train_id[category.id] = i
    found = {}
    for i, (image, labels, ids) in enumerate(scenes(count)):
        colours = np.zeros((*ids.shape, 3), np.uint8)
        entries = [{"color": [1, 2, 3, 255], "label": "bus", "bbox": {}}]
        for k, value in enumerate(np.unique(ids)):
            colour = [40 + k, (90 * k) % 256, (50 * k) % 256]
            colours[ids == value] = colour
            if value // 1000 in THINGS:
                label = NAMES[value // 1000]
                entries.append({"color": [*colour, 255], "label": label, "bbox": {}})
        save(root / f"rgb/rgb_{i:04d}.png", image)
        save(root / f"ss/ss_{i:04d}.png", train_id[labels])
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
    label_of = np.zeros(256, int)  # of Cityscapes' id
    for label, raw in reversed(SYNTHIA_IDS.items()):
        label_of[raw] = label
    found = {}
    for i, (image, labels, ids) in enumerate(scenes(count)):
        classes = label_of[labels]
        numbers = np.where(ids >= 1000, ids % 1000 + 500, 0)
        (root / "GT/LABELS").mkdir(parents=True, exist_ok=True)
        png16(root / f"GT/LABELS/{i:07d}.png", np.stack([classes, numbers, 0 * classes], -1))
        save(root / f"RGB/{i:07d}.png", image)
        found[f"RGB/{i:07d}.png"] = image, things(ids)
    return found


FOLDERS = {
    "cityscapes": cityscapes,
    "coco": coco,
    "ADEChallengeData2016": ade20k,
    "KITTI-360": kitti360,
    "urbansyn": urbansyn,
    "synscapes": synscapes,
    "synthia": synthia,
}
