"""What fusion costs a training step: the master alone, fused, and both encoders run naively.

    python tests/bench_train.py                 on a CPU, one image of 512 x 1024, three rounds
    python tests/bench_train.py --device cuda --batch-size 3 --rounds 66
    python tests/bench_train.py --device cuda --batch-size 3 --size 1024x1024 --channels-last

The master is dinov3_b, the auxiliary sam2_b at output stride 16, both with random weights. Decoder
and loss are those of the full recipes, with AdamW, and bfloat16 on a GPU. "naive" runs the
auxiliary through all its stages and keeps its gradients.

The variants take their steps in turn, so that what else a machine does falls on all alike. Reported
is the median. Peak memory is that of two steps in a process of its own. On a GPU the first loss is
printed beside the CPU's in float32, from the same weights and images. The loss samples points at
random, so the two agree to about a hundredth.
"""

import argparse
import dataclasses
import importlib
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.encoders import load_encoder  # noqa: E402
from common.model import FusedModel, FusedPyramid  # noqa: E402

stage4 = importlib.import_module("04_train")
VARIANTS = ("master alone", "fused", "naive")


def build_variant(variant):
    recipe = stage4.Recipe()
    master = load_encoder("dinov3_b", "none")
    if variant == "master alone":
        auxiliary = None
        stride = None
        fusion = "none"
    else:
        auxiliary = load_encoder("sam2_b", "none")
        stride = 16
        fusion = "replace"
    aux_mode = "frozen"
    if variant == "naive":
        aux_mode = "finetuned"
        auxiliary.truncate = lambda stride: None
    modes = ("finetuned", aux_mode)
    pyramid = FusedPyramid(master, auxiliary, stride, fusion, recipe.level_channels, modes)
    return FusedModel(pyramid, 19, dataclasses.asdict(recipe))


class Trainee:
    """One variant with its optimiser, and a batch of random images.

    Each image has twelve segments, side by side.
    """

    def __init__(self, variant: str, args):
        torch.manual_seed(0)
        self.device = args.device
        self.is_gpu = args.device == "cuda"
        self.losses = []
        self.model = build_variant(variant).to(self.device).train()
        self.optimiser = stage4.make_optimiser(self.model, stage4.Recipe())
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"]
        height, width = map(int, args.size.split("x"))
        self.images = torch.rand(args.batch_size, 3, height, width).to(self.device)
        if args.channels_last:
            self.model.to(memory_format=torch.channels_last)
            self.images = self.images.to(memory_format=torch.channels_last)
        labels = torch.arange(12, device=self.device)
        segments = torch.arange(width, device=self.device) * 12 // width  # [W]
        masks = (segments == labels[:, None, None]).expand(12, height, width).float()
        self.masks = [masks] * args.batch_size
        self.labels = [labels] * args.batch_size

    def step(self) -> float:
        """Seconds of one training step, as in stage 4."""
        torch.set_float32_matmul_precision("high" if self.is_gpu else "highest")
        began = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.is_gpu):
            outputs = self.model(self.images)
        loss = sum(self.model.losses(outputs, self.masks, self.labels).values())
        self.losses.append(loss.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.01)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.is_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began


def memory_of(variant: str, args) -> float:
    """Peak memory of two steps, in GB."""
    trainee = Trainee(variant, args)
    trainee.step()
    trainee.step()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # on Linux, kilobytes


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--size", default="512x1024")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()

    memory = {}
    for variant in VARIANTS:  # each in a fresh process
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            memory[variant] = pool.submit(memory_of, variant, args).result()

    trainees = {variant: Trainee(variant, args) for variant in VARIANTS}
    seconds = {variant: [] for variant in VARIANTS}
    for _ in range(1 + args.rounds):  # the first is to warm up
        for variant, trainee in trainees.items():
            seconds[variant].append(trainee.step())
    median = {variant: np.median(times[1:]) for variant, times in seconds.items()}

    what = f"{args.device}, batch size {args.batch_size}, {args.size}"
    print(f"{what}, median of {args.rounds} steps, random weights")
    for variant in VARIANTS:
        ratio = median[variant] / median["master alone"]
        line = f"{variant:14}{median[variant]:9.3f} s a step {ratio:6.2f} x the master alone"
        print(f"{line} {memory[variant]:7.2f} GB")
    print(f"naive takes {median['naive'] / median['fused']:.2f} times as long as fused")
    if args.device == "cuda":
        losses = trainees["fused"].losses
        args.device = "cpu"
        on_cpu = Trainee("fused", args)
        on_cpu.step()
        first = f"first loss {losses[0]:.3f}, on the CPU {on_cpu.losses[0]:.3f}"
        print(f"fused, {first}; last {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
