"""What does stage 1 cost beside the bare encoder, for reading images and writing features?

    python tests/bench_extract.py                 sam2_b, random weights, 8 images of 512 x 1024
    python tests/bench_extract.py --encoder dinov3_b --device cuda --images 200

Three things are timed in turn, six times each: the encoder's forward pass alone over images in
memory, stage 1's loop without its writing, and the loop as it is. The loop reads PNGs of
1024 x 2048. The writing is timed by itself too, as a bound where the machine's noise is larger than
the difference. At last the whole stage shows how soon it finds that nothing is left to do.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import toycity  # noqa: E402
from common.encoders import load_encoder  # noqa: E402
from common.images import read_image, resize_image  # noqa: E402

stage1 = importlib.import_module("01_extract")
SIZE = "512x1024"


def draw_images(folder, count):
    """Write toycity scenes twice as large, with the noise of a camera. Returns their names."""
    folder.mkdir()
    names = []
    for i in range(count):
        scene = toycity.scene("val", i % 8)[0].repeat(2, 0).repeat(2, 1)
        noise = np.random.default_rng(i).integers(-2, 3, scene.shape)
        names.append(f"{i:04}.png")
        noisy = np.clip(scene + noise, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / names[-1])
    return names


@torch.inference_mode()
def bare(encoder, images, device):
    """Seconds of the encoder's forward pass over images [3, H, W] in memory."""
    began = time.perf_counter()
    for image in images:
        maps = encoder(image[None].to(device))
        next(iter(maps.values())).cpu()
    return time.perf_counter() - began


def time_loops(encoder, images, loader, folder, device):
    """Seconds of each way to go over the images, and of each file's writing."""
    write_features = stage1.write_features
    writing = []

    def write_nothing(*content):
        pass

    def write_timed(*content):
        began = time.perf_counter()
        write_features(*content)
        writing.append(time.perf_counter() - began)

    took = {"bare encoder": [], "stage 1 without writing": [], "stage 1": []}
    writers = [("stage 1 without writing", write_nothing), ("stage 1", write_timed)]
    missing = {encoder.name: set(loader.dataset.names)}
    for _ in range(6):
        took["bare encoder"].append(bare(encoder, images, device))
        for kind, writer in writers:
            stage1.write_features = writer
            began = time.perf_counter()
            stage1.extract([encoder], missing, loader, folder, device)
            took[kind].append(time.perf_counter() - began)
        writers.reverse()
    return took, writing


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="sam2_b")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "images"
        folder = Path(scratch) / "run"
        names = draw_images(root, args.images)
        torch.manual_seed(0)
        encoder = load_encoder(args.encoder, "none", args.device)
        few = [resize_image(read_image(root / name), SIZE) for name in names[:8]]
        in_memory = [few[i % len(few)] for i in range(args.images)]
        bare(encoder, in_memory[:2], args.device)
        images = stage1.Images(root, names, SIZE, exif=True)
        loader = DataLoader(images, batch_size=None, num_workers=args.workers)
        took, writing = time_loops(encoder, in_memory, loader, folder, args.device)

        least = {kind: min(seconds) for kind, seconds in took.items()}
        for kind, seconds in least.items():
            share = 100 * least["bare encoder"] / seconds
            each = 1000 * seconds / args.images
            name = f"{args.encoder}, {kind:24}"
            print(f"{name}{each:8.0f} ms an image, {share:.1f} % of the throughput")
        cost = 100 * (1 - least["stage 1 without writing"] / least["stage 1"])
        print(f"writing costs {cost:.1f} % of the throughput")
        each = 1000 * np.median(writing)
        print(f"an image takes the writing thread {each:.0f} ms, waiting for a GPU included")
        command = [sys.executable, "01_extract.py", "--images", root, "--run", folder]
        command += ["--size", SIZE, "--encoders", args.encoder, "--weights", "none"]
        command += ["--limit", str(args.images)]
        began = time.perf_counter()
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
        seconds = time.perf_counter() - began
        print(f"the stage as a command, with all features there: {seconds:.1f} s")


if __name__ == "__main__":
    main()
