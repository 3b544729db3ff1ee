"""Stage 1: run frozen encoders over pictures and keep their feature maps.

    python 01_extract.py                                                     the embedded benchmark, toycity
    python 01_extract.py --images holiday/ --encoders dinov3_b sam2_b        your own pictures, no labels needed
    python 01_extract.py --benchmark cityscapes_instance --data /datasets --encoders dinov3_b sam2_b
    python 01_extract.py --benchmark own_semantic --data fields/ --encoders dinov3_b sam2_b       your own, labelled

Each picture is scaled to a working size and passes once through each encoder; the native maps are stored in float16.
Files that are there and whole are kept: an interrupted run goes on where it stopped, and an encoder added to --encoders
is the only one that runs. A picture that cannot be read is named and left out. Of an own data set all labels are looked
at first. Its pictures keep their size where none has a short side above 512, and get that one otherwise.

Writes run.json, features/<encoder>/<picture>.safetensors and features.png to the run folder.
"""

import importlib.metadata
import os
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from common import figures, run
from common.datasets import (
    find_benchmark,
    list_pictures,
    open_split,
    read_image,
    read_run_picture,
    resize_image,
    working_size,
)
from common.encoders import ENCODERS, load_encoder, weights_origin
from common.run import CORES, DEVICES, UserError, flag, natural, need, positive

import numpy as np
import torch
from pycocotools import mask as rle
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

KINDS = ", ".join(ENCODERS)
PACKAGES = ("torch", "torchvision", "timm", "sam2", "transformers", "numpy")


@dataclass
class Settings:
    run: Path | None = flag(None, "run folder (default: runs/ and the name of the benchmark or folder)")
    benchmark: str | None = flag(None, "whose training pictures to take (default: toycity)")
    images: Path | None = flag(None, "take the pictures of a folder instead", metavar="FOLDER")
    data: Path = flag(Path("data"), "folder of the data sets; for own_…, the data set's own")
    encoders: tuple[str, ...] = flag(("tiny_vit", "tiny_hiera"), f"of {KINDS}, or timm:NAME", metavar="NAME", nargs="+")
    weights: tuple[str, ...] = flag(("pretrained",), "pretrained, none or NAME=FILE", metavar="WHICH", nargs="+")
    limit: int | None = flag(None, "pictures, evenly spaced (default: 24 for toycity, else 200)", type=positive)
    size: str | None = flag(None, "HEIGHTxWIDTH, a short side, SHORT/LONGEST, own (default: above, or the benchmark's)")
    seed: int = flag(0, type=natural)
    device: str = flag(DEVICES[0], choices=DEVICES)
    workers: int = flag(CORES, "helpers beside the main process", type=natural)


def choose_weights(encoders, words):
    """--weights as {encoder: "pretrained", "none" or a file}; UserError for words that mean nothing here."""
    need(len(set(encoders)) == len(encoders), f"--encoders names one of {', '.join(encoders)} twice")
    weights = dict.fromkeys(encoders, "pretrained")
    for word in sorted(words, key=lambda word: "=" in word):  # single encoders overrule the word for all
        name, _, file = word.partition("=")
        if file and name in encoders:
            weights[name] = str(Path(file).resolve())
        elif word in ("pretrained", "none"):
            weights = dict.fromkeys(encoders, word)
        else:
            raise UserError(f"--weights {word}: expected pretrained, none, or NAME=FILE with NAME one of --encoders")
    return weights


# ------------------------------------------------------------------ pictures
def choose_pictures(settings):
    """The folder that holds the pictures, and for run.json the names below it of those taken, and their --size."""
    chosen = {"size": "512"}
    if settings.images:
        root, names = settings.images, list_pictures(settings.images)
    else:
        samples = open_split(settings.benchmark, settings.data, "train")
        root, names, chosen["size"] = samples.root, samples.names, find_benchmark(settings.benchmark).size
        if settings.benchmark.startswith("own_"):
            chosen |= check_labels(samples, settings)
    few = 24 if settings.benchmark == "toycity" else 200
    chosen["images"] = run.evenly_spaced(names, settings.limit or few)
    return root, chosen | ({"size": settings.size} if settings.size else {})


def look_at(index, samples, classes):
    """A sample's pixels by class, float64 [classes], and its picture's short side; or what is wrong with it."""
    try:
        sample = samples[index]
    except UserError as error:
        return str(error)
    areas = rle.area(sample["rles"]) if "rles" in sample else torch.bincount(sample["segments"].flatten())[1:]
    return np.bincount(sample["labels"], areas, classes), min(sample["image"].shape[1:])


def check_labels(train, settings):
    """Look at every label of an own data set, and report. Returns what run.json is to say of it.

    UserError for what would end a training or an evaluation.
    """
    val = open_split(settings.benchmark, settings.data, "val")
    names, others = ([c.name for c in samples.categories] for samples in (train, val))
    differ = run.some(sorted({*names} ^ {*others}) or names)
    need(names == others, f"train and val of {train.root} list other classes, or in another order: {differ}")
    both = ConcatDataset([train, val])
    look = partial(look_at, samples=both, classes=len(names))
    loader = DataLoader(range(len(both)), None, collate_fn=look, **run.loader_arguments(settings.workers))
    looks = list(tqdm(loader, "looking at labels", unit="label"))
    wrong = [look for look in looks if isinstance(look, str)]
    need(not wrong, f"{len(wrong)} of {len(both)} pictures of {train.root} cannot be used: {run.some(wrong, '; ')}")
    pixels = np.array([areas for areas, _ in looks])  # [pictures of train, then of val; classes]
    need(pixels[: len(train)].any(), f"no picture to train on in {train.root} has a pixel of {run.some(names)}")
    report_labels(train, val, np.split(pixels, [len(train)]))
    return {"held_out": sorted(val.held_out)} | ({"size": "own"} if max(side for _, side in looks) <= 512 else {})


def report_labels(train, val, pixels):
    """Each class's share of what is labelled, and its pictures; and what may be an oversight.

    pixels: by class, float64 [pictures, classes], of train and of val.
    """
    columns, names = [], [category.name for category in train.categories]
    for areas in pixels:
        shares = 100 * areas.sum(0) / max(1, areas.sum())
        columns += [[run.number(share, 2) for share in shares], map(str, (areas > 0).sum(0))]
    if val.held_out:
        print(f"no val split: a fifth of train is held out, in all stages (see run.json): {run.some(val.names)}")
    head = ["class", "train: % of pixels", "pictures", "val: % of pixels", "pictures"]
    print(f"\n{len(train)} pictures of {train.root} to train on, {len(val)} to evaluate on")
    print(run.table([head, *zip(names, *columns, strict=True)]))

    found = zip(names, *(areas.any(0) for areas in pixels), strict=True)
    absent = [name + (" (but in val)" if in_val else "") for name, in_train, in_val in found if not in_train]
    blank = np.array(train.names + val.names)[~np.concatenate(pixels).any(1)]
    folders = {"semantic": ["labels/{}"], "instance": ["{}"], "panoptic": ["{}", "annotations/panoptic_{}"]}[train.task]
    folders = {folder.format(split) for folder in folders for split in ("train", "train" if val.held_out else "val")}
    there = {f"{folder}/{name}" for folder in folders for name in list_pictures(train.root / folder)}
    lone = sorted(there - {file for samples in (train, val) for files in samples.files for file in files})
    for what, odd in (("classes not in train", absent), ("pictures without a class", blank), ("files unused", lone)):
        if len(odd):
            print(f"WARNING: {len(odd)} {what}: {run.some(odd)}")


def read_picture(name, root, size, turn):
    """(name, the picture at its working size, float32 [3, H, W] in [0, 1], or why it cannot be used, fingerprint)."""
    path = root / name
    try:
        is_text = name.encode(errors="ignore").decode() == name  # else it has bytes that are not UTF-8
        short = max(map(len, os.fsencode(name).split(b"/"))) <= 200
        need(is_text and short, f"{ascii(str(path))} has a name too long, or no text, for a feature file: rename it")
        image = read_image(path, turn)
        height, width = image.shape[1:]
        keeps = "x" in size or max(height, width) <= 16 * min(height, width)
        need(keeps, f"{path} is {height} x {width}, too long for its aspect to be kept: give --size HxW")
        return name, resize_image(image, size), run.fingerprint(path)
    except UserError as error:
        return name, str(error), None


def lacking(folder, encoders, root, names):
    """{encoder: pictures without a whole feature file}; those damaged, or of a picture since changed, are named."""
    todo, pictures = {encoder: set() for encoder in encoders}, {}  # the latter {name: fingerprint}
    for encoder, name in product(encoders, names):
        path = run.feature_path(folder, encoder, name)
        try:
            with safe_open(path, "np") as file:  # compares its length with what its header promises
                made_from = (file.metadata() or {}).get("picture")
        except (SafetensorError, OSError) as error:
            if os.path.isfile(path):
                print(f"{path} is damaged ({error}): extracting it again")
            todo[encoder].add(name)
            continue
        if name not in pictures:
            pictures[name] = run.fingerprint(root / name) if (root / name).is_file() else None
        if made_from != pictures[name]:
            print(f"{root / name} is not the picture that {path} was made from: extracting it again")
            todo[encoder].add(name)
    return todo


def open_run(folder, asked):
    """Write run.json, or check that the one there asked for the same, added encoders aside; UserError if not.

    A run.json without any feature is from a run that failed at once, on its weights say: it binds nobody.
    """
    if (folder / "run.json").is_file() and (folder / "features").is_dir():
        old = run.read_stage(folder, "run.json", "01_extract.py")
        new, grown = dict(asked), set(old["encoders"]) < set(asked["encoders"])
        if grown:
            new["encoders"] = old["encoders"]
            for key in ("weights", "weights_from"):
                new[key] = {encoder: asked[key][encoder] for encoder in old["encoders"]}
        run.refuse_other_settings(folder, old, new, "give another --run, or delete it")
        if not grown:
            return old
    asked["command"] = shlex.join(["python", "01_extract.py", *sys.argv[1:]])
    asked["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    run.write_json(folder / "run.json", asked)
    return asked


# ------------------------------------------------------------------ extraction
def need_disk(folder, encoders, todo, picture):
    """UserError if the disk lacks room for the maps of all pictures, if they were of this one's size [3, H, W]."""
    pixels, needed = picture[0].numel(), 0
    for encoder in encoders:
        numbers = sum(channels * pixels // stride**2 for stride, channels in encoder.channels.items())
        needed += 2 * numbers * len(todo[encoder.name])  # bytes, float16
    free = shutil.disk_usage(folder).free
    room = f"{folder} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed"
    need(needed < free, f"{room}: give a lower --limit")


@torch.inference_mode()
def extract(encoders, todo, pictures, folder, device):
    """One file for each picture and each encoder that lacks it; one picture at a time, as a folder may hold many sizes.

    pictures: yields what read_picture returns. Returns {picture: reason} of those that cannot be used.
    """
    left_out, writing = {}, []
    with ThreadPoolExecutor(1) as writer:  # the encoders go on while files are written, a few pictures ahead at most
        for name, image, fingerprint in tqdm(pictures, "extracting", unit="picture", disable=not len(pictures)):
            if isinstance(image, str):
                left_out[name] = image
                tqdm.write(f"left out: {image}")
                continue
            if not writing:  # the first that can be used stands for all
                need_disk(folder, encoders, todo, image)
            for encoder in (encoder for encoder in encoders if name in todo[encoder.name]):
                native = encoder(image[None].to(device, non_blocking=True))  # {stride: [1, C, h, w]}
                maps = {str(stride): feature[0] for stride, feature in native.items()}
                writing.append(writer.submit(write, run.feature_path(folder, encoder.name, name), maps, fingerprint))
            while len(writing) > 4 * len(encoders):
                writing.pop(0).result()
        for written in writing:
            written.result()
    return left_out


def write(path, maps, fingerprint):
    """On a GPU, fetching the maps waits for it: here, in the background; with NumPy, as PyTorch would start threads of
    its own for this one. A map beyond float16 stays in float32."""
    arrays = {}
    for stride, feature in maps.items():
        exact = np.ascontiguousarray(feature.cpu().numpy())
        with np.errstate(over="ignore"):
            half = exact.astype(np.float16)
        arrays[stride] = half if np.isfinite(half).all() else exact
    with run.whole_file(path) as temporary:
        temporary.write_bytes(save(arrays, {"picture": fingerprint}))


def report(folder, found, names):
    """A row for each map of the first picture, and three pictures' maps in colours."""
    shown = run.evenly_spaced(names, 3)
    images = [read_run_picture(found, name) for name in shown]
    pictures = [run.fingerprint(Path(found["root"]) / name) for name in shown]
    maps = {}  # {title: for each picture {stride: [C, h, w]}}
    rows = [["encoder", "stride", "channels", "map", "mean", "std"]]
    for encoder in found["encoders"]:
        title = f"{encoder}, RANDOM WEIGHTS" if found["weights"][encoder] == "none" else encoder
        maps[title] = [run.read_features(folder, encoder, *one) for one in zip(shown, pictures, strict=True)]
        for stride, feature in maps[title][0].items():
            c, h, w = feature.shape
            mean, std = (run.number(value.item(), 3) for value in (feature.float().mean(), feature.float().std()))
            rows.append([title, str(stride), str(c), f"{h} x {w}", mean, std])
    figures.draw_features(folder / "features.png", images, maps)
    print(f"\nmaps of {names[0]}\n{run.table(rows)}\nwrote {folder}/run.json, features/, features.png")
    print(f"next: {run.command('02_metrics.py', folder)}")


def main():
    settings = run.parse(__doc__, Settings)
    weights = choose_weights(settings.encoders, settings.weights)
    need(not (settings.images and settings.benchmark), "--images and --benchmark are two sources of pictures: give one")
    if not settings.images:
        settings.benchmark = settings.benchmark or "toycity"
    benchmark = settings.benchmark  # None: a folder of pictures
    working_size(512, 512, settings.size or "512")  # refuses a --size that means nothing
    root, chosen = choose_pictures(settings)
    names, size = chosen["images"], chosen["size"]
    folder = settings.run or Path("runs") / (benchmark or root.resolve().name)
    need(folder.resolve() != root.resolve(), f"{folder} holds the pictures: give another --run")

    todo, encoders = lacking(folder, settings.encoders, root, names), []
    for name in settings.encoders:
        if weights[name] == "none":
            print(f"WARNING: {name} has random weights; its maps say nothing about the trained model")
        if todo[name]:  # a file that does not fit is refused before anything is written
            torch.manual_seed(settings.seed)  # random weights are the same in every run
            encoders.append(load_encoder(name, weights[name], settings.device))
    places = {"data": None if settings.images else str(settings.data.resolve()), "root": str(root.resolve())}
    asked = {"benchmark": benchmark, **places, **chosen}
    asked |= {"encoders": list(settings.encoders), "weights": weights, "seed": settings.seed}
    asked["weights_from"] = {name: weights_origin(name, weights[name]) for name in settings.encoders}
    found = open_run(folder, asked)

    missing = [name for name in names if any(name in of_one for of_one in todo.values())]
    print(f"{len(names)} pictures of {root} for {', '.join(todo)}; {len(missing)} are still to be extracted")
    read = partial(read_picture, root=root, size=size, turn=benchmark is None)  # labels lie on pictures as stored
    pictures = DataLoader(missing, None, collate_fn=read, **run.loader_arguments(settings.workers))
    left_out = extract(encoders, todo, pictures, folder, settings.device)
    usable = [name for name in names if name not in left_out]
    need(usable, f"none of the {len(names)} pictures of {root} can be used")
    run.write_json(folder / "run.json", found | {"left_out": left_out})
    report(folder, found, usable)


if __name__ == "__main__":
    run.start(main)
