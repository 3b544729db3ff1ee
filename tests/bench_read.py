"""Whether reading keeps up with a GPU.

python tests/bench_read.py cityscapes       one sample of 2048 x 1024 without masks, on one core
python tests/bench_read.py coco             the index of 118,287 images: time, and memory with eight forked workers
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import toycity  # noqa: E402
from common.datasets import open_split  # noqa: E402


def cityscapes(root: Path) -> None:
    """A toycity scene twice as large, with the noise of a camera, which decides how long a PNG takes to decode."""
    torch.set_num_threads(1)
    image, _, ids = toycity.scene("train", 0)
    noise = np.random.default_rng(0).integers(-2, 3, (1024, 2048, 3))
    image = np.clip(image.repeat(2, 0).repeat(2, 1) + noise, 0, 255).astype(np.uint8)
    for kind, pixels in (
        ("leftImg8bit", image),
        ("gtFine", ids.repeat(2, 0).repeat(2, 1).astype(np.uint16)),
    ):
        folder = root / "cityscapes" / kind / "train/bonn"
        folder.mkdir(parents=True)
        suffix = "leftImg8bit" if kind == "leftImg8bit" else "gtFine_instanceIds"
        Image.fromarray(pixels).save(folder / f"bonn_000000_000000_{suffix}.png")
    size = (
        root / "cityscapes/leftImg8bit/train/bonn/bonn_000000_000000_leftImg8bit.png"
    ).stat().st_size / 1e6
    samples, took = open_split("cityscapes_instance", root, "train"), []
    for _ in range(15):
        began = time.perf_counter()
        samples[0]
        took.append(time.perf_counter() - began)
    print(
        f"a sample of 2048 x 1024, its PNG {size:.1f} MB: {1000 * np.median(took):.0f} ms (median of {len(took)})"
    )


class Annotations(Dataset):
    """What a worker touches of the index, without the photographs."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return len(self.samples.names[index]) + len(self.samples.coco[index][1])


def memory(pids) -> float:
    """GB of the processes together, what they share counted once (Linux)."""
    return sum(
        int(line.split()[1])
        for pid in pids
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("Pss:")
    ) / 1e6  # fmt: skip


def coco(root: Path, images: int = 118_287, annotations: int = 860_001) -> None:
    rng = np.random.default_rng(0)
    file = root / "coco/annotations/instances_train2017.json"
    for folder in (file.parent, root / "coco/train2017"):
        folder.mkdir(parents=True)
    for i in range(images):
        (root / f"coco/train2017/{i:012d}.jpg").touch()
    with open(file, "w") as out:  # as large as the real one: about 50 numbers a polygon
        entries = (
            {"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640}
            for i in range(images)
        )
        out.write('{"images": [' + ", ".join(map(json.dumps, entries)) + '], "annotations": [')
        owners, counts = (
            np.sort(rng.integers(0, images, annotations)),
            2 * rng.integers(4, 46, annotations),
        )
        pool = (rng.integers(0, 64000, 2_000_000) / 100).tolist()
        for k in range(annotations):
            start = int(rng.integers(0, len(pool) - 200))
            polygon = pool[start : start + int(counts[k])]
            entry = {
                "segmentation": [polygon],
                "area": 900.5,
                "iscrowd": 0,
                "image_id": int(owners[k]),
            }
            entry |= {"bbox": polygon[:4], "category_id": 1, "id": k}
            out.write((", " if k else "") + json.dumps(entry))
        out.write('], "categories": [{"id": 1, "name": "person"}]}')
    before = memory([os.getpid()])
    began = time.perf_counter()
    samples = open_split("coco_instance", root, "train")
    took, peak = time.perf_counter() - began, [memory([os.getpid()])]
    status = Path("/proc/self/status").read_text()
    highest = int(status.split("VmHWM:")[1].split()[0]) / 1e6
    loader = DataLoader(
        Annotations(samples),
        batch_size=64,
        num_workers=8,
        shuffle=True,
        multiprocessing_context="fork",
    )
    batches = iter(loader)
    total = 0
    for i, batch in enumerate(batches):
        total += int(batch.sum())
        if i % 300 == 299:
            peak.append(memory([os.getpid(), *(worker.pid for worker in batches._workers)]))
    assert total > images
    print(
        f"{file.stat().st_size / 1e6:.0f} MB of annotations: index of {len(samples)} images in {took:.0f} s"
    )
    print(
        f"memory: {before:.1f} GB before, at most {highest:.1f} GB while it was made, {peak[0]:.1f} GB after,"
    )
    print(f"        at most {max(peak):.1f} GB together with eight forked workers over one epoch")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cityscapes", "coco"))
    with tempfile.TemporaryDirectory() as folder:
        {"cityscapes": cityscapes, "coco": coco}[parser.parse_args().what](Path(folder))
