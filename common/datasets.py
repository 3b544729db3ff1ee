"""The benchmarks: what each one trains and evaluates on, and the readers of their data sets.

A sample is a dictionary:

    image     uint8 [3, H, W]
    segments  int32 [H, W]: 0 is void, any other value 1 + an index into labels and iscrowd
    labels    int64 [S]: class indices, from 0
    iscrowd   bool [S]: True for a group of things that is annotated as one region
    image_id  int: COCO's own, else the index among all images on disk
    name      str: the image's path below the data set's folder
    truth     {metric: keyword arguments for update() of its score}, on validation splits

COCO's instances may overlap, so there `rles`, a list of S masks in COCO's run-length encoding,
stands in place of `segments`.
"""

import json
import pickle
import re
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from common import own_data, toycity
from common.images import count_pairs, label_map, read_image, reading, relabel, values_in
from common.run import UserError, first_few, require

import numpy as np
import torch
import torchvision
from pycocotools import mask as rle
from torch.utils.data import Dataset


# ------------------------------------------------------------------ the parts of a data set
class Category(NamedTuple):
    id: int  # in the data set's own files
    name: str
    isthing: bool


class ImageFiles(NamedTuple):
    image: str  # path below the data set's folder
    labels: tuple[str, ...]
    image_id: int

    def under(self, root):
        """The same with whole paths."""
        labels = tuple(root / label for label in self.labels)
        return ImageFiles(root / self.image, labels, self.image_id)


class Region(NamedTuple):
    raw_label: int | str  # the class as the data set's files call it
    iscrowd: bool


class Labels(NamedTuple):
    """What a reader makes of an image's label files."""

    ids_or_masks: np.ndarray | list  # int32 [H, W], or a list of run-length encoded masks
    regions: dict[int, Region]  # by id, or by index into the list


class Layout(NamedTuple):
    """What is found on disk of a split."""

    files: list[ImageFiles]
    read: Callable  # (ImageFiles with whole paths, image size) -> Labels
    category_ids: dict  # {raw label: category id}; an id that no category has is not evaluated
    categories: list[Category] | None = None  # None: the benchmark's
    coco: object = None  # CocoIndex


# ------------------------------------------------------------------ classes
ALL_CITYSCAPES = torchvision.datasets.Cityscapes.classes
# The 19 that are evaluated, in the order of their train ids
CITYSCAPES_CATEGORIES = []
for _class in ALL_CITYSCAPES:
    if not _class.ignore_in_eval:
        CITYSCAPES_CATEGORIES.append(Category(_class.id, _class.name, _class.has_instances))
CITYSCAPES_THINGS = [category for category in CITYSCAPES_CATEGORIES if category.isthing]
CITYSCAPES_VOID = [c.id for c in ALL_CITYSCAPES if c.ignore_in_eval and c.id >= 0]
# road, sidewalk, building, pole, vegetation, sky, person, car, truck
TOYCITY_IDS = (7, 8, 11, 17, 21, 23, 24, 26, 27)
TOYCITY_CATEGORIES = [category for category in CITYSCAPES_CATEGORIES if category.id in TOYCITY_IDS]
KITTI360_THINGS = [Category(11, "building", True), *CITYSCAPES_THINGS]

# {raw label: Cityscapes' id}
CITYSCAPES_IDS = {label: label for label in range(34)}
# KITTI-360's garages, 34, count as buildings.
KITTI360_IDS = {**{label: label for label in range(45)}, 34: 11}
URBANSYN_IDS = {c.name: c.id for c in ALL_CITYSCAPES}
SYNSCAPES_IDS = {**CITYSCAPES_IDS, 255: 255}  # 255 is void there
# The index is SYNTHIA's label. 0 stands where Cityscapes does not evaluate the class.
SYNTHIA_IDS = (0, 23, 11, 7, 8, 13, 21, 17, 26, 20, 24, 33, 32, 9, 0, 19, 22, 25, 27, 28, 31, 12, 7)
SYNTHIA_IDS = dict(enumerate(SYNTHIA_IDS))


# ------------------------------------------------------------------ readers of label files
def read_cityscapes(files, size):
    """An id from 1000 on is label * 1000 + n. A smaller id is a label: stuff, group, or void.

    For stuff iscrowd means nothing, and make_segments() drops it.
    """
    ids = label_map(files.labels[0], size)
    regions = {}
    for value in values_in(ids):
        if value < 1000:
            regions[value] = Region(value, iscrowd=True)
        else:
            regions[value] = Region(value // 1000, iscrowd=False)
    return Labels(ids, regions)


def read_kitti360(files, size):
    """Every id is label * 1000 + n."""
    ids = label_map(files.labels[0], size)
    return Labels(ids, {value: Region(value // 1000, iscrowd=False) for value in values_in(ids)})


def read_ade20k(files, size):
    """The value is the label."""
    ids = label_map(files.labels[0], size)
    return Labels(ids, {value: Region(value, iscrowd=False) for value in values_in(ids)})


def read_urbansyn(files, size):
    """An instance has a colour, which the JSON names with its class. Other colours are void."""
    ids = label_map(files.labels[0], size, colours=True)
    class_of = {}  # also of things that others hide altogether
    with reading(files.labels[1], 'a list of objects with "color" and "label"'):
        for entry in json.loads(files.labels[1].read_bytes()):
            red, green, blue = map(int, entry["color"][:3])
            class_of[red + 256 * green + 65536 * blue] = entry["label"]
    regions = {}
    for value in values_in(ids):
        regions[value] = Region(class_of.get(value, "unlabeled"), iscrowd=False)
    return Labels(ids, regions)


def read_synscapes(files, size):
    """An instance has the class of most of its pixels. Things without an instance are a crowd."""
    class_file, instance_file = files.labels
    classes = label_map(class_file, size)
    require(classes.max() < 256, f"{class_file} holds the unknown label {classes.max()}")
    instances = label_map(instance_file, size, colours=True)
    numbers, index_map = relabel(instances)
    pairs = count_pairs(index_map, classes, (len(numbers), 256))  # [instances, classes] pixels
    # An instance may reach over the edges of its class.
    majority = pairs.argmax(1).tolist()
    # Below 256 an id is the class of pixels without an instance, from there on an instance.
    ids = np.where(instances > 0, 256 + index_map, classes)
    regions = {}
    for value in values_in(ids):
        if value < 256:
            regions[value] = Region(value, iscrowd=True)
        else:
            regions[value] = Region(majority[value - 256], iscrowd=False)
    return Labels(ids, regions)


def read_synthia(files, size):
    """Channel 0 is the class, 1 the instance. Things without an instance are a crowd."""
    (file,) = files.labels
    with reading(file, "a colour image"):  # Pillow would truncate the numbers to 8 bits
        channels = torchvision.io.decode_image(str(file), "UNCHANGED").numpy()
        classes, instances, *_ = channels.astype(np.int32)
    require(channels.dtype == np.uint16, f"{file} has not 16 bits a channel")
    require(classes.shape == size, f"{file} is {classes.shape}, its image {size}")
    require(classes.max() in SYNTHIA_IDS, f"{file} holds the unknown label {classes.max()}")
    ids = 65536 * classes + instances
    regions = {}
    for value in values_in(ids):
        label, instance = divmod(value, 65536)
        regions[value] = Region(label, iscrowd=instance == 0)
    return Labels(ids, regions)


# ------------------------------------------------------------------ layouts on disk
# All find_… functions have the same parameters.
def find_by_pattern(data_set, root, split, task):
    """Find the images whose paths follow the data set's pattern, and their label files."""
    pattern = data_set.image.replace("{split}", split)
    glob = re.sub(r"{\w+}", "*", pattern)
    if data_set.frames:
        names = read_frames(root / data_set.frames.format(split=split))
    else:
        paths = [path for path in root.glob(glob) if not path.name.startswith(".")]
        names = [path.relative_to(root).as_posix() for path in paths]
    require(names, f"there are no images: expected {root / glob}")

    # The words that stand in braces are read off the image's path, and complete its labels' paths.
    files = []
    # "{city}/{stem}.png" becomes "(?P<city>[^/]+)/(?P<stem>[^/]+).png".
    regex = re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", pattern))
    for index, name in enumerate(sorted(names)):
        words = regex.fullmatch(name)
        require(words, f"{root / name} is not where images are expected, {glob}")
        labels = [label.format(split=split, **words.groupdict()) for label in data_set.labels]
        files.append(ImageFiles(name, tuple(labels), index))
    return Layout(files, data_set.read, data_set.category_ids)


def read_frames(table):
    """The images that KITTI-360 lists for a split, with a label's path beside each."""
    with reading(table, "lines of an image's path and its label's"):
        lines = table.read_text("utf-8").strip().splitlines()
        return [image for image, _ in map(str.split, lines)]


def find_ade20k(data_set, root, split, task):
    """ADE20K names its classes in a table of its own."""
    table = root / "objectInfo150.txt"
    categories = []
    with reading(table, "lines of Idx, Ratio, Train, Val and Name with tabs between"):
        for line in table.read_text("utf-8").strip().splitlines()[1:]:
            number, _, _, _, names, *_ = line.split("\t")
            categories.append(Category(int(number), names.split(",")[0].strip(), False))
    category_ids = {0: 0, **{category.id: category.id for category in categories}}
    # Label 0 is known and not evaluated.
    layout = find_by_pattern(data_set, root, split, task)
    return layout._replace(categories=categories, category_ids=category_ids)


def find_own_semantic(data_set, root, split, task):
    """People's own label images: the pixel is the line of classes.txt."""
    lines = own_data.read_classes(root)
    categories = []
    for line, name in enumerate(lines):
        if name != "-":
            categories.append(Category(line, name, False))
    files = []
    for index, (image, label) in enumerate(own_data.list_labelled(root, split)):
        files.append(ImageFiles(image, (label,), index))
    # All lines are known labels. Those of "-" have no category, so they are not evaluated.
    category_ids = {label: label for label in (*range(len(lines)), own_data.VOID)}
    return Layout(files, read_own, category_ids, categories)


def read_own(files, size):
    """own_semantic: a pixel is the number of its class's line in classes.txt, from 0, or void."""
    ids, void = own_data.read_labels(files.labels[0], size)
    regions = {value: Region(value, False) for value in values_in(ids)}
    if void in regions:
        regions[void] = Region(own_data.VOID, False)
    return Labels(ids, regions)


def find_coco(data_set, root, split, task):
    """COCO's form: a JSON for each split and kind of annotation."""
    index = CocoIndex(root, split, "panoptic" if task == "panoptic" else "instances")
    category_ids = {category.id: category.id for category in index.categories}
    return Layout(index.files, index.read, category_ids, index.categories, index)


# ------------------------------------------------------------------ COCO
class CocoMask(NamedTuple):
    category_id: int
    iscrowd: bool
    mask: list | dict  # COCO's "segmentation"


class CocoIndex:
    """What COCO's JSON says of a split.

    The annotations of all images are packed into one array of bytes. Forked workers share it,
    whereas reading millions of Python objects would copy their memory, as it changes their
    reference counts.
    """

    def __init__(self, root, split, kind):
        self.read = self.read_panoptic if kind == "panoptic" else self.read_instances
        self.kind = kind
        self.file = root / f"annotations/{kind}_{split}.json"
        self.files = []
        self.place = {}  # {image id: index}
        self.packed = bytearray()
        self.ends = array("q", [0])
        with reading(self.file, f"COCO's {kind} JSON"):
            content = json.loads(self.file.read_text("utf-8-sig"))
            self.categories = []
            for entry in content["categories"]:
                # In an instances JSON all are things.
                isthing = kind == "instances" or bool(entry.get("isthing", True))
                self.categories.append(Category(entry["id"], entry["name"], isthing))
            # By name, so that the order does not depend on the tool that wrote the JSON
            images = sorted(content["images"], key=lambda image: image["file_name"])
            self.check_images(images)
            annotations_of = defaultdict(list)
            for annotation in content.pop("annotations"):
                annotations_of[annotation["image_id"]].append(annotation)
            # Before any annotation is freed: what stays would be scattered among those that go,
            # and keep their memory.
            for image in images:
                self.add_files(image, annotations_of[image["id"]], split)
            for image in images:
                # Taken out, so that packing an image frees its annotations.
                self.pack(image, annotations_of.pop(image["id"]))
        require(not annotations_of, f"{self.file} has annotations of images that it does not list")

    def check_images(self, images):
        require(images, f"{self.file} lists no image")
        for key in ("id", "file_name"):
            first = {}
            for image in images:
                other = first.setdefault(image[key], image)
                require(
                    other is image,
                    f"{self.file} lists two images of the same {key}: {other['file_name']} "
                    f"and {image['file_name']}, ids {other['id']} and {image['id']}",
                )

    def add_files(self, image, annotations, split):
        """Note where an image and its labels lie."""
        name = Path(split, image["file_name"]).as_posix()
        label_file = f"annotations/{self.file.name}"
        if self.kind == "panoptic":
            require(
                len(annotations) == 1,
                f"{self.file}: expected one annotation for each image, {name} has "
                f"{len(annotations)}",
            )
            label_file = f"annotations/panoptic_{split}/{annotations[0]['file_name']}"
        self.place[image["id"]] = len(self.files)
        self.files.append(ImageFiles(name, (label_file,), image["id"]))

    def pack(self, image, annotations):
        """Pack an image's annotations. Those of image number n are at [ends[n], ends[n + 1])."""
        if self.kind == "panoptic":
            entry = {}
            for segment in annotations[0]["segments_info"]:
                iscrowd = bool(segment.get("iscrowd"))
                entry[segment["id"]] = Region(segment["category_id"], iscrowd)
        else:
            masks = []
            for annotation in annotations:
                iscrowd = bool(annotation.get("iscrowd"))
                mask = CocoMask(annotation["category_id"], iscrowd, annotation["segmentation"])
                masks.append(mask)
            entry = (image["height"], image["width"]), masks
        self.packed += pickle.dumps(entry)
        self.ends.append(len(self.packed))

    def annotations(self, image_id):
        """What pack() packed."""
        place = self.place[image_id]
        return pickle.loads(self.packed[self.ends[place] : self.ends[place + 1]])

    def read_panoptic(self, files, size):
        """Each colour in an image's PNG is the id of a segment that the JSON lists."""
        segments = self.annotations(files.image_id)
        ids = label_map(files.labels[0], size, colours=True)
        regions = {}
        for value in values_in(ids):
            if value:
                require(
                    value in segments,
                    f"{files.labels[0]} holds the segment {value}, which {self.file} does not list",
                )
                regions[value] = segments[value]
        return Labels(ids, regions)

    def read_instances(self, files, size):
        """Masks that may overlap. One that encloses nothing is left out."""
        annotated_size, masks = self.annotations(files.image_id)
        require(
            size == annotated_size,
            f"{files.image} is {size}, its annotations in {self.file} are for {annotated_size}",
        )
        rles = []
        regions = {}
        for number, (category_id, iscrowd, mask) in enumerate(masks, 1):
            with reading(self.file, f"mask {number} of {files.image}"):
                encoded = encode_mask(mask, size)
            if encoded:
                regions[len(rles)] = Region(category_id, iscrowd)
                rles.append(encoded)
        return Labels(rles, regions)


def encode_mask(mask, size):
    """COCO's "segmentation", polygons or run lengths, as a checked run-length encoding.

    None if it encloses nothing. ValueError for run lengths that do not add up to the image:
    pycocotools would read beyond its memory, or never end.
    """
    if isinstance(mask, list):
        # Fewer than three corners enclose nothing.
        polygons = [polygon for polygon in mask if len(polygon) >= 6]
        for polygon in polygons:
            if not all(abs(side) < 1e6 for side in polygon):  # NaN is not below it either
                raise ValueError("a corner lies nowhere near the image")
        return rle.merge(rle.frPyObjects(polygons, *size)) if polygons else None
    counts = mask["counts"]
    if not isinstance(counts, list):
        counts = run_lengths(counts)
    pixels = size[0] * size[1]
    if tuple(mask["size"]) != size or min(counts, default=0) < 0 or sum(counts) != pixels:
        found = f"its size is {mask['size']} and it holds {sum(counts)} pixels"
        raise ValueError(f"{found}, the image is {size}")
    return rle.frPyObjects({"size": mask["size"], "counts": counts}, *size)


def run_lengths(text):
    """Decode the run lengths of COCO's compressed encoding, which pycocotools keeps to itself.

    A letter holds five bits of a number, the lowest first, and a sixth that says whether more
    letters of it follow. Numbers are in two's complement. From the third run on, a number is the
    difference to the run before the last.
    """
    letters = text.encode() if isinstance(text, str) else text
    counts = []
    value = shift = 0
    for letter in letters:
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the number's last letter, which holds its sign
            value -= (bits & 16) << (shift - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


# ------------------------------------------------------------------ data sets and benchmarks
@dataclass(frozen=True)
class DataSet:
    """Where a data set lies under the data root, and what reads it.

    In the paths {split} is the split's folder. Any other word in braces stands for the same text in
    the paths of an image and of its labels.
    """

    folder: str
    find: Callable = find_by_pattern
    image: str = ""
    labels: tuple[str, ...] = ()
    read: Callable | None = None
    category_ids: dict = field(default_factory=dict)  # {raw label: category id}
    splits: dict = field(default_factory=lambda: {"train": "train", "val": "val"})
    frames: str = ""  # a list of the split's images, for KITTI-360


CITYSCAPES = DataSet(
    folder="cityscapes",
    image="leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png",
    labels=("gtFine/{split}/{city}/{stem}_gtFine_instanceIds.png",),
    read=read_cityscapes,
    category_ids=CITYSCAPES_IDS,
)
# Windows bitmaps are read in a tenth of a PNG's time.
TOYCITY = replace(
    CITYSCAPES, folder="toycity", image="leftImg8bit/{split}/{city}/{stem}_leftImg8bit.bmp"
)
KITTI360 = DataSet(
    folder="KITTI-360",
    image="data_2d_raw/{drive}/image_00/data_rect/{stem}.png",
    labels=(
        "data_2d_semantics/train/{drive}/image_00/instance/{stem}.png",
        "data_2d_semantics/train/{drive}/image_00/confidence/{stem}.png",
    ),
    read=read_kitti360,
    category_ids=KITTI360_IDS,
    frames="data_2d_semantics/train/2013_05_28_drive_{split}_frames.txt",
)
ADE20K = DataSet(
    folder="ADEChallengeData2016",
    find=find_ade20k,
    image="images/{split}/{stem}.jpg",
    labels=("annotations/{split}/{stem}.png",),
    read=read_ade20k,
    splits={"train": "training", "val": "validation"},
)
URBANSYN = DataSet(
    folder="urbansyn",
    image="rgb/rgb_{stem}.png",
    labels=("panoptic/panoptic_{stem}.png", "bbox2d/bbox2d_{stem}.json"),
    read=read_urbansyn,
    category_ids=URBANSYN_IDS,
)
SYNSCAPES = DataSet(
    folder="synscapes",
    image="img/rgb/{stem}.png",
    labels=("img/class/{stem}.png", "img/instance/{stem}.png"),
    read=read_synscapes,
    category_ids=SYNSCAPES_IDS,
)
SYNTHIA = DataSet(
    folder="synthia",
    image="RGB/{stem}.png",
    labels=("GT/LABELS/{stem}.png",),
    read=read_synthia,
    category_ids=SYNTHIA_IDS,
)
COCO = DataSet("coco", find_coco, splits={"train": "train2017", "val": "val2017"})
# People's own data sets: --data is their folder.
OWN_LABEL_IMAGES = DataSet("", find_own_semantic)
OWN_COCO = DataSet("", find_coco)


@dataclass(frozen=True)
class Benchmark:
    train_on: DataSet
    evaluate_on: DataSet
    task: str  # "semantic", "instance" or "panoptic": what a segment is
    metrics: tuple[str, ...]
    categories: list | None = None  # None: read from the data set's own files
    size: str = "512"  # of the images that stage 1 extracts
    excluded_from_mean: tuple[str, ...] = ()  # classes that are trained and scored all the same
    paper: str = "-"  # the paper's number, in percent


CITYSCAPES_INSTANCE = Benchmark(
    train_on=CITYSCAPES,
    evaluate_on=CITYSCAPES,
    task="instance",
    metrics=("AP",),
    categories=CITYSCAPES_THINGS,
    size="512x1024",
    paper="39.5",
)
BENCHMARKS = {
    "toycity": Benchmark(
        train_on=TOYCITY,
        evaluate_on=TOYCITY,
        task="panoptic",
        metrics=("mIoU", "AP", "PQ"),
        categories=TOYCITY_CATEGORIES,
        size="512x1024",
    ),
    "cityscapes_semantic": replace(
        CITYSCAPES_INSTANCE,
        task="semantic",
        metrics=("mIoU",),
        categories=CITYSCAPES_CATEGORIES,
        paper="82.8",
    ),
    "cityscapes_instance": CITYSCAPES_INSTANCE,
    "coco_instance": Benchmark(COCO, COCO, "instance", ("AP",), paper="47.3"),
    "coco_panoptic": Benchmark(COCO, COCO, "panoptic", ("PQ",), paper="56.9"),
    "ade20k_semantic": Benchmark(ADE20K, ADE20K, "semantic", ("mIoU",), paper="57.5"),
    "kitti360_instance": replace(
        CITYSCAPES_INSTANCE,
        train_on=KITTI360,
        evaluate_on=KITTI360,
        categories=KITTI360_THINGS,
        excluded_from_mean=("bus", "train"),  # the official AP has seven classes
        paper="21.9 (AP_things)",
    ),
    "urbansyn_to_cityscapes_instance": replace(
        CITYSCAPES_INSTANCE, train_on=URBANSYN, paper="32.5 (ViT-L)"
    ),
    "synscapes_to_cityscapes_instance": replace(
        CITYSCAPES_INSTANCE, train_on=SYNSCAPES, paper="33.4 (ViT-L)"
    ),
    "synthia_to_cityscapes_instance": replace(CITYSCAPES_INSTANCE, train_on=SYNTHIA, paper="-"),
    "own_semantic": Benchmark(OWN_LABEL_IMAGES, OWN_LABEL_IMAGES, "semantic", ("mIoU",)),
    "own_instance": Benchmark(OWN_COCO, OWN_COCO, "instance", ("AP",)),
    "own_panoptic": Benchmark(OWN_COCO, OWN_COCO, "panoptic", ("PQ",)),
}


def find_benchmark(name):
    require(name in BENCHMARKS, f"unknown benchmark {name!r}: known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def open_split(name, data, split):
    """Open a benchmark's "train" or "val" split under the data root.

    UserError where files are missing or do not fit together.
    """
    benchmark = find_benchmark(name)
    if name == "toycity":  # drawn when it is first asked for
        toycity.write(data / name)
    data_set = benchmark.train_on if split == "train" else benchmark.evaluate_on
    root = data / data_set.folder
    require(
        root.is_dir(), f"{root} is needed and not there: say where your data sets are with --data"
    )

    # People's own data sets may have no val split.
    is_own = name.startswith("own_")
    holds_out = is_own and own_data.lacks_val(root)
    split_on_disk = data_set.splits["train" if holds_out else split]
    layout = data_set.find(data_set, root, split_on_disk, benchmark.task)
    samples = Split(root, layout, benchmark, benchmark.metrics if split == "val" else ())
    if is_own:
        table = layout.coco.file if layout.coco else root / own_data.CLASSES
        own_data.check_class_names(table, [category.name for category in samples.categories])
    if holds_out:
        samples.hold_out(split)
    return samples


# ------------------------------------------------------------------ samples
class Segment(NamedTuple):
    label: int
    iscrowd: bool
    id: int | None  # of a thing, in the label files


class Split(Dataset):
    """A split of a data set, read into samples (see the top of this file).

    The benchmark's task says what a segment is: for "semantic" each class in the image, for
    "instance" each thing, for "panoptic" each stuff class and each thing. The truth that the scores
    of `metrics` take goes into the samples.
    """

    def __init__(self, root, layout, benchmark, metrics=()):
        self.root = root
        self.task = benchmark.task
        self.excluded_from_mean = benchmark.excluded_from_mean
        self.metrics = metrics
        self.files = layout.files
        self.read = layout.read
        self.coco = layout.coco
        self.categories = layout.categories
        if self.categories is None:
            self.categories = benchmark.categories
        self.held_out = set()
        self.check_files()
        # {raw label: class index, or None for a class that is not evaluated}
        index_of = {category.id: index for index, category in enumerate(self.categories)}
        self.label_of = {raw: index_of.get(id) for raw, id in layout.category_ids.items()}

    def check_files(self):
        files = {}  # in order, and each only once
        for image_files in self.files:
            files.update(dict.fromkeys((image_files.image, *image_files.labels)))
        for file in files:
            inside = not Path(file).is_absolute() and ".." not in Path(file).parts
            require(inside, f"{file} lies outside {self.root}")
        missing = [self.root / file for file in files if not (self.root / file).is_file()]
        verb = "is" if len(missing) == 1 else "are"
        require(not missing, f"{first_few(missing)} {verb} needed and not there")

    def hold_out(self, split):
        """Keep the images of `split`, where a fifth of the training images serves as "val"."""
        self.held_out = own_data.hold_out(self.names)
        kept = []
        for files in self.files:
            if (files.image in self.held_out) == (split == "val"):
                kept.append(files)
        self.files = kept

    @property
    def names(self):
        return [files.image for files in self.files]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        files = self.files[index].under(self.root)
        image = read_image(files.image, exif=False)
        size = tuple(image.shape[1:])
        labels = self.read(files, size)
        segment_of, segments = self.make_segments(labels.regions, files.labels[0])
        sample = {"image": image, "image_id": files.image_id, "name": self.files[index].image}
        if isinstance(labels.ids_or_masks, list):
            # Each mask is a thing of a known class, so it is one segment, in this order.
            sample["rles"] = labels.ids_or_masks
        else:
            sample["segments"] = torch.from_numpy(segment_of[labels.ids_or_masks])
        sample["labels"] = torch.tensor([segment.label for segment in segments]).long()
        sample["iscrowd"] = torch.tensor([segment.iscrowd for segment in segments]).bool()
        if self.metrics:
            sample["truth"] = self.truth(sample, labels.ids_or_masks, files)
        return sample

    def make_segments(self, regions, file):
        """Number an image's segments, as the task defines them, from 1.

        Returns each id's number, int32 [largest id + 1] with 0 for void, and the list of Segments.
        """
        segment_of = np.zeros(max(regions, default=0) + 1, np.int32)
        number_of = {}  # {segment: its number, from 1}
        for id, region in regions.items():
            if region.raw_label not in self.label_of:
                known = [label for label in self.label_of if label != own_data.VOID]
                raise UserError(
                    f"{file} holds the unknown label {region.raw_label!r}: "
                    f"known are {first_few(known)}"
                )
            label = self.label_of[region.raw_label]
            if label is None:
                continue
            # A thing is a segment of its own, whatever belongs to stuff is one of its class.
            if self.task != "semantic" and self.categories[label].isthing:
                segment = Segment(label, region.iscrowd, id)
            else:  # one segment for all of the class
                segment = Segment(label, False, None)
            if segment not in number_of:
                number_of[segment] = len(number_of) + 1
            segment_of[id] = number_of[segment]
        return segment_of, list(number_of)

    def truth(self, sample, ids, files):
        """The truth that the score of each metric takes, by the names of update() in 05_eval.py."""
        truth = {}
        labels = sample["labels"].tolist()
        if "mIoU" in self.metrics:
            # Void is 255, and each segment has its class.
            class_of = torch.tensor([255, *labels], dtype=torch.uint8)
            truth["mIoU"] = {"target": class_of[sample["segments"].long()]}  # uint8 [H, W]
        if "AP" in self.metrics and self.coco:
            truth["AP"] = {"image_id": sample["image_id"]}
        elif "AP" in self.metrics:
            truth["AP"] = {"instance_ids": torch.from_numpy(ids)}  # int32 [H, W]
            if len(files.labels) > 1:  # KITTI-360's confidence
                confidence = label_map(files.labels[1], ids.shape) / 65535
                truth["AP"]["weights"] = torch.from_numpy(confidence)
        if "PQ" in self.metrics:
            # In the samples, segments are numbered from 1.
            segments = []
            for index, label in enumerate(labels):
                category_id = self.categories[label].id
                iscrowd = int(sample["iscrowd"][index])
                segments.append({"id": index + 1, "category_id": category_id, "iscrowd": iscrowd})
            truth["PQ"] = {"true_ids": sample["segments"], "true_segments": segments}
        return truth
