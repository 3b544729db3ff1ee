"""Files of images and of label maps: how they are found, read, resized and counted."""

import contextlib
import math
import os
import re
from pathlib import Path

from common.run import UserError, require

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps

# A format that Pillow cannot read here, .heic perhaps, is listed all the same: the user is told.
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif"),
    *(".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
)


# ------------------------------------------------------------------ finding
def list_images(folder):
    """List all images below a folder: their paths relative to it, sorted.

    Links are followed, hidden files and folders left out. UserError if there is no image.
    """
    require(folder.is_dir(), f"there is no folder {folder}")
    names = []
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        # Links may lead in circles, so each folder is entered once, under its first name in order.
        # A run folder is skipped, as the images in it are its figures.
        real_place = os.path.realpath(place)
        if real_place in seen or "run.json" in files:
            folders.clear()
            continue
        seen.add(real_place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in files:
            path = Path(place, file)
            if path.suffix.lower() in IMAGE_SUFFIXES and not file.startswith("."):
                names.append(path.relative_to(folder).as_posix())
    require(names, f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(names)


# ------------------------------------------------------------------ reading
@contextlib.contextmanager
def reading(file, form):
    """Turn any error while `file` is read as `form` into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Pillow, torchvision, json and pycocotools each raise their own
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{file} cannot be read as {form} ({reason})") from None


def read_image(path, exif=True):
    """Read an image as a viewer shows it: uint8 [3, H, W], sRGB.

    It is turned as its EXIF tag says, and transparency becomes white. The images of data sets are
    read with exif=False, as their labels lie on the pixels as they are stored. Colour profiles are
    ignored, as they were when the encoders were trained. UserError if the file is missing,
    truncated or no image.
    """
    # Pillow maps a file that it opens by its name into memory, and then turns some TIFFs wrongly.
    with reading(path, "an image"), path.open("rb") as opened, Image.open(opened) as image:
        if image.mode in ("I", "F"):
            raise ValueError("its numbers have more than 16 bits, which no screen shows")
        if exif:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # convert() would clip all values above 255
            image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def label_map(file, size, colours=False):
    """Read a label image: int32 [H, W], which must be of `size`.

    It has one channel of 8 or 16 bits. With colours=True a value is R + 256 G + 65536 B.
    """
    with reading(file, "an image"), Image.open(file) as image:
        if colours:
            image = image.convert("RGB")
        ids = np.asarray(image).astype(np.int32)
    if colours:
        ids = ids @ np.array([1, 256, 65536], np.int32)
    require(ids.shape == size, f"{file} is {ids.shape}, its image {size}")
    return ids


def read_run_image(run_config, name):
    """Read an image of a run at its working size: float32 [3, h, w] in [0, 1].

    run_config: the content of run.json.
    """
    path = Path(run_config["root"], name)
    image = read_image(path, exif=run_config["benchmark"] is None)
    return resize_image(image, run_config["size"])


# ------------------------------------------------------------------ resizing
def working_size(height, width, size, multiple=32):
    """Height and width, in multiples of `multiple`, at which an image enters the encoders.

    size: "512x1024" is height x width. "512" is the short side, and the aspect is kept. "800/1333"
    limits the long side as well. "original" keeps the image's size. UserError for anything else.
    """
    if size == "original":
        target = (max(32, height), max(32, width))
    else:
        numbers = [int(digits) for digits in re.findall(r"\d+", size)]
        meaningful = re.fullmatch(r"\d+([x/]\d+)?", size) and min(numbers) >= 32
        require(
            meaningful,
            f"--size {size!r} is no size: expected HEIGHTxWIDTH, a short side, SHORT/LONGEST "
            "(pixels, from 32) or original",
        )
        if "x" in size:
            target = numbers
        else:
            longest = numbers[1] if "/" in size else math.inf
            scale = min(numbers[0] / min(height, width), longest / max(height, width))
            target = (height * scale, width * scale)
    return tuple(max(multiple, round(side / multiple) * multiple) for side in target)


def resize_image(image, size):
    """uint8 [3, H, W] to float32 [3, h, w] in [0, 1] at the working size, with antialiasing."""
    return TF.resize(image, working_size(*image.shape[1:], size), antialias=True).float() / 255


# ------------------------------------------------------------------ counting
def values_in(ids):
    """The values of a map of ids, a sorted list. Much faster than np.unique for small values."""
    seen = np.zeros(int(ids.max()) + 1, bool)
    seen[ids] = True
    return np.flatnonzero(seen).tolist()


def relabel(ids):
    """The sorted values of a map of ids, and each pixel's index among them, int32 [H, W]."""
    values = values_in(ids)
    index_of = np.zeros(values[-1] + 1, np.int32)
    index_of[values] = np.arange(len(values))
    return values, index_of[ids]


def count_pairs(rows, columns, shape):
    """Count the pixels of each pair of values: int64 of `shape`.

    rows, columns: two maps, int [H, W], whose values are below the sides of `shape`.
    """
    pairs = rows.astype(np.int32) * shape[1] + columns
    return np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
