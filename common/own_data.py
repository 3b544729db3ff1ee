"""People's own labelled images: their layout, the images held out, and a check of all labels.

classes.txt                  own_semantic: a class a line, "-" for a value that does not count
images/{train,val}/a/b.jpg   with labels/{train,val}/a/b.png: a pixel is the number of its class's
                             line, from 0, or void: 255 (65535 with 16 bits)

{train,val}/a/b.jpg          own_instance and own_panoptic: COCO's form
annotations/{instances,panoptic}_{train,val}.json, and panoptic_{train,val}/*.png beside it
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from common import run
from common.images import label_map, list_images, reading
from common.run import UserError, first_few, require

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

CLASSES = "classes.txt"
VOID = "void"  # stands for the highest value of a label image, which does not count
LABEL_BITS = {"L": 8, "P": 8, "I;16": 16, "I": 16}  # by Pillow's mode
# Any of these shows that there is a validation split.
VAL_FILES = [
    "val",
    "images/val",
    "labels/val",
    "annotations/instances_val.json",
    "annotations/panoptic_val.json",
]


# ------------------------------------------------------------------ layout
def read_classes(root):
    """The lines of classes.txt. UserError for empty lines, or too many."""
    file = root / CLASSES
    with reading(file, "a class a line"):
        lines = [line.strip() for line in file.read_text("utf-8-sig").rstrip().splitlines()]
    require(
        len(lines) < 256 and all(lines),
        f"{file}: expected at most 255 lines, each with a class or with - for a value that "
        "does not count",
    )
    return lines


def check_class_names(table, names):
    require(names, f"{table} names no class")
    for name in names:
        require(names.count(name) == 1, f"{table} names two classes {name!r}")


def list_labelled(root, split):
    """The paths below root of each image and of its label, a PNG of the same name."""
    # Images of two formats may have the same name but for the ending.
    image_of = {}  # {label: image}
    for name in list_images(root / "images" / split):
        image = f"images/{split}/{name}"
        label = Path("labels", split, name).with_suffix(".png").as_posix()
        other = image_of.setdefault(label, image)
        require(
            other == image, f"{root}: {other} and {image} would share {label}: rename one of them"
        )
    return [(image, label) for label, image in image_of.items()]


def read_labels(file, size):
    """A label image as int32 [H, W], and its highest possible value, which does not count."""
    with reading(file, "an image"), Image.open(file) as image:
        bits = LABEL_BITS.get(image.mode)
        require(
            bits and image.format == "PNG",
            f"{file} is {image.format} of mode {image.mode}: expected a PNG with one channel "
            "of 8 or 16 bits or with a palette, whose index is the value",
        )
    return label_map(file, size), 2**bits - 1


# ------------------------------------------------------------------ held-out images
def lacks_val(root):
    """Is there no validation split? Then images of the training split are held out for it."""
    return not any(os.path.lexists(root / file) for file in VAL_FILES)


def hold_out(names):
    """A fifth of the images, a set of names.

    It depends on the names alone, so it is the same in every stage and process.
    """
    require(
        len(names) > 1,
        f"{names[0]} is the only image and there is no val split: expected at least two images",
    )
    # Sorted by a hash of the name, which is as good as random.
    shuffled = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    return set(shuffled[: max(1, len(names) // 5)])


# ------------------------------------------------------------------ the check of all labels
class LabelCheck(NamedTuple):
    """What stage 1 remembers of a sample."""

    # By class. A list, as each tensor or array of a worker's would keep a file open.
    pixels: list[float] | None
    short_side: int
    error: str = ""  # why the sample cannot be used


class LabelChecks(Dataset):
    """A LabelCheck of each sample, for a DataLoader."""

    def __init__(self, samples, classes):
        self.samples = samples
        self.classes = classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        try:
            sample = self.samples[index]
        except UserError as error:
            return LabelCheck(None, 0, str(error))
        # Pixels of each segment, then of each class
        if "rles" in sample:
            areas = rle.area(sample["rles"])
        else:
            areas = torch.bincount(sample["segments"].flatten())[1:]  # without void
        pixels = np.bincount(sample["labels"], weights=areas, minlength=self.classes)
        return LabelCheck(pixels.tolist(), min(sample["image"].shape[1:]))


def check_labels(train, val, workers):
    """Look at every label of a data set and report each class's share.

    train, val: Splits. Returns the longest short side of an image, in pixels. UserError for what
    would end a training or an evaluation.
    """
    names = [category.name for category in train.categories]
    val_names = [category.name for category in val.categories]
    differing = sorted(set(names).symmetric_difference(val_names))
    splits = f"train and val of {train.root}"
    require(not differing, f"{splits} list different classes: {first_few(differing)}")
    require(names == val_names, f"{splits} list their classes in different orders")

    # All errors are reported at once, as a data set may take long to read.
    samples = LabelChecks(ConcatDataset([train, val]), len(names))
    loader = DataLoader(samples, batch_size=None, **run.loader_arguments(workers))
    checks = list(tqdm(loader, "checking labels", unit="label"))
    errors = [check.error for check in checks if check.error]
    require(
        not errors,
        f"{len(errors)} of {len(checks)} images of {train.root} cannot be used: "
        f"{first_few(errors, '; ')}",
    )
    pixels = np.array([check.pixels for check in checks])  # [train and val images, classes]
    train_pixels = pixels[: len(train)]  # [images, classes]
    val_pixels = pixels[len(train) :]
    require(
        train_pixels.any(),
        f"no image to train on in {train.root} has a pixel of {first_few(names)}",
    )
    report_shares(train, val, train_pixels, val_pixels)
    warn_of_oversights(train, val, train_pixels, val_pixels)
    return max(check.short_side for check in checks)


def report_shares(train, val, train_pixels, val_pixels):
    """Print the share of each class in the labelled pixels, and in how many images it is."""
    if val.held_out:
        print(
            "there is no val split, so a fifth of train is held out in all stages (run.json "
            f"lists it): {first_few(val.names)}"
        )
    rows = [["class", "train: % of pixels", "images", "val: % of pixels", "images"]]
    for index, category in enumerate(train.categories):
        row = [category.name]
        for pixels in (train_pixels, val_pixels):
            share = 100 * pixels[:, index].sum() / max(1, pixels.sum())
            images = np.count_nonzero(pixels[:, index])
            row += [run.number(share, 2), str(images)]
        rows.append(row)
    print(f"\n{len(train)} images of {train.root} to train on, {len(val)} to evaluate on")
    print(run.table(rows))


def warn_of_oversights(train, val, train_pixels, val_pixels):
    """Print a warning of classes, images and files that may have been forgotten."""
    absent_classes = []
    for index, category in enumerate(train.categories):
        if not train_pixels[:, index].any():
            in_val = " (but in val)" if val_pixels[:, index].any() else ""
            absent_classes.append(category.name + in_val)
    unlabelled_images = []
    for samples, pixels in ((train, train_pixels), (val, val_pixels)):
        for name, areas in zip(samples.names, pixels, strict=True):
            if not areas.any():
                unlabelled_images.append(name)
    found = {
        "classes not in train": absent_classes,
        "images without a class": unlabelled_images,
        "files unused": unused_files(train, val),
    }
    for what, items in found.items():
        if items:
            print(f"WARNING: {len(items)} {what}: {first_few(items)}")


def unused_files(train, val):
    """Images that no annotation lists, and label images without an image."""
    used = set()
    for samples in (train, val):
        for files in samples.files:
            used.update((files.image, *files.labels))
    # Every image that lies where the data set's own do, but which no sample uses
    unused = []
    splits = ["train"] if val.held_out else ["train", "val"]
    for split in splits:
        if train.task == "semantic":
            folders = [f"labels/{split}"]
        elif train.task == "instance":
            folders = [split]
        else:
            folders = [split, f"annotations/panoptic_{split}"]
        for folder in folders:
            for name in list_images(train.root / folder):
                if f"{folder}/{name}" not in used:
                    unused.append(f"{folder}/{name}")
    return sorted(unused)
