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
import functools
import io
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch.utils.data import Dataset

from common import toycity
from common.run import UserError, need

# A format that Pillow cannot read here, as it may be with .heic, is named as unreadable.
PICTURES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


# ------------------------------------------------------------------ classes
class Category(NamedTuple):
    id: int  # in the data set's own files
    name: str
    isthing: bool


# Cityscapes' 19 evaluated classes, in train-id order
ALL_CITYSCAPES = torchvision.datasets.Cityscapes.classes
CITYSCAPES = [Category(c.id, c.name, c.has_instances) for c in ALL_CITYSCAPES if not c.ignore_in_eval]
CITYSCAPES_THINGS = [category for category in CITYSCAPES if category.isthing]
CITYSCAPES_VOID = [c.id for c in ALL_CITYSCAPES if c.ignore_in_eval and c.id >= 0]
TOYCITY = [category for category in CITYSCAPES if category.id in (7, 8, 11, 17, 21, 23, 24, 26, 27)]
# KITTI-360 counts instances of buildings too, and has none of buses and trains.
KITTI360_THINGS = [Category(11, "building", True)] + [c for c in CITYSCAPES_THINGS if c.id not in (28, 31)]
# SYNTHIA's label: Cityscapes' id, 0 where Cityscapes does not evaluate it
SYNTHIA = {
    0: 0, 1: 23, 2: 11, 3: 7, 4: 8, 5: 13, 6: 21, 7: 17, 8: 26, 9: 20, 10: 24, 11: 33, 12: 32, 13: 9, 14: 0, 15: 19,
    16: 22, 17: 25, 18: 27, 19: 28, 20: 31, 21: 12, 22: 7,
}  # fmt: skip


# ------------------------------------------------------------------ benchmarks
@dataclass(frozen=True)
class Benchmark:
    trains_on: str  # folder under the data root, and split
    evaluates_on: str
    task: str  # "semantic", "instance" or "panoptic": what a segment is
    measures: tuple[str, ...]
    categories: list | None = None  # None: read from the data set's own files
    paper: str = "-"  # the paper's number, in percent
    size: str = "512x1024"  # of the pictures that stage 1 extracts


ADE20K, CITYSCAPES_VAL = "ADEChallengeData2016", ("cityscapes val", "instance", ("AP",), CITYSCAPES_THINGS)
ADE20K_SPLITS = f"{ADE20K} training", f"{ADE20K} validation"
BENCHMARKS = {
    "toycity": Benchmark("toycity train", "toycity val", "panoptic", ("mIoU", "AP", "PQ"), TOYCITY),
    "cityscapes_semantic": Benchmark("cityscapes train", "cityscapes val", "semantic", ("mIoU",), CITYSCAPES, "82.8"),
    "cityscapes_instance": Benchmark("cityscapes train", *CITYSCAPES_VAL, "39.5"),
    "coco_instance": Benchmark("coco train2017", "coco val2017", "instance", ("AP",), None, "47.3", "512"),
    "coco_panoptic": Benchmark("coco train2017", "coco val2017", "panoptic", ("PQ",), None, "56.9", "512"),
    "ade20k_semantic": Benchmark(*ADE20K_SPLITS, "semantic", ("mIoU",), None, "57.5", "512"),
    "kitti360_instance": Benchmark("KITTI-360 train", "KITTI-360 val", "instance", ("AP",), KITTI360_THINGS, "21.9"),
    "urbansyn_to_cityscapes_instance": Benchmark("urbansyn train", *CITYSCAPES_VAL, "32.5 (ViT-L)"),
    "synscapes_to_cityscapes_instance": Benchmark("synscapes train", *CITYSCAPES_VAL, "33.4 (ViT-L)"),
    "synthia_to_cityscapes_instance": Benchmark("synthia train", *CITYSCAPES_VAL),
}


def find_benchmark(name: str) -> Benchmark:
    need(name in BENCHMARKS, f"unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def open_split(name: str, data: Path, part: str) -> "Split":
    """A benchmark's "train" or "val" split; toycity is drawn when it is first asked for.

    Raises UserError where data is missing, or its files do not fit together.
    """
    benchmark = find_benchmark(name)
    where = benchmark.trains_on if part == "train" else benchmark.evaluates_on
    if name == "toycity":
        toycity.write(data / name)
    root = data / where.split()[0]
    need(root.is_dir(), f"{name} needs {root}, which is not there: say where your data sets are with --data")
    return Split(benchmark, data, where, benchmark.measures if part == "val" else ())


# ------------------------------------------------------------------ readers
class Labels(NamedTuple):
    ids: np.ndarray  # int32 [H, W]
    class_of: dict  # {id: what the data set calls its class}; pixels of other ids are void
    crowds: list = ()  # the ids of crowds


def read_cityscapes(files: list[Path]) -> Labels:
    """instanceIds hold the label ids too: id*1000 + n for a thing, the bare id for stuff, groups and void."""
    ids = label_image(files[0])
    class_of = {value: value // 1000 if value >= 1000 else value for value in present(ids)}
    return Labels(ids, class_of, [value for value in class_of if value < 1000])


def read_kitti360(files: list[Path]) -> Labels:
    """All values are id*1000 + n, so that n may be 0 for a thing; only 0 is void."""
    ids = label_image(files[0])
    return Labels(ids, {value: value // 1000 for value in present(ids)})


def read_ade20k(files: list[Path]) -> Labels:
    ids = label_image(files[0])
    return Labels(ids, {value: value for value in present(ids)})


def read_urbansyn(files: list[Path]) -> Labels:
    """One colour an instance, named with its class in the JSON; colours that are not there are stuff, void for us."""
    ids = colour_ids(files[0])
    try:
        entries = [(entry["color"][:3], entry["label"]) for entry in read_json(files[1])]
        named = {int(r) + 256 * int(g) + 65536 * int(b): label for (r, g, b), label in entries}
    except (KeyError, TypeError, ValueError):
        raise UserError(f'{files[1]} is not a list of objects with "color" and "label"') from None
    return Labels(ids, {value: named[value] for value in present(ids) if value in named})


def read_synscapes(files: list[Path]) -> Labels:
    """An instance's class is that of most of its pixels; things without an instance are a crowd."""
    classes, instances = label_image(files[0]), colour_ids(files[1])
    need(classes.shape == instances.shape, f"{files[0]} is {classes.shape}, its instances {instances.shape}")
    need(classes.max() < 256, f"{files[0]} holds the label {classes.max()}, which is not in the table of classes")
    numbers, places = compact(instances)
    counts = count_pairs(places, classes, (len(numbers), 256))
    ids = np.where(instances > 0, 256 + places, classes)  # below 256: pixels without an instance, by class
    crowds = [value for value in present(ids) if value < 256]
    things = {256 + i: int(counts[i].argmax()) for i, number in enumerate(numbers) if number > 0}
    return Labels(ids, {value: value for value in crowds} | things, crowds)


def read_synthia(files: list[Path]) -> Labels:
    """16 bits a channel, the first the class, the second the instance; things without an instance are a crowd."""
    try:  # Pillow would cut the numbers to 8 bits
        channels = torchvision.io.read_image(str(files[0]), torchvision.io.ImageReadMode.UNCHANGED).numpy()
    except RuntimeError as error:
        raise UserError(f"{files[0]} cannot be read as a picture ({str(error).splitlines()[0]})") from None
    need(channels.dtype == np.uint16 and len(channels) > 1, f"{files[0]} is no colour PNG of 16 bits a channel")
    highest = channels[0].max()  # beyond the table, ids would be large numbers
    need(highest <= max(SYNTHIA), f"{files[0]} holds the label {highest}, which is not in the table of classes")
    ids = channels[0].astype(np.int32) * 65536 + channels[1]
    class_of = {value: value >> 16 for value in present(ids)}
    return Labels(ids, class_of, [value for value in class_of if value & 65535 == 0])


def read_coco_panoptic(files: list[Path], segments: dict) -> Labels:
    """One colour a segment; segments: {id: (category id, is it a crowd?)}."""
    ids = colour_ids(files[0])
    values = [value for value in present(ids) if value]
    for value in values:
        need(value in segments, f"{files[0]} holds the segment {value}, which is not among those of its JSON")
    return Labels(ids, {value: segments[value][0] for value in values}, [v for v in values if segments[v][1]])


ITSELF = {label: label for label in range(34)}
CITY = ["leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", "gtFine/{split}/{city}/{stem}_gtFine_instanceIds.png"]
RAW_360, OF_360 = "data_2d_raw/{drive}/image_00", "data_2d_semantics/train/{drive}/image_00"
KITTI = [RAW_360 + "/data_rect/{stem}.png", OF_360 + "/instance/{stem}.png", OF_360 + "/confidence/{stem}.png"]
URBANSYN = ["rgb/rgb_{stem}.png", "panoptic/panoptic_{stem}.png", "bbox2d/bbox2d_{stem}.json"]
SYNSCAPES = ["img/rgb/{stem}.png", "img/class/{stem}.png", "img/instance/{stem}.png"]
# By folder: what reads the labels; {what their files call a class: the id of a category, or one that is not evaluated};
# and where a picture and its labels lie, what stands in braces being alike in all of them.
DATA_SETS = {
    "toycity": (read_cityscapes, ITSELF, CITY),
    "cityscapes": (read_cityscapes, ITSELF, CITY),
    "KITTI-360": (read_kitti360, {label: label for label in range(45)} | {34: 11}, KITTI),  # garages count as buildings
    ADE20K: (read_ade20k, {0: 0}, ["images/{split}/{stem}.jpg", "annotations/{split}/{stem}.png"]),
    "urbansyn": (read_urbansyn, {c.name: c.id for c in ALL_CITYSCAPES}, URBANSYN),
    "synscapes": (read_synscapes, ITSELF | {255: 255}, SYNSCAPES),
    "synthia": (read_synthia, SYNTHIA, ["RGB/{stem}.png", "GT/LABELS/{stem}.png"]),
    "coco": (read_coco_panoptic, {}, []),  # classes and files stand in its JSON
}


class Split(Dataset):
    """A split of a data set, read into samples (see the top of this file).

    where: folder under the data root, and split. categories: [Category], in the order of the contiguous labels. task:
    "semantic" makes one segment of each class in the image, "instance" one of each thing, "panoptic" one of each stuff
    class and each thing. measures: whose truth goes into the samples. Raises UserError for an unreadable file or an
    unknown label.
    """

    def __init__(self, benchmark: Benchmark, data: Path, where: str, measures: tuple[str, ...] = ()):
        folder, split = where.split()
        self.root, self.task, self.measures = data / folder, benchmark.task, measures
        self.read, id_of, templates = DATA_SETS[folder]
        self.categories, self.coco = benchmark.categories, None
        if folder == "coco":
            self.coco = CocoIndex(self.root, split, "panoptic" if self.task == "panoptic" else "instances")
            self.categories, self.files = self.coco.categories, self.coco.files
        else:
            self.files = list_files(self.root, split, templates)  # for each image, the picture and its labels
        if folder == ADE20K:
            self.categories = ade20k_categories(self.root / "objectInfo150.txt")
        if benchmark.categories is None:
            id_of = id_of | {category.id: category.id for category in self.categories}
        for files in self.files:
            for file in files:
                need(
                    (self.root / file).is_file(), f"{self.root / files[0]} needs {self.root / file}, which is not there"
                )
        self.names = [picture for picture, *_ in self.files]
        index_of = {category.id: index for index, category in enumerate(self.categories)}
        self.label_of = {called: index_of.get(id) for called, id in id_of.items()}  # None: is not evaluated

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        picture, *files = (self.root / file for file in self.files[index])
        image = read_image(picture, turn=False)
        image_id = int(self.coco.image_ids[index]) if self.coco else index
        sample = {"image": image, "image_id": image_id, "name": self.names[index]}
        size = tuple(image.shape[1:])
        if self.coco and self.task == "instance":
            rles, called, crowd = self.coco.masks(index, size)
            labels = [self.label(category, self.coco.file) for category in called]
            sample |= {"rles": rles, "labels": torch.tensor(labels).long(), "crowd": torch.tensor(crowd).bool()}
            return sample | ({"truth": {"instance": ()}} if self.measures else {})
        found = self.read(files, self.coco[index]) if self.coco else self.read(files)
        need(found.ids.shape == size, f"{files[0]} is {found.ids.shape}, its picture {size}")
        sample |= self.segments(found, files[0])
        return sample | ({"truth": self.truth(sample, found.ids, files)} if self.measures else {})

    def label(self, called, file):
        need(called in self.label_of, f"{file} holds the label {called!r}, which is not in the table of classes")
        return self.label_of[called]

    def segments(self, found: Labels, file: Path) -> dict:
        """Segments, labels and crowd of a sample, by the task."""
        segment_of = np.zeros(int(found.ids.max()) + 1, np.int32)
        labels, crowd, first_of_class = [], [], {}
        for value, called in found.class_of.items():
            label = self.label(called, file)
            if label is None:
                continue
            merged = self.task == "semantic" or not self.categories[label].isthing  # one segment for the whole class
            if not merged or label not in first_of_class:
                labels.append(label)
                crowd.append(value in found.crowds and not merged)
                first_of_class[label] = len(labels)
            segment_of[value] = first_of_class[label]
        segments = torch.from_numpy(segment_of[found.ids])
        return {"segments": segments, "labels": torch.tensor(labels).long(), "crowd": torch.tensor(crowd).bool()}

    def truth(self, sample: dict, ids: np.ndarray, files: list[Path]) -> dict:
        """What the measures' scores take of a sample."""
        truth, labels = {}, sample["labels"].tolist()
        if "mIoU" in self.measures:
            class_of = torch.tensor([255, *labels], dtype=torch.uint8)
            truth["semantic"] = (class_of[sample["segments"].long()],)  # uint8 [H, W], 255 ignored
        if "AP" in self.measures:
            truth["instance"] = (torch.from_numpy(ids).long(),)
            if len(files) > 1:  # KITTI-360's confidence
                weights = label_image(files[1]) / 65535
                need(weights.shape == ids.shape, f"{files[1]} is {weights.shape}, the labels {ids.shape}")
                truth["instance"] += (torch.from_numpy(weights),)
        if "PQ" in self.measures:
            pairs = enumerate(zip(labels, sample["crowd"].int().tolist(), strict=True), 1)
            segments = [{"id": i, "category_id": self.categories[label].id, "iscrowd": c} for i, (label, c) in pairs]
            truth["panoptic"] = (sample["segments"], segments)
        return truth


def list_files(root, split, templates):
    """For each image the paths below root of the picture and of its labels; KITTI-360 has a table of its pictures."""
    pattern = templates[0].replace("{split}", split)
    glob = re.sub(r"{\w+}", "*", pattern)
    names = [path.relative_to(root).as_posix() for path in root.glob(glob)]
    if "{drive}" in pattern:
        table = root / f"data_2d_semantics/train/2013_05_28_drive_{split}_frames.txt"
        lines = [line.split() for line in read_text(table).splitlines() if line.strip()]
        whole = all(len(line) == 2 for line in lines)
        need(whole, f"{table}: a line is a picture's path and its label's, with a space between")
        names = [below(root, picture, table) for picture, _ in lines]
    need(names, f"no pictures: expected {root / glob}")
    files = []
    for name in sorted(names):
        words = re.fullmatch(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", pattern), name)
        need(words, f"{root / name} is not where pictures are expected, {glob}")
        files.append([name, *(template.format(split=split, **words.groupdict()) for template in templates[1:])])
    return files


def ade20k_categories(table):
    rows = [line.split("\t") for line in read_text(table).splitlines()[1:] if line.strip()]
    try:  # index, ratio, training, validation, names
        return [Category(int(row[0]), row[4].split(",")[0].strip(), False) for row in rows]
    except (ValueError, IndexError):
        raise UserError(f"{table}: a line is Idx, Ratio, Train, Val and Name with tabs between") from None


# ------------------------------------------------------------------ COCO
class CocoIndex:
    """What COCO's JSON says of a split. The annotations of all images are one long array of bytes, which forked workers
    share, where millions of Python objects would be copied bit by bit."""

    def __init__(self, root: Path, split: str, kind: str):
        self.file = root / f"annotations/{kind}_{split}.json"
        content = read_json(self.file)
        try:
            images = sorted(content["images"], key=lambda image: image["file_name"])
            self.image_ids = np.array([image["id"] for image in images])
            self.files = [[f"{split}/{below(root, image['file_name'], self.file)}"] for image in images]
            categories = [(c["id"], c["name"], bool(c.get("isthing", True))) for c in content["categories"]]
            packed = list(self.segments_of(content, images) if kind == "panoptic" else self.masks_of(content, images))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.file} is not in COCO's {kind} form ({error!r})") from None
        self.categories = [Category(*category) for category in categories]
        self.ends, self.bytes = np.cumsum([len(entry) for entry in packed]), np.frombuffer(b"".join(packed), np.uint8)

    def __getitem__(self, index: int):
        begin = self.ends[index - 1] if index else 0
        return pickle.loads(self.bytes[begin : self.ends[index]])  # packed above: no foreign pickle

    def segments_of(self, content: dict, images: list[dict]):
        """Of each image {segment id: (category id, is it a crowd?)}, pickled."""
        of_image = {annotation["image_id"]: annotation for annotation in content["annotations"]}
        once = set(of_image) == set(self.image_ids.tolist()) and len(of_image) == len(content["annotations"])
        need(once, f"{self.file}: expected one annotation for each image")
        for files, image in zip(self.files, images, strict=True):
            annotation = of_image[image["id"]]
            files.append(f"annotations/{self.file.stem}/{below(self.file.parent, annotation['file_name'], self.file)}")
            yield pickle.dumps({s["id"]: (s["category_id"], bool(s["iscrowd"])) for s in annotation["segments_info"]})

    def masks_of(self, content: dict, images: list[dict]):
        """Of each image its size and [(category id, is it a crowd?, mask)], pickled."""
        index = COCO()
        index.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):
            index.createIndex()
        content["annotations"] = index.anns = None  # so that packing an image frees its annotations
        for image in images:
            annotations = index.imgToAnns.pop(image["id"], [])
            masks = [(a["category_id"], bool(a["iscrowd"]), a["segmentation"]) for a in annotations]
            yield pickle.dumps(((image["height"], image["width"]), masks))
        need(not index.imgToAnns, f"{self.file} has annotations of images that it does not list")

    def masks(self, index: int, size: tuple[int, int]) -> tuple[list, list[int], list[bool]]:
        """Run-length codes, category ids, and which are crowds, of an image of `size` (height, width)."""
        (name,), (expected, annotations) = self.files[index], self[index]
        need(size == expected, f"{name} is {size}, its annotations in {self.file} are for {expected}")
        rles, categories, crowds = [], [], []
        for category, crowd, shape in annotations:
            try:
                if isinstance(shape, list):  # polygons; fewer than three corners enclose nothing
                    shape = [polygon for polygon in shape if len(polygon) >= 6]
                    shape = rle.merge(rle.frPyObjects(shape, *size)) if shape else None
                elif isinstance(shape["counts"], list):
                    shape = rle.frPyObjects(shape, *size)
                if shape and tuple(shape["size"]) != size:
                    raise ValueError(f"its size is {shape['size']}")
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{self.file}: a mask of {name}, {size}, is no mask ({error})") from None
            if shape is not None:
                rles.append(shape)
                categories.append(category)
                crowds.append(crowd)
        return rles, categories, crowds


# ------------------------------------------------------------------ files
def below(root: Path, path: str, table: Path) -> str:
    """The path as it stands; UserError if it leads out of root."""
    outside = Path(path).is_absolute() or ".." in Path(path).parts
    need(not outside, f"{table} names {path}, which lies outside {root}")
    return path


def read_text(file):
    need(file.is_file(), f"{file} is needed and not there")
    return file.read_text(encoding="utf-8", errors="replace")


def read_json(file):
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not whole JSON ({error}): download it again") from None


def present(ids: np.ndarray) -> list[int]:
    """The values that occur, sorted; far faster than np.unique where they are not huge."""
    seen = np.zeros(int(ids.max()) + 1, bool)
    seen[ids] = True
    return np.flatnonzero(seen).tolist()


def compact(ids: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The values that occur, sorted, and the place among them of each pixel, int32 [H, W]."""
    values = present(ids)
    place_of = np.zeros(values[-1] + 1, np.int32)
    place_of[values] = np.arange(len(values))
    return values, place_of[ids]


def count_pairs(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How many pixels have each pair of values: int64 of `shape`, from two maps of values below its sides."""
    pairs = rows.astype(np.int32) * shape[1] + columns
    return np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def label_image(file: Path) -> np.ndarray:
    """int32 [H, W] of an 8- or 16-bit image of one channel."""
    ids = _open(file, lambda opened: np.asarray(opened).astype(np.int32))
    need(ids.ndim == 2, f"{file} has {ids.shape[-1]} channels: labels are images of one")
    return ids


def colour_ids(file: Path) -> np.ndarray:
    """int32 [H, W], R + 256 G + 65536 B."""
    red, green, blue = np.moveaxis(_open(file, lambda opened: np.asarray(opened.convert("RGB"), np.int32)), -1, 0)
    return red + 256 * green + 65536 * blue


# ------------------------------------------------------------------ pictures
def list_pictures(folder: Path) -> list[str]:
    """Paths of all pictures below a folder but hidden ones, relative to it, sorted. UserError if there is none."""
    need(folder.is_dir(), f"there is no folder {folder}")
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    names = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    need(names, f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    return names


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
    wrong = f"--size {size!r} is neither HEIGHTxWIDTH nor a short side, in pixels, at least 32"
    need(len(sides) in (1, 2) and min(sides) >= 32, wrong)
    if separator == "/":
        scale = sides[0] / min(height, width)
        if len(sides) == 2:
            scale = min(scale, sides[1] / max(height, width))
        sides = [height * scale, width * scale]
    return tuple(max(multiple, round(side / multiple) * multiple) for side in sides)


def resize_image(image: torch.Tensor, size: str) -> torch.Tensor:
    """uint8 [3, H, W] -> float32 [3, h, w] in [0, 1] at the working size, bilinear with antialiasing."""
    return TF.resize(image, working_size(*image.shape[1:], size), antialias=True).float() / 255
