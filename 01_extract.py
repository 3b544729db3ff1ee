"""Stage 1: run frozen encoders over images and keep their feature maps.

    python 01_extract.py                                   the shipped example, toycity
    python 01_extract.py --images holiday/ --encoders dinov3_b sam2_b        no labels needed
    python 01_extract.py --benchmark cityscapes_instance --data /datasets --encoders dinov3_b sam2_b
    python 01_extract.py --benchmark own_semantic --data fields/ --encoders dinov3_b sam2_b

Each image is resized to a working size and passes once through each encoder. The feature maps are
stored in float16, at the strides that the encoder itself has (its native strides). Complete files
are kept, so an interrupted run goes on where it stopped, and after a name is added to --encoders
only that encoder runs. An image that cannot be read is named and left out.

With --benchmark own_… all labels are checked first, and the images keep their size if none of them
has a short side above 512 pixels. Other images get a short side of 512, or the benchmark's size.

Writes run.json, features/<encoder>/<image>.safetensors and features.png to the run folder.
"""

import importlib.metadata
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import figures, own_data, run
from common.datasets import BENCHMARKS, find_benchmark, open_split
from common.encoders import ENCODERS, load_encoder, weights_origin
from common.images import list_images, read_image, read_run_image, resize_image, working_size
from common.run import CORES, DEVICES, UserError, flag, natural, positive, require

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

ENCODER_NAMES = ", ".join(ENCODERS)
# Their versions stand in run.json.
PACKAGES = ("torch", "torchvision", "timm", "sam2", "transformers", "numpy")
SIZE_HELP = (
    "512x1024 (height x width), 512 (short side), 800/1333 (short side, limit of the long side) "
    "or original (default: the benchmark's, or 512)"
)


@dataclass
class Settings:
    run: Path | None = flag(
        None, "run folder (default: runs/ and the benchmark's or folder's name)"
    )
    benchmark: str | None = flag(None, f"{', '.join(BENCHMARKS)} (default: toycity)")
    images: Path | None = flag(None, "take the images of a folder instead", metavar="FOLDER")
    data: Path = flag(
        Path("data"), "folder that holds the data sets; with own_… the folder of that data set"
    )
    encoders: tuple[str, ...] = flag(
        ("tiny_vit", "tiny_hiera"), f"{ENCODER_NAMES}, or timm:NAME", metavar="NAME", nargs="+"
    )
    weights: tuple[str, ...] = flag(
        ("pretrained",), "pretrained, none (random) or NAME=FILE", metavar="WHICH", nargs="+"
    )
    limit: int | None = flag(
        None, "images at most (default: 24 of toycity, else 200)", type=positive
    )
    size: str | None = flag(None, SIZE_HELP)
    seed: int = flag(0, "seed of all random numbers, in stages 2 and 4 too", type=natural)
    device: str = flag(DEVICES[0], choices=DEVICES)
    workers: int = flag(CORES, "processes that read images", type=natural)


def choose_weights(encoders, options):
    """--weights as {encoder: "pretrained", "none" or a file}. UserError for an unknown option."""
    require(len(set(encoders)) == len(encoders), f"--encoders names one twice: {encoders}")
    weights = dict.fromkeys(encoders, "pretrained")
    files = {}
    for option in options:
        name, _, file = option.partition("=")
        if option in ("pretrained", "none"):
            weights = dict.fromkeys(encoders, option)
        else:
            require(
                file and name in encoders,
                f"--weights {option}: expected pretrained, none, or NAME=FILE with NAME one of "
                "--encoders",
            )
            files[name] = str(Path(file).resolve())
    weights.update(files)  # NAME=FILE has priority over "pretrained" and "none"
    return weights


# ------------------------------------------------------------------ images
def choose_images(settings):
    """Choose the images that go through the encoders.

    Returns their root folder and what run.json says of them: their names below it, their size, and
    for people's own data sets the images held out for validation.
    """
    chosen = {}
    if settings.images:
        root = settings.images
        names = list_images(root)
        size = "512"
    else:
        train = open_split(settings.benchmark, settings.data, "train")
        root = train.root
        names = train.names
        size = find_benchmark(settings.benchmark).size
        if settings.benchmark.startswith("own_"):
            val = open_split(settings.benchmark, settings.data, "val")
            largest_short_side = own_data.check_labels(train, val, settings.workers)
            chosen["held_out"] = sorted(val.held_out)
            if largest_short_side <= 512:
                size = "original"
    limit = settings.limit or (24 if settings.benchmark == "toycity" else 200)
    chosen["images"] = run.evenly_spaced(names, limit)
    chosen["size"] = settings.size or size
    return root, chosen


class ReadImage(NamedTuple):
    name: str
    image: torch.Tensor | None  # float32 [3, H, W] in [0, 1], at its working size
    version: str = ""  # of the file
    error: str = ""  # why the image cannot be used


class Images(Dataset):
    """The images of a run, for a DataLoader."""

    def __init__(self, root, names, size, exif):
        self.root = root
        self.names = names
        self.size = size
        self.exif = exif  # turn images by their EXIF tag? Not if there are labels: see read_image()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        name = self.names[index]
        path = self.root / name
        try:
            check_name(path, name)
            version = file_version(path)
            image = read_image(path, self.exif)
            height, width = image.shape[1:]
            too_elongated = max(height, width) > 16 * min(height, width)
            advice = "too long for its aspect to be kept: give --size HxW"
            usable = "x" in self.size or not too_elongated
            require(usable, f"{path} is {height} x {width}, {advice}")
            return ReadImage(name, resize_image(image, self.size), version)
        except (UserError, OSError) as error:
            return ReadImage(name, None, error=str(error))


def check_name(path, name):
    """UserError for a name under which no feature file can be written."""
    try:
        # File systems allow 255 bytes, and the endings need some.
        parts = name.encode().split(b"/")
        fits = max(map(len, parts)) <= 200
    except UnicodeEncodeError:  # bytes that are no UTF-8
        fits = False
    require(
        fits,
        f"{ascii(str(path))}: its name is too long for a feature file, or not valid UTF-8: "
        "rename it",
    )


def file_version(path):
    """Size and time of a file: they tell whether it has changed since its features were made."""
    status = path.stat()
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"


# ------------------------------------------------------------------ run folder
def find_missing(folder, encoders, root, names):
    """Which feature files are still to be made: {encoder: set of image names}.

    A damaged file counts, and so does that of an image that has changed. Both are named.
    """
    missing = {encoder: set() for encoder in encoders}
    for name in names:
        image_path = root / name
        version = file_version(image_path) if image_path.is_file() else None
        for encoder in encoders:
            path = run.feature_path(folder, encoder, name)
            if not os.path.isfile(path):  # Path.is_file raises an error for a name that is too long
                missing[encoder].add(name)
                continue
            try:
                # safe_open refuses a file whose length is not what its header says.
                with safe_open(path, "np") as file:
                    made_from = (file.metadata() or {}).get("image")
                problem = None
                if made_from != version:
                    problem = f"{image_path} has changed since its features were made"
            except (SafetensorError, OSError) as error:
                problem = f"it is damaged ({error})"
            if problem:
                print(f"extracting {path} again: {problem}")
                missing[encoder].add(name)
    return missing


def open_run(folder, config):
    """Write run.json, or check that the one there asks for the same, apart from added encoders.

    Returns run.json's content. UserError if it differs.
    """
    # A run.json without features/ is of a run that stored nothing yet: it may be overwritten.
    if (folder / "run.json").is_file() and (folder / "features").is_dir():
        before = run.read_stage(folder, "run.json", "01_extract.py")
        # If encoders are only added, the settings of the earlier ones must be as they were.
        compared = dict(config)
        adds_encoders = set(before["encoders"]) < set(config["encoders"])
        if adds_encoders:
            compared["encoders"] = before["encoders"]
            for key in ("weights", "weights_from"):
                compared[key] = {encoder: config[key][encoder] for encoder in before["encoders"]}
        advice = "give another --run, or delete it"
        run.refuse_other_settings(folder, before, compared, advice)
        if not adds_encoders:
            return before
    run.write_json(folder / "run.json", config)
    return config


# ------------------------------------------------------------------ extraction
@torch.inference_mode()
def extract(encoders, missing, loader, folder, device):
    """Write the feature files that are missing, one for each image and encoder.

    loader: yields ReadImages, one at a time, as their sizes may differ. Returns {image: reason} of
    those that cannot be used.
    """
    left_out = {}
    waiting = []
    # Files are written in a thread while the encoders run on. A few may wait for it.
    with ThreadPoolExecutor(1) as writer:
        for read in tqdm(loader, "extracting", unit="image", disable=len(loader) == 0):
            if read.error:
                left_out[read.name] = read.error
                tqdm.write(f"left out: {read.error}")
                continue
            image = read.image[None].to(device, non_blocking=True)
            for encoder in encoders:
                if read.name not in missing[encoder.name]:
                    continue
                native = encoder(image)  # {native stride: [1, C, h, w]}
                path = run.feature_path(folder, encoder.name, read.name)
                waiting.append(writer.submit(write_features, path, native, read.version))
            while len(waiting) > 4 * len(encoders):
                waiting.pop(0).result()
        for written in waiting:
            written.result()
    return left_out


def write_features(path, native, version):
    """Write an image's feature maps {native stride: [1, C, h, w]}, with the image's version."""
    arrays = {}
    for stride, features in native.items():
        # NumPy, as this is a thread: PyTorch would start further threads for it.
        exact = np.ascontiguousarray(features[0].cpu().numpy())
        with np.errstate(over="ignore"):
            half = exact.astype(np.float16)
        # A map beyond the range of float16 stays in float32.
        arrays[str(stride)] = half if np.isfinite(half).all() else exact
    with run.whole_file(path) as temporary:
        temporary.write_bytes(save(arrays, {"image": version}))


# ------------------------------------------------------------------ the stage
def report(folder, run_config, names):
    """Print a row for each map of the first image, and draw three images' maps in colours."""
    shown = run.evenly_spaced(names, 3)
    images = [read_run_image(run_config, name) for name in shown]
    maps = {}  # {title: for each image {stride: [C, h, w]}}
    rows = [["encoder", "stride", "channels", "map", "mean", "std"]]
    for encoder in run_config["encoders"]:
        is_random = run_config["weights"][encoder] == "none"
        title = f"{encoder}, RANDOM WEIGHTS" if is_random else encoder
        maps[title] = [run.read_features(folder, encoder, name) for name in shown]
        for stride, features in maps[title][0].items():
            channels, height, width = features.shape
            mean = run.number(features.float().mean().item(), 3)
            std = run.number(features.float().std().item(), 3)
            rows.append([title, str(stride), str(channels), f"{height} x {width}", mean, std])
    figures.draw_features(folder / "features.png", images, maps)
    print(f"\nmaps of {shown[0]}\n{run.table(rows)}")
    print(f"wrote {folder}/run.json, features/, features.png")
    if run_config["benchmark"] and len(run_config["encoders"]) == 1:
        alone = f"{run.command('04_train.py', folder)} --fusion none"
        print(f"to train this encoder without fusion: {alone}")
    print(f"next: {run.command('02_metrics.py', folder)}")


def main():
    settings = run.parse(__doc__, Settings)
    weights = choose_weights(settings.encoders, settings.weights)
    require(
        not (settings.images and settings.benchmark),
        "--images and --benchmark are two sources of images: give one",
    )
    if not settings.images:
        settings.benchmark = settings.benchmark or "toycity"
    if settings.size:
        working_size(512, 512, settings.size)  # UserError for a size that means nothing
    root, chosen = choose_images(settings)
    names = chosen["images"]
    folder = settings.run or Path("runs", settings.benchmark or root.resolve().name)
    is_root = folder.resolve() == root.resolve()
    require(not is_root, f"{folder} holds the images: give another --run")

    missing = find_missing(folder, settings.encoders, root, names)
    encoders = []
    for name in settings.encoders:
        if weights[name] == "none":
            print(f"WARNING: {name} has random weights: its maps say nothing about a trained model")
        # A weights file that does not fit is refused here, before anything is written.
        if missing[name]:
            torch.manual_seed(settings.seed)  # random weights are the same in every run
            encoders.append(load_encoder(name, weights[name], settings.device))
    config = {
        "benchmark": settings.benchmark,
        "data": None if settings.images else str(settings.data.resolve()),
        "root": str(root.resolve()),
        **chosen,
        "encoders": list(settings.encoders),
        "weights": weights,
        "weights_from": {name: weights_origin(name, weights[name]) for name in settings.encoders},
        "seed": settings.seed,
    }
    run_config = open_run(folder, config)

    all_missing = set().union(*missing.values())
    todo = [name for name in names if name in all_missing]
    encoder_names = ", ".join(settings.encoders)
    print(f"{len(names)} images of {root} for {encoder_names}: {len(todo)} are to be extracted")
    images = Images(root, todo, chosen["size"], exif=settings.benchmark is None)
    loader = DataLoader(images, batch_size=None, **run.loader_arguments(settings.workers))
    left_out = extract(encoders, missing, loader, folder, settings.device)
    usable = [name for name in names if name not in left_out]
    require(usable, f"none of the {len(names)} images of {root} can be used")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    run_config.setdefault("versions", versions)  # of the start that made the features
    run_config["left_out"] = left_out
    run.write_json(folder / "run.json", run_config)
    report(folder, run_config, usable)


if __name__ == "__main__":
    run.start(main)
