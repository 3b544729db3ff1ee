"""Does reading keep up with a GPU?

python tests/bench_read.py cityscapes       one sample of 1024 x 2048 without masks, on one core
python tests/bench_read.py coco             the index of 118,287 images: its time, and the memory
                                            that it takes with eight forked workers
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


def cityscapes(root):
    """Time the reading of a toycity scene that is twice as large.

    It has the noise of a camera, which decides how long a PNG takes to decode.
    """
    torch.set_num_threads(1)
    image, _, ids = toycity.scene("train", 0)
    noise = np.random.default_rng(0).integers(-2, 3, (1024, 2048, 3))
    image = np.clip(image.repeat(2, 0).repeat(2, 1) + noise, 0, 255).astype(np.uint8)
    ids = ids.repeat(2, 0).repeat(2, 1).astype(np.uint16)
    stem = "train/bonn/bonn_000000_000000"
    image_file = root / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png"
    label_file = root / f"cityscapes/gtFine/{stem}_gtFine_instanceIds.png"
    for file, pixels in ((image_file, image), (label_file, ids)):
        file.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(file)
    samples = open_split("cityscapes_instance", root, "train")
    took = []
    for _ in range(15):
        began = time.perf_counter()
        samples[0]
        took.append(time.perf_counter() - began)
    size = image_file.stat().st_size / 1e6
    milliseconds = 1000 * np.median(took)
    print(f"a sample of 1024 x 2048, its PNG {size:.1f} MB: {milliseconds:.0f} ms (median of 15)")


class Annotations(Dataset):
    """What a worker touches of the index, without the photographs."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        files = self.samples.files[index]
        _, masks = self.samples.coco.annotations(files.image_id)
        return len(files.image) + len(masks)


def memory(process_ids):
    """GB of the processes together, of which what they share counts once (Linux)."""
    kilobytes = 0
    for process_id in process_ids:
        for line in Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                kilobytes += int(line.split()[1])
    return kilobytes / 1e6


def write_coco(root, images, annotations):
    """Write a JSON as large as the real one, with about 50 numbers a polygon, and empty images."""
    random = np.random.default_rng(0)
    file = root / "coco/annotations/instances_train2017.json"
    for folder in (file.parent, root / "coco/train2017"):
        folder.mkdir(parents=True)
    entries = []
    for i in range(images):
        name = f"{i:012d}.jpg"
        (root / "coco/train2017" / name).touch()
        entry = {"id": i, "file_name": name, "height": 480, "width": 640}
        entries.append(json.dumps(entry))
    owners = np.sort(random.integers(0, images, annotations))
    lengths = 2 * random.integers(4, 46, annotations)
    pool = (random.integers(0, 64000, 2_000_000) / 100).tolist()
    with open(file, "w") as out:
        out.write('{"images": [' + ", ".join(entries) + '], "annotations": [')
        for k in range(annotations):
            start = int(random.integers(0, len(pool) - 200))
            polygon = pool[start : start + int(lengths[k])]
            entry = {
                "segmentation": [polygon],
                "area": 900.5,
                "iscrowd": 0,
                "image_id": int(owners[k]),
                "bbox": polygon[:4],
                "category_id": 1,
                "id": k,
            }
            out.write((", " if k else "") + json.dumps(entry))
        out.write('], "categories": [{"id": 1, "name": "person"}]}')
    return file


def coco(root, images=118_287, annotations=860_001):
    """Time the index of a data set of COCO's size, and measure the memory of an epoch."""
    file = write_coco(root, images, annotations)
    before = memory([os.getpid()])
    began = time.perf_counter()
    samples = open_split("coco_instance", root, "train")
    took = time.perf_counter() - began
    after = memory([os.getpid()])
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
    together = [after]
    for i, batch in enumerate(batches):
        total += int(batch.sum())
        if i % 300 == 299:
            workers = [worker.pid for worker in batches._workers]
            together.append(memory([os.getpid(), *workers]))
    assert total > images
    size = file.stat().st_size / 1e6
    print(f"{size:.0f} MB of annotations: index of {len(samples)} images in {took:.0f} s")
    print(f"memory: {before:.1f} GB before, at most {highest:.1f} GB while the index was made,")
    print(f"        {after:.1f} GB after,")
    print(f"        at most {max(together):.1f} GB with eight forked workers over one epoch")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cityscapes", "coco"))
    with tempfile.TemporaryDirectory() as folder:
        if parser.parse_args().what == "cityscapes":
            cityscapes(Path(folder))
        else:
            coco(Path(folder))
