"""The benchmarks: what each trains and evaluates on, and the readers of their data sets.

A sample is a dictionary:
    image     uint8 [3, H, W]
    segments  int32 [H, W], 0 void, else 1 + the index into labels and crowd
    labels    int64 [S], contiguous class indices
    crowd     bool [S], regions of several things of one class that nobody told apart
    image_id  int, its place in the split;  name  str, the picture's path relative to the data set's folder
    truth     {score: what that score's update takes}, on validation splits
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from common import toycity
from common.run import UserError

PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

# Cityscapes' 19 evaluated classes in train-id order: (raw label id, name, is it a thing?)
CITYSCAPES = [
    (7, "road", False), (8, "sidewalk", False), (11, "building", False), (12, "wall", False), (13, "fence", False),
    (17, "pole", False), (19, "traffic light", False), (20, "traffic sign", False), (21, "vegetation", False),
    (22, "terrain", False), (23, "sky", False), (24, "person", True), (25, "rider", True), (26, "car", True),
    (27, "truck", True), (28, "bus", True), (31, "train", True), (32, "motorcycle", True), (33, "bicycle", True),
]  # fmt: skip
CITYSCAPES_THINGS = [entry for entry in CITYSCAPES if entry[2]]
TOYCITY = [entry for entry in CITYSCAPES if entry[0] in (7, 8, 11, 17, 21, 23, 24, 26, 27)]


@dataclass(frozen=True)
class Benchmark:
    trains_on: str  # folder under the data root, and split
    evaluates_on: str
    task: str  # "semantic", "instance" or "panoptic": what a segment is
    measures: tuple[str, ...]
    paper: str = "-"  # the paper's number, in percent
    categories: list | None = None  # as above; None where no reader is written yet
    size: str = "512x1024"  # of the pictures that stage 1 extracts


ON_CITYSCAPES = ("cityscapes val", "instance", ("AP",))
BENCHMARKS = {
    "toycity": Benchmark("toycity train", "toycity val", "panoptic", ("mIoU", "AP", "PQ"), categories=TOYCITY),
    "cityscapes_semantic": Benchmark(
        "cityscapes train", "cityscapes val", "semantic", ("mIoU",), "82.8", categories=CITYSCAPES
    ),
    "cityscapes_instance": Benchmark("cityscapes train", *ON_CITYSCAPES, "39.5", categories=CITYSCAPES_THINGS),
    "coco_instance": Benchmark("coco train2017", "coco val2017", "instance", ("AP",), "47.3", size="512"),
    "coco_panoptic": Benchmark("coco train2017", "coco val2017", "panoptic", ("PQ",), "56.9", size="512"),
    "ade20k_semantic": Benchmark(
        "ADEChallengeData2016 training", "ADEChallengeData2016 validation", "semantic", ("mIoU",), "57.5", size="512"
    ),
    "kitti360_instance": Benchmark("KITTI-360 train", "KITTI-360 val", "instance", ("AP",), "21.9"),
    "urbansyn_to_cityscapes_instance": Benchmark("urbansyn train", *ON_CITYSCAPES, "32.5 (ViT-L)"),
    "synscapes_to_cityscapes_instance": Benchmark("synscapes train", *ON_CITYSCAPES, "33.4 (ViT-L)"),
    "synthia_to_cityscapes_instance": Benchmark("synthia train", *ON_CITYSCAPES),
}


def find_benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def on_disk(benchmark: Benchmark, data: Path) -> bool:
    return all((data / where.split()[0]).is_dir() for where in (benchmark.trains_on, benchmark.evaluates_on))


def open_split(name: str, data: Path, part: str) -> "Cityscapes":
    """The data set of a benchmark's `part`, "train" or "val"; toycity is written to disk when it is first asked for.

    Raises UserError where the data is missing or no reader exists for it.
    """
    benchmark = find_benchmark(name)
    folder, split = (benchmark.trains_on if part == "train" else benchmark.evaluates_on).split()
    if name == "toycity":
        toycity.write(data / "toycity")
    if benchmark.categories is None:
        raise UserError(f"{name} has no reader yet: only toycity and Cityscapes can be read so far")
    if not (data / folder).is_dir():
        raise UserError(f"{name} needs {data / folder}, which is not there: say where your data sets are with --data")
    return Cityscapes(data / folder, split, benchmark.categories, benchmark.task, with_truth=part == "val")


class Cityscapes(Dataset):
    """A split in Cityscapes' layout, read into samples (see the top of this file).

    categories: [(raw label id, name, is it a thing?)] of the classes that count, in contiguous order; the rest is void.
    task: "semantic" makes one segment of each class in the image, "instance" one of each thing, "panoptic" one of each
    stuff class and each thing. Raises UserError for a missing folder, a missing pair or an unreadable file.
    """

    def __init__(self, root: Path, split: str, categories: list, task: str, with_truth: bool = False):
        self.root, self.categories, self.task, self.with_truth = root, categories, task, with_truth
        pictures = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        self.names = [path.relative_to(root).as_posix() for path in pictures]
        if not pictures:
            raise UserError(f"no pictures: expected {root}/leftImg8bit/{split}/<city>/*_leftImg8bit.png")
        for name in self.names:
            if not self.label_path(name).is_file():
                raise UserError(f"{root / name} has no labels: expected {self.label_path(name)}")

    def label_path(self, name: str) -> Path:
        """instanceIds hold the label ids too: id*1000 + n for a thing, the bare id for stuff, groups and void."""
        stem = name.replace("leftImg8bit/", "gtFine/", 1).removesuffix("_leftImg8bit.png")
        return self.root / f"{stem}_gtFine_instanceIds.png"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        image = read_image(self.root / name)
        ids = _open(self.label_path(name), lambda file: np.asarray(file).astype(np.int32))  # [H, W]
        if ids.shape != image.shape[1:]:
            raise UserError(f"{self.label_path(name)} is {ids.shape}, its picture {tuple(image.shape[1:])}")
        class_of = {raw: index for index, (raw, _, _) in enumerate(self.categories)}
        present = np.flatnonzero(np.bincount(ids.ravel()))  # far faster than np.unique on small integers
        segment_of = np.zeros(present[-1] + 1, np.int32)
        target_of = np.full(present[-1] + 1, 255, np.uint8)
        labels, crowd, first_of_class = [], [], {}
        for value in present:
            raw = value // 1000 if value >= 1000 else value
            if raw not in class_of:
                continue
            label = class_of[raw]
            target_of[value] = label
            merged = self.task == "semantic" or not self.categories[label][2]  # one segment for the whole class
            if merged and label in first_of_class:
                segment_of[value] = first_of_class[label]
                continue
            labels.append(label)
            crowd.append(not merged and value < 1000)
            segment_of[value] = first_of_class[label] = len(labels)
        sample = {
            "image": image,
            "segments": torch.from_numpy(segment_of[ids]),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "crowd": torch.tensor(crowd, dtype=torch.bool),
            "image_id": index,
            "name": name,
        }
        if self.with_truth:
            segments = [
                {"id": i + 1, "category_id": self.categories[label][0], "iscrowd": int(crowd[i])}
                for i, label in enumerate(labels)
            ]
            semantic = torch.from_numpy(target_of[ids])  # uint8 [H, W], 255 ignored
            sample["truth"] = {"semantic": (semantic,), "panoptic": (sample["segments"], segments)}
        return sample


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


def _open(path: Path, read):
    try:
        with Image.open(path) as file:
            return read(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # missing, foreign, cut short
        raise UserError(f"{path} cannot be read as a picture ({error})") from None


def read_image(path: Path) -> torch.Tensor:
    """uint8 [3, H, W], sRGB, as a viewer shows it: turned as its EXIF tag says, transparency on white.

    UserError names a file that is missing, truncated or no picture. Colour profiles are ignored, as they are in the
    training of every encoder here.
    """
    return torch.from_numpy(_open(path, _rgb)).permute(2, 0, 1).contiguous()


def _rgb(file: Image.Image) -> np.ndarray:
    if file.mode in ("I", "F"):
        raise ValueError("its numbers have more than 16 bits, which no screen shows")
    ImageOps.exif_transpose(file, in_place=True)
    if file.mode.startswith("I;16"):  # convert() would cut all above 255
        grey = (np.asarray(file) / 257 + 0.5).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if file.has_transparency_data:
        file = file.convert("RGBA")
        file = Image.alpha_composite(Image.new("RGBA", file.size, "white"), file)
    return np.array(file.convert("RGB"))


def working_size(height: int, width: int, size: str) -> tuple[int, int]:
    """Height and width, multiples of 32, at which a picture enters the encoders.

    size: "512x1024", or "512": that short side with the aspect kept.
    """
    try:
        sides = [int(side) for side in size.split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 32:
        raise UserError(f"--size {size!r} is neither HEIGHTxWIDTH nor a short side, in pixels, at least 32")
    if len(sides) == 1:
        scale = sides[0] / min(height, width)
        sides = [height * scale, width * scale]
    return tuple(max(32, round(side / 32) * 32) for side in sides)


def resize_image(image: torch.Tensor, size: str) -> torch.Tensor:
    """uint8 [3, H, W] -> float32 [3, h, w] in [0, 1] at the working size, bilinear with antialiasing."""
    return TF.resize(image, working_size(*image.shape[1:], size), antialias=True).float() / 255
