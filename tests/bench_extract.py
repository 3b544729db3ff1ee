"""What stage 1 costs beside the bare encoder: reading pictures and writing features, on the same pictures.

    python tests/bench_extract.py                              sam2_b with random weights, 8 pictures of 512 x 1024
    python tests/bench_extract.py --encoder dinov3_b --device cuda --images 200

Timed in turn, six times: the encoder's forward alone over pictures in memory, stage 1's loop, which reads PNGs of
1024 x 2048, without its writing, and the loop as it is; and the writing by itself, which is a bound where the machine's
noise is larger than that difference. Then the whole stage, to see how soon it finds nothing to do.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import toycity  # noqa: E402
from common.datasets import read_image, resize_image  # noqa: E402
from common.encoders import load_encoder  # noqa: E402

stage1 = importlib.import_module("01_extract")


@torch.inference_mode()
def bare(encoder, images, device) -> float:
    began = time.perf_counter()
    for image in images:
        maps = encoder(image[None].to(device))
        next(iter(maps.values())).cpu()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="sam2_b")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, scratch = Path(folder) / "pictures", Path(folder) / "run"
        root.mkdir()
        for i in range(args.images):
            scene = toycity.scene("val", i % 8)[0].repeat(2, 0).repeat(2, 1)
            noise = np.random.default_rng(i).integers(-2, 3, scene.shape)
            Image.fromarray(np.clip(scene + noise, 0, 255).astype(np.uint8)).save(
                root / f"{i:04}.png"
            )
        names = sorted(path.name for path in root.iterdir())
        torch.manual_seed(0)
        encoder = load_encoder(args.encoder, "none", args.device)
        images = [resize_image(read_image(root / name), "512x1024") for name in names[:8]]
        images = [images[i % len(images)] for i in range(args.images)]
        bare(encoder, images[:2], args.device)
        read, n, write = (
            partial(stage1.read_picture, root=root, size="512x1024", turn=True),
            args.images,
            stage1.write,
        )
        pictures = DataLoader(names, batch_size=None, num_workers=args.workers, collate_fn=read)
        scratch.mkdir()
        took = {"bare encoder": [], "stage 1 without writing": [], "stage 1": []}
        writing = []

        def timed(path, *content):
            began = time.perf_counter()
            write(path, *content)
            writing.append(time.perf_counter() - began)

        writers = [("stage 1 without writing", lambda *content: None), ("stage 1", timed)]
        for _ in range(6):
            took["bare encoder"].append(bare(encoder, images, args.device))
            for kind, stage1.write in writers:
                began = time.perf_counter()
                stage1.extract(
                    [encoder], {args.encoder: set(names)}, pictures, scratch, args.device
                )
                took[kind].append(time.perf_counter() - began)
            writers.reverse()
        least = {kind: min(seconds) for kind, seconds in took.items()}
        for kind, seconds in least.items():
            share = 100 * least["bare encoder"] / seconds
            print(
                f"{args.encoder}, {kind:24}{1000 * seconds / n:8.0f} ms a picture, {share:.1f} % of the throughput"
            )
        cost = 100 * (1 - least["stage 1 without writing"] / least["stage 1"])
        print(f"writing costs {cost:.1f} % of the throughput")
        print(
            f"a picture takes the writing thread {1000 * np.median(writing):.0f} ms, waiting for a GPU included"
        )
        command = [
            sys.executable,
            "01_extract.py",
            "--images",
            root,
            "--run",
            scratch,
            "--size",
            "512x1024",
        ]
        command += ["--encoders", args.encoder, "--weights", "none", "--limit", str(n)]
        began = time.perf_counter()
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
        print(
            f"the stage as a command, everything done before: {time.perf_counter() - began:.1f} s"
        )


if __name__ == "__main__":
    main()
