"""The benchmarks: what each trains and evaluates on, and the readers of their data sets.

A sample is a dictionary:
    image     uint8 [3, H, W]
    segments  int32 [H, W], 0 void, else 1 + the index into labels and crowd
    labels    int64 [S], contiguous class indices
    crowd     bool [S], regions of several things of one class that nobody told apart
    image_id  int, COCO's own, else the place in the split;  name  str, the picture's path below the data set's folder
    truth     {score: what that score's update takes}, on validation splits
COCO's instances may overlap: there `rles`, a list of S run-length encoded masks, stands in place of `segments`.
"""

import functools
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as rle
from torch.utils.data import Dataset

from common import toycity
from common.run import UserError

# A format that Pillow cannot read here, as it may be with .heic, is named as unreadable.
PICTURES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

# Cityscapes' 19 evaluated classes in train-id order: (raw label id, name, is it a thing?)
CITYSCAPES = [
    (7, "road", False), (8, "sidewalk", False), (11, "building", False), (12, "wall", False), (13, "fence", False),
    (17, "pole", False), (19, "traffic light", False), (20, "traffic sign", False), (21, "vegetation", False),
    (22, "terrain", False), (23, "sky", False), (24, "person", True), (25, "rider", True), (26, "car", True),
    (27, "truck", True), (28, "bus", True), (31, "train", True), (32, "motorcycle", True), (33, "bicycle", True),
]  # fmt: skip
CITYSCAPES_THINGS = [entry for entry in CITYSCAPES if entry[2]]
CITYSCAPES_VOID = {
    0: "unlabeled", 1: "ego vehicle", 2: "rectification border", 3: "out of roi", 4: "static", 5: "dynamic",
    6: "ground", 9: "parking", 10: "rail track", 14: "guard rail", 15: "bridge", 16: "tunnel", 18: "polegroup",
    29: "caravan", 30: "trailer",
}  # fmt: skip
TOYCITY = [entry for entry in CITYSCAPES if entry[0] in (7, 8, 11, 17, 21, 23, 24, 26, 27)]
# KITTI-360 counts instances of buildings too, and has none of buses and trains.
KITTI360_THINGS = [(11, "building", True)] + [entry for entry in CITYSCAPES_THINGS if entry[0] not in (28, 31)]
# SYNTHIA's label: Cityscapes' raw id, 0 where Cityscapes does not evaluate it
SYNTHIA = {
    0: 0, 1: 23, 2: 11, 3: 7, 4: 8, 5: 13, 6: 21, 7: 17, 8: 26, 9: 20, 10: 24, 11: 33, 12: 32, 13: 9, 14: 0, 15: 19,
    16: 22, 17: 25, 18: 27, 19: 28, 20: 31, 21: 12, 22: 7,
}  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    trains_on: str  # folder under the data root, and split
    evaluates_on: str
    task: str  # "semantic", "instance" or "panoptic": what a segment is
    measures: tuple[str, ...]
    paper: str = "-"  # the paper's number, in percent
    categories: list | None = None  # as above; None: read from the data set's own files
    size: str = "512x1024"  # of the pictures that stage 1 extracts


TO_CITYSCAPES = {"evaluates_on": "cityscapes val", "task": "instance", "measures": ("AP",)}
TO_CITYSCAPES["categories"] = CITYSCAPES_THINGS
BENCHMARKS = {
    "toycity": Benchmark("toycity train", "toycity val", "panoptic", ("mIoU", "AP", "PQ"), categories=TOYCITY),
    "cityscapes_semantic": Benchmark(
        "cityscapes train", "cityscapes val", "semantic", ("mIoU",), "82.8", categories=CITYSCAPES
    ),
    "cityscapes_instance": Benchmark("cityscapes train", **TO_CITYSCAPES, paper="39.5"),
    "coco_instance": Benchmark("coco train2017", "coco val2017", "instance", ("AP",), "47.3", size="512"),
    "coco_panoptic": Benchmark("coco train2017", "coco val2017", "panoptic", ("PQ",), "56.9", size="512"),
    "ade20k_semantic": Benchmark(
        "ADEChallengeData2016 training", "ADEChallengeData2016 validation", "semantic", ("mIoU",), "57.5", size="512"
    ),
    "kitti360_instance": Benchmark(
        "KITTI-360 train", "KITTI-360 val", "instance", ("AP",), "21.9", categories=KITTI360_THINGS
    ),
    "urbansyn_to_cityscapes_instance": Benchmark("urbansyn train", **TO_CITYSCAPES, paper="32.5 (ViT-L)"),
    "synscapes_to_cityscapes_instance": Benchmark("synscapes train", **TO_CITYSCAPES, paper="33.4 (ViT-L)"),
    "synthia_to_cityscapes_instance": Benchmark("synthia train", **TO_CITYSCAPES),
}


def find_benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def on_disk(benchmark: Benchmark, data: Path) -> bool:
    """Whether the data that it evaluates on is there."""
    return (data / benchmark.evaluates_on.split()[0]).is_dir()


def open_split(name: str, data: Path, part: str) -> "Split":
    """The data set of a benchmark's `part`, "train" or "val"; toycity is written to disk when it is first asked for.

    Raises UserError where data is missing, or its files do not fit together.
    """
    benchmark = find_benchmark(name)
    folder, split = (benchmark.trains_on if part == "train" else benchmark.evaluates_on).split()
    if name == "toycity":
        toycity.write(data / "toycity")
    if not (data / folder).is_dir():
        raise UserError(f"{name} needs {data / folder}, which is not there: say where your data sets are with --data")
    measures = benchmark.measures if part == "val" else ()
    read = {"toycity": cityscapes, "cityscapes": cityscapes, "KITTI-360": kitti360, "urbansyn": urbansyn}
    read |= {"synscapes": synscapes, "synthia": synthia, "coco": coco, "ADEChallengeData2016": ade20k}
    return read[folder](data / folder, split, benchmark.categories, benchmark.task, measures)


class Split(Dataset):
    """A split of a data set, read into samples (see the top of this file).

    names: pictures, relative to root. categories: [(raw label id, name, is it a thing?)] in contiguous order.
    class_of: {what the files call a class: its index in categories, or None for one that does not count}.
    read_labels: name -> (file, ids int32 [H, W], {id: (what the file calls its class, is it a crowd?)}); an id that is
    not in the dictionary is void.
    task: "semantic" makes one segment of each class in the image, "instance" one of each thing, "panoptic" one of each
    stuff class and each thing. measures: whose truth goes into the samples.
    confidence: label file -> file of KITTI-360's weights. Raises UserError for an unreadable file or unknown label.
    """

    def __init__(
        self,
        root: Path,
        names: list[str],
        categories: list,
        class_of: dict,
        read_labels: Callable,
        task: str,
        measures: tuple = (),
        confidence: Callable | None = None,
        image_ids: np.ndarray | None = None,
    ):
        self.root, self.names, self.categories, self.class_of = root, names, categories, class_of
        self.read_labels, self.task, self.measures, self.confidence = read_labels, task, measures, confidence
        self.image_ids = image_ids

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        image = read_image(self.root / name, turn=False)
        file, ids, classes = self.read_labels(name)
        if ids.shape != image.shape[1:]:
            raise UserError(f"{file} is {ids.shape}, its picture {tuple(image.shape[1:])}")
        segment_of = np.zeros(int(ids.max()) + 1, np.int32)
        labels, crowd, first_of_class = [], [], {}
        for value, (called, is_crowd) in classes.items():
            if called not in self.class_of:
                raise UserError(f"{file} holds the label {called!r}, which is not in the data set's table of classes")
            label = self.class_of[called]
            if label is None:
                continue
            merged = self.task == "semantic" or not self.categories[label][2]  # one segment for the whole class
            if merged and label in first_of_class:
                segment_of[value] = first_of_class[label]
                continue
            labels.append(label)
            crowd.append(is_crowd and not merged)
            segment_of[value] = first_of_class[label] = len(labels)
        sample = {
            "image": image,
            "segments": torch.from_numpy(segment_of[ids]),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "crowd": torch.tensor(crowd, dtype=torch.bool),
            "image_id": index if self.image_ids is None else int(self.image_ids[index]),
            "name": name,
        }
        if not self.measures:
            return sample
        sample["truth"] = truth = {}
        if "mIoU" in self.measures:
            classes_of_segments = np.array([255, *labels], np.uint8)
            truth["semantic"] = (torch.from_numpy(classes_of_segments[segment_of[ids]]),)  # uint8 [H, W], 255 ignored
        if "AP" in self.measures:
            truth["instance"] = (torch.from_numpy(ids).long(),)
            if self.confidence:
                weights = _label_image(self.confidence(file)) / 65535
                if weights.shape != ids.shape:
                    raise UserError(f"{self.confidence(file)} is {weights.shape}, the labels {ids.shape}")
                truth["instance"] += (torch.from_numpy(weights),)
        if "PQ" in self.measures:
            segments = [
                {"id": i + 1, "category_id": self.categories[label][0], "iscrowd": int(crowd[i])}
                for i, label in enumerate(labels)
            ]
            truth["panoptic"] = (sample["segments"], segments)
        return sample


# ---------------------------------------------------------------------------------------------- data sets


def cityscapes(root: Path, split: str, categories: list, task: str, measures: tuple = ()) -> Split:
    """Cityscapes' layout, toycity's too."""
    names = _pictures(root, f"leftImg8bit/{split}/*/*_leftImg8bit.png")
    for name in names:
        _need(_cityscapes_file(root, name), root / name)
    class_of = dict.fromkeys(range(34)) | {raw: index for index, (raw, _, _) in enumerate(categories)}
    return Split(root, names, categories, class_of, functools.partial(_cityscapes, root), task, measures)


def _cityscapes_file(root: Path, name: str) -> Path:
    stem = name.replace("leftImg8bit/", "gtFine/", 1).removesuffix("_leftImg8bit.png")
    return root / f"{stem}_gtFine_instanceIds.png"


def _cityscapes(root: Path, name: str) -> tuple[Path, np.ndarray, dict]:
    """instanceIds hold the label ids too: id*1000 + n for a thing, the bare id for stuff, groups and void."""
    file = _cityscapes_file(root, name)
    ids = _label_image(file)
    return file, ids, {v: (v // 1000 if v >= 1000 else v, v < 1000) for v in present(ids)}


def kitti360(root: Path, split: str, categories: list, task: str, measures: tuple = ()) -> Split:
    frames = root / f"data_2d_semantics/train/2013_05_28_drive_{split}_frames.txt"
    _need(frames, root)
    lines = [line.split() for line in frames.read_text().splitlines() if line.strip()]
    if not all(len(line) == 2 for line in lines):
        raise UserError(f"{frames}: a line is a picture's path and its label's, with a space between")
    files = {name: root / _below(root, path, frames).replace("/semantic/", "/instance/") for name, path in lines}
    for name, file in files.items():
        _need(root / _below(root, name, frames), frames)
        _need(file, root / name)
        if measures:
            _need(_kitti360_confidence(file), root / name)
    class_of = dict.fromkeys(range(45)) | {raw: index for index, (raw, _, _) in enumerate(categories)}
    class_of[34] = class_of[11]  # garages count as buildings
    read = functools.partial(_kitti360, files)
    return Split(root, sorted(files), categories, class_of, read, task, measures, confidence=_kitti360_confidence)


def _kitti360_confidence(file: Path) -> Path:
    return file.parents[1] / "confidence" / file.name


def _kitti360(files: dict[str, Path], name: str) -> tuple[Path, np.ndarray, dict]:
    """All values are id*1000 + n, so that n may be 0 for a thing; only 0 is void."""
    ids = _label_image(files[name])
    return files[name], ids, {v: (v // 1000, False) for v in present(ids)}


def ade20k(root: Path, split: str, categories: None, task: str, measures: tuple = ()) -> Split:
    table = root / "objectInfo150.txt"
    _need(table, root)
    rows = [line.split("\t") for line in table.read_text().splitlines()[1:] if line.strip()]
    try:  # index, ratio, training, validation, names
        categories = [(int(row[0]), row[4].split(",")[0].strip(), False) for row in rows]
    except (ValueError, IndexError):
        raise UserError(f"{table}: a line is Idx, Ratio, Train, Val and Name with tabs between") from None
    names = _pictures(root, f"images/{split}/*.jpg")
    for name in names:
        _need(_ade20k_file(root, name), root / name)
    class_of = {0: None} | {raw: index for index, (raw, _, _) in enumerate(categories)}
    return Split(root, names, categories, class_of, functools.partial(_ade20k, root), task, measures)


def _ade20k_file(root: Path, name: str) -> Path:
    return (root / name.replace("images/", "annotations/", 1)).with_suffix(".png")


def _ade20k(root: Path, name: str) -> tuple[Path, np.ndarray, dict]:
    ids = _label_image(_ade20k_file(root, name))
    return _ade20k_file(root, name), ids, {v: (v, False) for v in present(ids)}


def urbansyn(root: Path, split: str, categories: list, task: str, measures: tuple = ()) -> Split:
    names = _pictures(root, "rgb/rgb_*.png")
    for name in names:
        for file in _urbansyn_files(root, name):
            _need(file, root / name)
    class_of = dict.fromkeys([*CITYSCAPES_VOID.values(), *(name for _, name, _ in CITYSCAPES)])
    class_of |= {name: index for index, (_, name, _) in enumerate(categories)}
    return Split(root, names, categories, class_of, functools.partial(_urbansyn, root), task, measures)


def _urbansyn_files(root: Path, name: str) -> tuple[Path, Path]:
    number = Path(name).stem.removeprefix("rgb_")
    return root / f"panoptic/panoptic_{number}.png", root / f"bbox2d/bbox2d_{number}.json"


def _urbansyn(root: Path, name: str) -> tuple[Path, np.ndarray, dict]:
    """One colour an instance, named with its class in the JSON; colours that are not there are stuff, void for us."""
    picture, boxes = _urbansyn_files(root, name)
    try:
        entries = [(entry["color"][:3], entry["label"]) for entry in _read_json(boxes)]
        colours = {int(r) + 256 * int(g) + 65536 * int(b): label for (r, g, b), label in entries}
    except (KeyError, TypeError, ValueError):
        raise UserError(f'{boxes} is not a list of objects with "color" and "label"') from None
    ids = _colour_ids(picture)
    return picture, ids, {v: (colours[v], False) for v in present(ids) if v in colours}


def synscapes(root: Path, split: str, categories: list, task: str, measures: tuple = ()) -> Split:
    names = _pictures(root, "img/rgb/*.png")
    for name in names:
        for folder in ("class", "instance"):
            _need(root / name.replace("rgb", folder, 1), root / name)
    class_of = dict.fromkeys([*range(34), 255]) | {raw: index for index, (raw, _, _) in enumerate(categories)}
    return Split(root, names, categories, class_of, functools.partial(_synscapes, root), task, measures)


def _synscapes(root: Path, name: str) -> tuple[Path, np.ndarray, dict]:
    """An instance's class is that of most of its pixels; things without an instance are a crowd."""
    file = root / name.replace("rgb", "class", 1)
    classes = _label_image(file)
    instances = _colour_ids(root / name.replace("rgb", "instance", 1))
    if instances.shape != classes.shape:
        raise UserError(f"{file} is {classes.shape}, its instances {instances.shape}")
    if classes.max() > 255:
        raise UserError(f"{file} holds the label {classes.max()}, which is not in the data set's table of classes")
    values = present(instances)
    place_of = np.zeros(int(instances.max()) + 1, np.int32)
    place_of[values] = np.arange(len(values))
    places = place_of[instances]
    counts = np.bincount((places * 256 + classes).ravel(), minlength=256 * len(values)).reshape(-1, 256)
    ids = np.where(instances > 0, 256 + places, classes)  # below 256: pixels without an instance, by class
    meaning = {v: (v, True) for v in present(np.where(ids < 256, ids, 0))}
    meaning |= {256 + i: (int(counts[i].argmax()), False) for i, value in enumerate(values) if value > 0}
    return file, ids, meaning


def synthia(root: Path, split: str, categories: list, task: str, measures: tuple = ()) -> Split:
    names = _pictures(root, "RGB/*.png")
    for name in names:
        _need(root / name.replace("RGB", "GT/LABELS", 1), root / name)
    index_of = {raw: index for index, (raw, _, _) in enumerate(categories)}
    class_of = {own: index_of.get(raw) for own, raw in SYNTHIA.items()}
    return Split(root, names, categories, class_of, functools.partial(_synthia, root), task, measures)


def _synthia(root: Path, name: str) -> tuple[Path, np.ndarray, dict]:
    """16 bits a channel, the first the class, the second the instance; things without an instance are a crowd."""
    file = root / name.replace("RGB", "GT/LABELS", 1)
    try:  # Pillow would cut the numbers to 8 bits
        channels = torchvision.io.read_image(str(file), torchvision.io.ImageReadMode.UNCHANGED).numpy()
    except RuntimeError as error:
        raise UserError(f"{file} cannot be read as a picture ({str(error).splitlines()[0]})") from None
    if channels.dtype != np.uint16 or len(channels) < 2:
        raise UserError(f"{file} is no colour PNG of 16 bits a channel")
    ids = channels[0].astype(np.int32) * 65536 + channels[1]
    if channels[0].max() > max(SYNTHIA):  # ids would be large numbers
        raise UserError(f"{file} holds the label {channels[0].max()}, which is not in the data set's table of classes")
    return file, ids, {v: (v >> 16, v & 65535 == 0) for v in present(ids)}


# ---------------------------------------------------------------------------------------------- COCO


class Packed:
    """Many small objects in one array: forked workers share it, where lists of objects would be copied bit by bit."""

    def __init__(self, objects):
        pieces = [pickle.dumps(entry, protocol=5) for entry in objects]
        self.ends = np.cumsum([len(piece) for piece in pieces])
        self.bytes = np.frombuffer(b"".join(pieces), np.uint8)

    def __getitem__(self, index: int):
        begin = self.ends[index - 1] if index else 0
        return pickle.loads(self.bytes[begin : self.ends[index]])  # written just above: no foreign pickle


def coco(root: Path, split: str, categories: None, task: str, measures: tuple = ()) -> "Split | CocoInstances":
    kind = "panoptic" if task == "panoptic" else "instances"
    file = root / f"annotations/{kind}_{split}.json"
    _need(file, root)

    def compact(entry: dict):
        """Each annotation as soon as it is parsed: as Python objects, all of COCO would take several gigabytes."""
        if "segments_info" in entry:
            segments = entry["segments_info"]
            return entry["image_id"], tuple(c for _, c, _ in segments), pickle.dumps((entry["file_name"], segments))
        if "segmentation" in entry:
            category = entry["category_id"]
            return entry["image_id"], (category,), pickle.dumps((category, entry["iscrowd"], entry["segmentation"]))
        if "category_id" in entry:  # a segment of the panoptic form
            return entry["id"], entry["category_id"], bool(entry["iscrowd"])
        if "file_name" in entry:
            return entry["id"], entry["file_name"], (entry["height"], entry["width"])
        return entry

    try:
        content = _read_json(file, object_hook=compact)
        categories = [(entry["id"], entry["name"], bool(entry.get("isthing", True))) for entry in content["categories"]]
        class_of = {raw: index for index, (raw, _, _) in enumerate(categories)}
        images = sorted(content["images"], key=lambda image: image[1])
        of_image = {image_id: [] for image_id, _, _ in images}
        for image_id, used, packed in content["annotations"]:
            of_image[image_id].append(packed)
            if strange := set(used) - set(class_of):
                raise UserError(f"{file} has an annotation of category {strange.pop()}, which is not in its categories")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not in COCO's {kind} form ({error!r})") from None
    names = [f"{split}/{_below(root, name, file)}" for _, name, _ in images]
    _need_all(root / split, [name for _, name, _ in images], file)
    image_ids, sizes = np.array(list(of_image)), np.array([size for _, _, size in images])
    annotations = Packed(of_image.values())
    if kind == "instances":
        return CocoInstances(root, file, names, categories, class_of, measures, image_ids, sizes, annotations)
    for name, entries in zip(names, of_image.values(), strict=True):
        if len(entries) != 1:
            raise UserError(f"{file} has {len(entries)} annotations for {name}: expected one")
    pictures = [_below(root, pickle.loads(entry)[0], file) for (entry,) in of_image.values()]
    _need_all(root / f"annotations/panoptic_{split}", pictures, file)
    index_of = {name: index for index, name in enumerate(names)}
    read = functools.partial(_coco_panoptic, file, root / f"annotations/panoptic_{split}", index_of, annotations)
    return Split(root, names, categories, class_of, read, task, measures, image_ids=image_ids)


def _coco_panoptic(
    table: Path, folder: Path, index_of: dict, annotations: Packed, name: str
) -> tuple[Path, np.ndarray, dict]:
    file, segments = pickle.loads(annotations[index_of[name]][0])
    file = folder / file
    ids = _colour_ids(file)
    classes = {segment: (category, crowd) for segment, category, crowd in segments}
    values = present(ids)
    if strange := [value for value in values if value and value not in classes]:
        raise UserError(f"{file} holds the segment {strange[0]}, which is not among those of {table}")
    return file, ids, {value: classes[value] for value in values if value}


class CocoInstances(Dataset):
    """A split of COCO's instances, read into samples with `rles` (see the top of this file)."""

    def __init__(
        self,
        root: Path,
        annotation_file: Path,
        names: list[str],
        categories: list,
        class_of: dict,
        measures: tuple,
        image_ids: np.ndarray,
        sizes: np.ndarray,
        annotations: Packed,
    ):
        self.root, self.names, self.categories, self.class_of = root, names, categories, class_of
        self.annotation_file, self.measures, self.task = annotation_file, measures, "instance"
        self.image_ids, self.sizes, self.annotations = image_ids, sizes, annotations

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        file = self.root / self.names[index]
        image = read_image(file, turn=False)
        height, width = self.sizes[index].tolist()
        if image.shape[1:] != (height, width):
            raise UserError(f"{file} is {tuple(image.shape[1:])}, its annotations are for {(height, width)}")
        rles, labels, crowd = [], [], []
        for category, is_crowd, shape in map(pickle.loads, self.annotations[index]):
            try:
                if isinstance(shape, list):  # polygons; fewer than three corners enclose nothing
                    shape = [polygon for polygon in shape if len(polygon) >= 6]
                    shape = rle.merge(rle.frPyObjects(shape, height, width)) if shape else None
                elif isinstance(shape["counts"], list):
                    shape = rle.frPyObjects(shape, height, width)
                if shape and list(shape["size"]) != [height, width]:
                    raise ValueError(f"its size is {shape['size']}")
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.annotation_file}: a mask of {file}, {(height, width)}, is no mask ({error})"
                ) from None
            if shape is None:
                continue
            rles.append(shape)
            labels.append(self.class_of[category])
            crowd.append(bool(is_crowd))
        sample = {
            "image": image,
            "rles": rles,
            "labels": torch.tensor(labels, dtype=torch.int64),
            "crowd": torch.tensor(crowd, dtype=torch.bool),
            "image_id": int(self.image_ids[index]),
            "name": self.names[index],
        }
        return sample | ({"truth": {"instance": ()}} if self.measures else {})


# ---------------------------------------------------------------------------------------------- files


def _pictures(root: Path, pattern: str) -> list[str]:
    names = sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))
    if not names:
        raise UserError(f"no pictures: expected {root}/{pattern}")
    return names


def _need(file: Path, asked_by: Path) -> None:
    if not file.is_file():
        raise UserError(f"{asked_by} needs {file}, which is not there")


def _need_all(folder: Path, names: list[str], asked_by: Path) -> None:
    """As _need for very many files of one folder, which is listed once."""
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    for name in names:
        if name not in there:
            raise UserError(f"{asked_by} needs {folder / name}, which is not there")


def _below(root: Path, path: str, table: Path) -> str:
    """The path as it stands; UserError if it leads out of root."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise UserError(f"{table} names {path}, which lies outside {root}")
    return path


def _read_json(file: Path, **hook):
    try:
        with open(file) as opened:
            return json.load(opened, **hook)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not whole JSON ({error}): download it again") from None


def present(ids: np.ndarray) -> list[int]:
    """The values that occur, sorted; far faster than np.unique where they are not huge."""
    seen = np.zeros(int(ids.max()) + 1, bool)
    seen[ids] = True
    return np.flatnonzero(seen).tolist()


def _label_image(file: Path) -> np.ndarray:
    """int32 [H, W] of an 8- or 16-bit image of one channel."""
    ids = _open(file, lambda opened: np.asarray(opened).astype(np.int32))
    if ids.ndim != 2:
        raise UserError(f"{file} has {ids.shape[-1]} channels: labels are images of one")
    return ids


def _colour_ids(file: Path) -> np.ndarray:
    """int32 [H, W], R + 256 G + 65536 B."""
    red, green, blue = np.moveaxis(_open(file, lambda opened: np.asarray(opened.convert("RGB"), np.int32)), -1, 0)
    return red + 256 * green + 65536 * blue


# ---------------------------------------------------------------------------------------------- pictures


def list_pictures(folder: Path) -> list[str]:
    """Paths of all pictures below a folder but hidden ones, relative to it, sorted. UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    names = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise UserError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    return names


def without_a_file_name(root: Path, names: list[str]) -> dict[str, str]:
    """{name: reason} of the pictures for which no file can be named once "/" in their paths is written "__"."""
    reasons, taken = {}, set()
    for name in names:
        flat = name.replace("/", "__")
        if name.encode(errors="ignore").decode() != name:  # bytes that are not UTF-8
            reasons[name] = f"{ascii(str(root / name))} has a name that is no text: rename it"
        elif flat in taken:
            reasons[name] = f"{root / name} agrees with another picture once / is written __: rename it"
        elif len(os.fsencode(flat)) > 200:
            reasons[name] = f"{root / name} has too long a path for the name of a file: shorten it"
        taken.add(flat)
    return reasons


def _open(path: Path, read):
    try:
        # Pillow maps a file that it opens by name into memory, and then turns some TIFFs wrongly
        with path.open("rb") as opened, Image.open(opened) as file:
            return read(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # missing, foreign, cut short
        reason = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path} cannot be read as a picture ({reason})") from None


def read_image(path: Path, turn: bool = True) -> torch.Tensor:
    """uint8 [3, H, W], sRGB, as a viewer shows it: turned as its EXIF tag says, transparency on white.

    Data sets ask for turn=False: their labels are in the pixels as they are stored. UserError names a file that is
    missing, truncated or no picture. Colour profiles are ignored, as they are in the training of every encoder here.
    """
    return torch.from_numpy(_open(path, functools.partial(_rgb, turn=turn))).permute(2, 0, 1).contiguous()


def _rgb(file: Image.Image, turn: bool) -> np.ndarray:
    if file.mode in ("I", "F"):
        raise ValueError("its numbers have more than 16 bits, which no screen shows")
    if turn:
        ImageOps.exif_transpose(file, in_place=True)
    if file.mode.startswith("I;16"):  # convert() would cut all above 255
        grey = (np.asarray(file) / 257 + 0.5).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if file.has_transparency_data:
        file = file.convert("RGBA")
        file = Image.alpha_composite(Image.new("RGBA", file.size, "white"), file)
    return np.array(file.convert("RGB"))


def working_size(height: int, width: int, size: str, multiple: int = 32) -> tuple[int, int]:
    """Height and width, multiples of 32, at which a picture enters the encoders.

    size: "512x1024"; "512": that short side with the aspect kept; "800/1333": the same, the long side at most 1333;
    "own": as it is.
    """
    if size == "own":
        size = f"{max(32, height)}x{max(32, width)}"
    separator = "x" if "x" in size else "/"
    try:
        sides = [int(side) for side in size.split(separator)]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 32:
        raise UserError(f"--size {size!r} is neither HEIGHTxWIDTH nor a short side, in pixels, at least 32")
    if separator == "/":
        scale = sides[0] / min(height, width)
        if len(sides) == 2:
            scale = min(scale, sides[1] / max(height, width))
        sides = [height * scale, width * scale]
    return tuple(max(multiple, round(side / multiple) * multiple) for side in sides)


def resize_image(image: torch.Tensor, size: str) -> torch.Tensor:
    """uint8 [3, H, W] -> float32 [3, h, w] in [0, 1] at the working size, bilinear with antialiasing."""
    return TF.resize(image, working_size(*image.shape[1:], size), antialias=True).float() / 255
