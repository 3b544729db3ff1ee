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

import contextlib
import hashlib
import json
import os
import pickle
import re
from array import array
from collections import defaultdict, namedtuple
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from common import toycity
from common.run import UserError, need, some

import numpy as np
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from pycocotools import mask as rle
from torch.utils.data import Dataset

# What Pillow cannot read here, perhaps .heic, is named as unreadable.
PICTURES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


# ------------------------------------------------------------------ classes
# The id is that of the data set's own files.
Category = namedtuple("Category", "id name isthing")
# Cityscapes' 19 evaluated classes, in train-id order
ALL_CITYSCAPES = torchvision.datasets.Cityscapes.classes
CITYSCAPES = [Category(c.id, c.name, c.has_instances) for c in ALL_CITYSCAPES if not c.ignore_in_eval]
CITYSCAPES_THINGS = [category for category in CITYSCAPES if category.isthing]
CITYSCAPES_VOID = [c.id for c in ALL_CITYSCAPES if c.ignore_in_eval and c.id >= 0]
TOYCITY = [category for category in CITYSCAPES if category.id in (7, 8, 11, 17, 21, 23, 24, 26, 27)]
KITTI360_THINGS = [Category(11, "building", True), *CITYSCAPES_THINGS]
# SYNTHIA's label: Cityscapes' id, 0 where Cityscapes does not evaluate it
SYNTHIA = (0, 23, 11, 7, 8, 13, 21, 17, 26, 20, 24, 33, 32, 9, 0, 19, 22, 25, 27, 28, 31, 12, 7)
SYNTHIA = dict(enumerate(SYNTHIA))


# ------------------------------------------------------------------ benchmarks
@dataclass(frozen=True)
class Benchmark:
    trains_on: str  # folder under the data root ("own": the root itself), and split
    evaluates_on: str
    task: str  # "semantic", "instance" or "panoptic": what a segment is
    measures: tuple[str, ...]
    categories: list | None = None  # None: read from the data set's own files
    paper: str = "-"  # the paper's number, in percent
    size: str = "512x1024"  # of the pictures that stage 1 extracts
    beside: tuple[str, ...] = ()  # classes that are trained and scored, but have no part in the official mean


ADE = "ADEChallengeData2016"
CITYSCAPES_VAL = "cityscapes val", "instance", ("AP",), CITYSCAPES_THINGS
KITTI360_VAL = "KITTI-360 val", "instance", ("AP",), KITTI360_THINGS
BENCHMARKS = {
    "toycity": Benchmark("toycity train", "toycity val", "panoptic", ("mIoU", "AP", "PQ"), TOYCITY),
    "cityscapes_semantic": Benchmark("cityscapes train", "cityscapes val", "semantic", ("mIoU",), CITYSCAPES, "82.8"),
    "cityscapes_instance": Benchmark("cityscapes train", *CITYSCAPES_VAL, "39.5"),
    "coco_instance": Benchmark("coco train2017", "coco val2017", "instance", ("AP",), None, "47.3", "512"),
    "coco_panoptic": Benchmark("coco train2017", "coco val2017", "panoptic", ("PQ",), None, "56.9", "512"),
    "ade20k_semantic": Benchmark(f"{ADE} training", f"{ADE} validation", "semantic", ("mIoU",), None, "57.5", "512"),
    "kitti360_instance": Benchmark("KITTI-360 train", *KITTI360_VAL, "21.9 (AP_things)", beside=("bus", "train")),
    "urbansyn_to_cityscapes_instance": Benchmark("urbansyn train", *CITYSCAPES_VAL, "32.5 (ViT-L)"),
    "synscapes_to_cityscapes_instance": Benchmark("synscapes train", *CITYSCAPES_VAL, "33.4 (ViT-L)"),
    "synthia_to_cityscapes_instance": Benchmark("synthia train", *CITYSCAPES_VAL),
    "own_semantic": Benchmark("own train", "own val", "semantic", ("mIoU",), size="512"),
    "own_instance": Benchmark("own train", "own val", "instance", ("AP",), size="512"),
    "own_panoptic": Benchmark("own train", "own val", "panoptic", ("PQ",), size="512"),
}


def find_benchmark(name):
    need(name in BENCHMARKS, f"unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def open_split(name, data, part):
    """A benchmark's "train" or "val" split. UserError where data is missing, or its files do not fit together."""
    benchmark = find_benchmark(name)
    if name == "toycity":  # drawn when it is first asked for
        toycity.write(data / name)
    if part == "train":
        return Split(benchmark, data, benchmark.trains_on)
    return Split(benchmark, data, benchmark.evaluates_on, benchmark.measures)


# ------------------------------------------------------------------ readers
def read_ids(files, size, bare):
    """Ids below `bare` are labels themselves (stuff, groups of things, void), others label * 1000 + n."""
    ids = label_image(files[0], size)
    return Labels(ids, {id: (id if id < bare else id // 1000, id < bare) for id in present(ids)})


def read_urbansyn(files, size):
    """One colour an instance, named in the JSON with its class; other colours are stuff: void."""
    ids, named = label_image(files[0], size, colours=True), {}
    with reading(files[1], 'a list of objects with "color" and "label"'):
        for entry in json.loads(files[1].read_bytes()):
            red, green, blue = map(int, entry["color"][:3])
            named[red + 256 * green + 65536 * blue] = entry["label"], False
    return Labels(ids, {id: named.get(id, ("unlabeled", False)) for id in present(ids)})


def read_synscapes(files, size):
    """An instance's class is that of most of its pixels; things without an instance are a crowd."""
    classes = label_image(files[0], size)
    need(classes.max() < 256, f"{files[0]} holds the unknown label {classes.max()}")
    instances = label_image(files[1], size, colours=True)
    numbers, places = compact(instances)
    majority = count_pairs(places, classes, (len(numbers), 256)).argmax(1).tolist()
    label_of = [*range(256), *majority]  # ids below 256: pixels without an instance, by class
    ids = np.where(instances > 0, 256 + places, classes)
    return Labels(ids, {id: (label_of[id], id < 256) for id in present(ids)})


def read_synthia(files, size):
    """The class, then the instance, 16 bits each; things without an instance are a crowd."""
    with reading(files[0], "a colour picture"):  # Pillow would cut the numbers to 8 bits
        channels = torchvision.io.decode_image(str(files[0]), "UNCHANGED").numpy()
        classes, instances, *_ = channels.astype(np.int32)
    need(channels.dtype == np.uint16, f"{files[0]} has not 16 bits a channel")
    need(classes.shape == size, f"{files[0]} is {classes.shape}, its picture {size}")
    need(classes.max() <= max(SYNTHIA), f"{files[0]} holds the unknown label {classes.max()}")
    ids = 65536 * classes + instances
    return Labels(ids, {id: (id >> 16, id & 65535 == 0) for id in present(ids)})


def read_own(files, size):
    """The pixel is the line of classes.txt; the highest value, of 8 or of 16 bits, does not count."""
    with reading(files[0], "a picture"), Image.open(files[0]) as image:
        bits = {"L": 8, "P": 8, "I;16": 16, "I": 16}.get(image.mode)  # a palette's index is the value
        expected = "a PNG of one channel, 8 or 16 bits, or with a palette, its pixels the lines of classes.txt"
        need(bits and image.format == "PNG", f"{files[0]} is {image.format} of mode {image.mode}: expected {expected}")
    ids = label_image(files[0], size)
    return Labels(ids, {id: (id if id < 2**bits - 1 else None, False) for id in present(ids)})


def read_coco_panoptic(files, size, segments):
    """One colour a segment; segments: {id: (category id, is it a crowd?)}."""
    ids = label_image(files[0], size, colours=True)
    with reading(files[0], "segments that its JSON lists"):
        return Labels(ids, {id: segments[id] for id in present(ids) if id})


def read_coco_instances(files, size, annotations):
    """Masks that may overlap, run-length encoded, in place of a map of ids."""
    expected, masks, name = annotations
    need(size == expected, f"{name} is {size}, its annotations in {files[0]} are for {expected}")
    rles, class_of = [], {}
    for number, (category, crowd, mask) in enumerate(masks, 1):
        with reading(files[0], f"mask {number} of {name}"):
            if mask := encode_mask(mask, size):
                class_of[len(rles)] = category, crowd
                rles.append(mask)
    return Labels(rles, class_of)


def encode_mask(mask, size):
    """COCO's "segmentation", polygons or run lengths, as a checked run-length code; None if it encloses nothing.

    pycocotools would read beyond its memory, or never end, where run lengths do not add up to the picture.
    """
    if isinstance(mask, list):
        polygons = [polygon for polygon in mask if len(polygon) >= 6]  # fewer than three corners enclose nothing
        if not all(abs(side) < 1e6 for polygon in polygons for side in polygon):  # nor is NaN
            raise ValueError("a corner lies nowhere near the picture")
        return rle.merge(rle.frPyObjects(polygons, *size)) if polygons else None
    counts = mask["counts"] if isinstance(mask["counts"], list) else run_lengths(mask["counts"])
    if tuple(mask["size"]) != size or min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise ValueError(f"its size is {mask['size']} and it holds {sum(counts)} pixels, the picture is {size}")
    return rle.frPyObjects(mask | {"counts": counts}, *size)


def run_lengths(text):
    """The run lengths in a compressed code of COCO: five bits a letter, and from the third on, differences."""
    counts, value, shift = [], 0, 0
    for letter in text.encode() if isinstance(text, str) else text:
        value |= (letter - 48 & 31) << shift
        shift += 5
        if not letter - 48 & 32:  # the last letter of a number
            value -= (letter - 48 & 16) << shift - 4  # its sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


# What readers return. ids: int32 [H, W]; class_of: {id: (the data set's label, is it a crowd?)}
Labels = namedtuple("Labels", "ids class_of")
ITSELF = {label: label for label in range(34)}
CITY = ["leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", "gtFine/{split}/{city}/{stem}_gtFine_instanceIds.png"]
RAW_360, OF_360 = "data_2d_raw/{drive}/image_00", "data_2d_semantics/train/{drive}/image_00"
KITTI = [RAW_360 + "/data_rect/{stem}.png", OF_360 + "/instance/{stem}.png", OF_360 + "/confidence/{stem}.png"]
URBANSYN = ["rgb/rgb_{stem}.png", "panoptic/panoptic_{stem}.png", "bbox2d/bbox2d_{stem}.json"]
SYNSCAPES = ["img/rgb/{stem}.png", "img/class/{stem}.png", "img/instance/{stem}.png"]
# By folder: what reads the labels; {label: the id of a category, or one that is not evaluated}; and where a picture and
# its labels lie, what stands in braces being alike in all of them. KITTI-360's garages, 34, count as buildings.
DATA_SETS = {
    "toycity": (partial(read_ids, bare=1000), ITSELF, [CITY[0].replace(".png", ".bmp"), CITY[1]]),
    "cityscapes": (partial(read_ids, bare=1000), ITSELF, CITY),
    "KITTI-360": (partial(read_ids, bare=0), {label: label for label in range(45)} | {34: 11}, KITTI),
    ADE: (partial(read_ids, bare=65536), {0: 0}, ["images/{split}/{stem}.jpg", "annotations/{split}/{stem}.png"]),
    "urbansyn": (read_urbansyn, {c.name: c.id for c in ALL_CITYSCAPES}, URBANSYN),
    "synscapes": (read_synscapes, ITSELF | {255: 255}, SYNSCAPES),
    "synthia": (read_synthia, SYNTHIA, ["RGB/{stem}.png", "GT/LABELS/{stem}.png"]),
    "coco": (None, {}, []),  # by the task, and all else stands in its JSON
    "own": (read_own, {}, []),  # or as COCO, by the task
}


class Split(Dataset):
    """A split of a data set, read into samples (see the top of this file).

    where: folder under the data root, and split. task: "semantic" makes one segment of each class in the image,
    "instance" one of each thing, "panoptic" one of each stuff class and each thing. measures: whose truth goes into
    the samples. categories: [Category], in the order of the contiguous labels.
    """

    def __init__(self, benchmark, data, where, measures=()):
        folder, split = where.split()
        own = folder == "own"
        self.root, self.task, self.measures = data if own else data / folder, benchmark.task, measures
        self.beside = benchmark.beside
        need(self.root.is_dir(), f"{self.root} is needed and not there: say where your data sets are with --data")
        self.read, id_of, templates = DATA_SETS[folder]
        self.categories, self.coco = benchmark.categories, None
        of_val = ("val", "images/val", "labels/val", "annotations/instances_val.json", "annotations/panoptic_val.json")
        holds_out, part = own and not any(os.path.lexists(self.root / file) for file in of_val), split
        split = "train" if holds_out else split
        if folder == "coco" or own and self.task != "semantic":
            self.coco = CocoIndex(self.root, split, "panoptic" if self.task == "panoptic" else "instances")
            self.categories, self.files = self.coco.categories, self.coco.files
            self.read = read_coco_panoptic if self.task == "panoptic" else read_coco_instances
        elif own:
            lines, self.files = read_classes(self.root / "classes.txt"), list_own(self.root, split)
            self.categories = [Category(line, name, False) for line, name in enumerate(lines) if name != "-"]
            id_of = dict.fromkeys([*range(len(lines)), None])
        else:
            self.files = list(list_files(self.root, split, templates))
        if folder == ADE:
            table = self.root / "objectInfo150.txt"
            with reading(table, "lines of Idx, Ratio, Train, Val and Name with tabs between"):
                rows = [line.split("\t") for line in table.read_text("utf-8").strip().splitlines()[1:]]
                self.categories = [Category(int(row[0]), row[4].split(",")[0].strip(), False) for row in rows]
        if own:
            table, names = self.coco.file if self.coco else self.root / "classes.txt", [c.name for c in self.categories]
            need(names, f"{table} names no class")
            need(len(set(names)) == len(names), f"{table} names two classes {max(names, key=names.count)!r}")
        if benchmark.categories is None:
            id_of = id_of | {category.id: category.id for category in self.categories}
        needed = [Path(file) for file in dict.fromkeys(file for files in self.files for file in files)]
        for file in needed:
            need(not file.is_absolute() and ".." not in file.parts, f"{file} lies outside {self.root}")
        lost = [self.root / file for file in needed if not (self.root / file).is_file()]
        need(not lost, f"{some(lost)} {'is' if len(lost) == 1 else 'are'} needed and not there")
        names = [picture for picture, *_ in self.files]
        self.held_out = hold_out(names) if holds_out else set()
        # Where this part's pictures stand among all
        self.places = [i for i, name in enumerate(names) if not holds_out or (name in self.held_out) == (part == "val")]
        self.names = [names[place] for place in self.places]
        index_of = {category.id: index for index, category in enumerate(self.categories)}
        self.label_of = {called: index_of.get(id) for called, id in id_of.items()}  # None: is not evaluated

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        place = self.places[index]
        picture, *files = (self.root / file for file in self.files[place])
        image = read_image(picture, turn=False)
        size = tuple(image.shape[1:])
        image_id = self.coco.image_ids[place] if self.coco else index
        found = self.read(files, size, self.coco[place]) if self.coco else self.read(files, size)
        number_of, segments = self.segments(found.class_of, files[0])
        sample = {"image": image, "image_id": image_id, "name": self.names[index]}
        if isinstance(found.ids, list):
            sample["rles"] = found.ids
        else:
            sample["segments"] = torch.from_numpy(number_of[found.ids])
        sample["labels"] = torch.tensor([label for label, *_ in segments]).long()
        sample["crowd"] = torch.tensor([crowd for _, crowd, _ in segments]).bool()
        return sample | ({"truth": self.truth(sample, found.ids, files)} if self.measures else {})

    def segments(self, class_of, file):
        """By the task, each id's segment, int32, and the segments, [(label, is it a crowd?, a thing's id)]."""
        number_of, segments = np.zeros(max(class_of, default=0) + 1, np.int32), {}
        known = [called for called in self.label_of if called is not None]
        for id, (called, crowd) in class_of.items():
            need(called in self.label_of, f"{file} holds the unknown label {called!r}: known are {some(known)}")
            label = self.label_of[called]
            if label is not None:
                thing = self.task != "semantic" and self.categories[label].isthing
                segment = (label, crowd, id) if thing else (label, False, None)  # else of the whole class
                number_of[id] = segments.setdefault(segment, len(segments) + 1)
        return number_of, segments

    def truth(self, sample, ids, files):
        """What the measures' scores take of a sample."""
        truth, labels = {}, sample["labels"].tolist()
        if "mIoU" in self.measures:
            class_of = torch.tensor([255, *labels], dtype=torch.uint8)
            truth["semantic"] = (class_of[sample["segments"].long()],)  # uint8 [H, W], 255 ignored
        if "AP" in self.measures:
            truth["instance"] = () if self.coco else (torch.from_numpy(ids),)
            if len(files) > 1:  # KITTI-360's confidence
                truth["instance"] += (torch.from_numpy(label_image(files[1], ids.shape) / 65535),)
        if "PQ" in self.measures:
            pairs = enumerate(zip(labels, sample["crowd"].int().tolist(), strict=True), 1)
            segments = [{"id": i, "category_id": self.categories[label].id, "iscrowd": c} for i, (label, c) in pairs]
            truth["panoptic"] = (sample["segments"], segments)
        return truth


def list_files(root, split, templates):
    """Yield for each image the paths below root of the picture and of its labels. KITTI-360 has a table of pictures."""
    pattern = templates[0].replace("{split}", split)
    glob = re.sub(r"{\w+}", "*", pattern)
    if "{drive}" not in pattern:
        names = [path.relative_to(root).as_posix() for path in root.glob(glob) if path.name[0] != "."]
    else:
        table = root / f"data_2d_semantics/train/2013_05_28_drive_{split}_frames.txt"
        with reading(table, "lines of a picture's path and its label's"):
            lines = table.read_text("utf-8").strip().splitlines()
            names = [picture for picture, _ in map(str.split, lines)]
    need(names, f"no pictures: expected {root / glob}")
    for name in sorted(names):
        words = re.fullmatch(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", pattern), name)
        need(words, f"{root / name} is not where pictures are expected, {glob}")
        yield [name, *(template.format(split=split, **words.groupdict()) for template in templates[1:])]


# ------------------------------------------------------------------ own data sets
def read_classes(file):
    """The lines of classes.txt, "-" for a value that does not count. UserError for empty ones, or too many."""
    with reading(file, "a class a line"):
        lines = [line.strip() for line in file.read_text("utf-8-sig").rstrip().splitlines()]
    right = len(lines) < 256 and all(lines)
    need(right, f"{file}: expected at most 255 lines, a class each, and none empty: - is a value that does not count")
    return lines


def list_own(root, split):
    """For each image the paths below root of the picture and of its label, a PNG of the same name."""
    files = {}  # {label: picture}
    for name in list_pictures(root / "images" / split):
        picture, label = f"images/{split}/{name}", Path("labels", split, name).with_suffix(".png").as_posix()
        other = files.setdefault(label, picture)
        need(other == picture, f"{root}: {other} and {picture} would share {label}: rename one of them")
    return [[picture, label] for label, picture in files.items()]


def hold_out(names):
    """A fifth of the pictures, chosen by their names alone: in every stage and process the same."""
    need(len(names) > 1, f"{names[0]} is the only picture, without a val split: expected at least two")
    shuffled = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    return set(shuffled[: max(1, len(names) // 5)])


# ------------------------------------------------------------------ COCO
class CocoIndex:
    """What COCO's JSON says of a split. The annotations of all images are one long array of bytes, which forked workers
    share, where millions of Python objects would be copied bit by bit."""

    def __init__(self, root, split, kind):
        where = f"annotations/{kind}_{split}"
        self.file = root / f"{where}.json"
        self.bytes, self.ends = bytearray(), array("q", [0])
        of_image = defaultdict(list)
        with reading(self.file, f"COCO's {kind} JSON"):
            content = json.loads(self.file.read_text("utf-8-sig"))
            images = sorted(content["images"], key=lambda image: image["file_name"])
            self.image_ids = [image["id"] for image in images]
            need(images, f"{self.file} lists no image")
            for one, other in pairwise(sorted(images, key=lambda image: image["id"])):
                two = f"{self.file} lists two images of the id {one['id']}: {one['file_name']}, {other['file_name']}"
                need(one["id"] != other["id"], two)
            for one, other in pairwise(images):
                two = f"{self.file} lists {one['file_name']} twice, with the ids {one['id']} and {other['id']}"
                need(one["file_name"] != other["file_name"], two)
            self.files = [[Path(split, image["file_name"]).as_posix(), f"{where}.json"] for image in images]
            categories = [(c["id"], c["name"], bool(c.get("isthing", True))) for c in content["categories"]]
            self.categories = [Category(*category) for category in categories]
            for annotation in content.pop("annotations"):
                of_image[annotation["image_id"]].append(annotation)
            for files, image in zip(self.files, images, strict=True):
                annotations = of_image.pop(image["id"], [])  # so that packing an image frees its annotations
                if kind == "panoptic":  # {segment id: (category id, is it a crowd?)}
                    need(len(annotations) == 1, f"{self.file}: expected one annotation for each image")
                    files[1] = f"{where}/{annotations[0]['file_name']}"
                    segments = annotations[0]["segments_info"]
                    entry = {s["id"]: (s["category_id"], bool(s.get("iscrowd"))) for s in segments}
                else:  # the image's size, [(category id, is it a crowd?, mask)], and its name
                    masks = [(a["category_id"], bool(a.get("iscrowd")), a["segmentation"]) for a in annotations]
                    entry = (image["height"], image["width"]), masks, files[0]
                self.bytes += pickle.dumps(entry)
                self.ends.append(len(self.bytes))
        need(not of_image, f"{self.file} has annotations of images that it does not list")

    def __getitem__(self, index):
        packed = self.bytes[self.ends[index] : self.ends[index + 1]]
        return pickle.loads(packed)  # packed above: no foreign pickle


# ------------------------------------------------------------------ files
@contextlib.contextmanager
def reading(file, form):
    """What cannot be read as `form`, being missing, foreign or cut short, is named in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Pillow, torchvision, json and pycocotools each raise their own
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{file} cannot be read as {form} ({reason})") from None


def label_image(file, size, colours=False):
    """int32 [H, W], of `size`: an 8- or 16-bit image of one channel, or R + 256 G + 65536 B."""
    with reading(file, "a picture"), Image.open(file) as image:
        ids = np.asarray(image.convert("RGB") if colours else image).astype(np.int32)
    if colours:
        ids = ids @ np.array([1, 256, 65536], np.int32)
    need(ids.shape == size, f"{file} is {ids.shape}, its picture {size}")
    return ids


def present(ids):
    """The values that occur, a sorted list; far faster than np.unique where they are not huge."""
    seen = np.zeros(int(ids.max()) + 1, bool)
    seen[ids] = True
    return np.flatnonzero(seen).tolist()


def compact(ids):
    """The values that occur, a sorted list, and the place among them of each pixel, int32 [H, W]."""
    values = present(ids)
    place_of = np.zeros(values[-1] + 1, np.int32)
    place_of[values] = np.arange(len(values))
    return values, place_of[ids]


def count_pairs(rows, columns, shape):
    """How many pixels have each pair of values: int64 of `shape`, from two maps of values below its sides."""
    pairs = rows.astype(np.int32) * shape[1] + columns
    return np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


# ------------------------------------------------------------------ pictures
def list_pictures(folder):
    """Paths of all pictures below a folder but hidden ones, relative to it, sorted. UserError if there is none."""
    need(folder.is_dir(), f"there is no folder {folder}")
    names, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        # Each folder once, so that links do not lead in circles; a run's own pictures are not read.
        if os.path.realpath(place) in seen or "run.json" in files:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(place, name) for name in files if not name.startswith("."))
        names += [path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() in PICTURES]
    need(names, f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    return sorted(names)


def read_image(path, turn=True):
    """uint8 [3, H, W], sRGB, as a viewer shows it: turned as its EXIF tag says, transparency on white.

    Data sets ask for turn=False: their labels are in the pixels as stored. Colour profiles are ignored, as in the
    training of every encoder here. UserError if the file is missing, truncated or no picture.
    """
    # Pillow maps a file that it opens by name into memory, and then turns some TIFFs wrongly
    with reading(path, "a picture"), path.open("rb") as opened, Image.open(opened) as file:
        if file.mode in ("I", "F"):
            raise ValueError("its numbers have more than 16 bits, which no screen shows")
        if turn:
            ImageOps.exif_transpose(file, in_place=True)
        if file.mode.startswith("I;16"):  # convert() would cut all above 255
            file = Image.fromarray((np.asarray(file) / 257 + 0.5).astype(np.uint8))
        if file.has_transparency_data:
            file = file.convert("RGBA")
            file = Image.alpha_composite(Image.new("RGBA", file.size, "white"), file)
        pixels = np.array(file.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_run_picture(found, name):
    """A picture of the run that run.json, `found`, describes, at its working size: float32 [3, h, w] in [0, 1].

    A benchmark's is read as it is stored, as its labels lie on those pixels.
    """
    return resize_image(read_image(Path(found["root"]) / name, turn=found["benchmark"] is None), found["size"])


def working_size(height, width, size, multiple=32):
    """Height and width, in multiples of `multiple`, at which a picture enters the encoders.

    size: "512x1024"; "512", that short side, the aspect kept; "800/1333", too, the long side at most 1333; "own".
    """
    if size == "own":
        size = f"{max(32, height)}x{max(32, width)}"
    sides = [int(side) for side in re.findall(r"\d+", size)]
    fits = re.fullmatch(r"\d+([x/]\d+)?", size) and min(sides) >= 32
    need(fits, f"--size {size!r} is neither HEIGHTxWIDTH nor a short side, in pixels, at least 32")
    if "x" not in size:
        scale = sides[0] / min(height, width)
        if "/" in size:
            scale = min(scale, sides[1] / max(height, width))
        sides = [height * scale, width * scale]
    return tuple(max(multiple, round(side / multiple) * multiple) for side in sides)


def resize_image(image, size):
    """uint8 [3, H, W] -> float32 [3, h, w] in [0, 1] at the working size, bilinear with antialiasing."""
    return TF.resize(image, working_size(*image.shape[1:], size), antialias=True).float() / 255
