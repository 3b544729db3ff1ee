"""What fusion costs a training step: the master alone, fused, and both encoders run naively.

    python tests/bench_train.py                                           CPU, one picture of 512 x 1024, three rounds
    python tests/bench_train.py --device cuda --batch 3 --rounds 66
    python tests/bench_train.py --device cuda --batch 3 --rounds 20 --size 1024x1024 --channels-last

dinov3_b as master and sam2_b as auxiliary at OS 16, random weights, the decoder and loss of the full recipes, AdamW,
bfloat16 on a GPU. "naive" runs the auxiliary through all its stages and keeps its gradients. The variants take their
steps in turn, so that a machine's moods fall on all alike; reported is the median. Peak memory is that of two steps in
a process of its own. On a GPU the first loss is printed beside the CPU's in float32, from the same weights and pictures
(the loss samples points at random, so the two agree to about a hundredth).
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


class Trainee:
    """One variant with its optimiser, and a batch of random pictures with twelve segments each, side by side."""

    def __init__(self, variant: str, args):
        torch.manual_seed(0)
        self.device, self.quick, self.losses = args.device, args.device == "cuda", []
        master = load_encoder("dinov3_b", "none")
        auxiliary = None if variant == "master alone" else load_encoder("sam2_b", "none")
        if variant == "naive":
            auxiliary.cut = lambda stride: None
        recipe, modes = stage4.Recipe(), ("ft", "ft" if variant == "naive" else "fz")
        fusion = "none" if variant == "master alone" else "replace"
        pyramid = FusedPyramid(master, auxiliary, 16, fusion, recipe.vit_widths, modes)
        self.model = FusedModel(pyramid, 19, dataclasses.asdict(recipe)).to(self.device).train()
        self.optimiser = stage4.make_optimiser(self.model, recipe)
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"]
        height, width = map(int, args.size.split("x"))
        self.images = torch.rand(args.batch, 3, height, width).to(self.device)
        if args.channels_last:
            self.model.to(memory_format=torch.channels_last)
            self.images = self.images.to(memory_format=torch.channels_last)
        segments = torch.arange(width, device=self.device) * 12 // width
        masks = (
            (segments == torch.arange(12, device=self.device)[:, None, None])
            .expand(12, height, width)
            .float()
        )
        self.truth = [masks] * args.batch, [torch.arange(12, device=self.device)] * args.batch

    def step(self) -> float:
        """Seconds of one training step, as in stage 4."""
        torch.set_float32_matmul_precision("high" if self.quick else "highest")
        began = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.quick):
            outputs = self.model(self.images)
        loss = sum(self.model.losses(outputs, *self.truth).values())
        self.losses.append(loss.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.01)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def memory_of(variant: str, args) -> float:
    trainee = Trainee(variant, args)
    trainee.step()
    trainee.step()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # on Linux, kilobytes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
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
    step = {variant: np.median(times[1:]) for variant, times in seconds.items()}
    print(
        f"{args.device}, batch {args.batch}, {args.size}, median of {args.rounds} steps, random weights"
    )
    for variant in VARIANTS:
        ratio = step[variant] / step["master alone"]
        print(
            f"{variant:14}{step[variant]:9.3f} s a step {ratio:6.2f} x the master alone {memory[variant]:7.2f} GB"
        )
    print(f"naive takes {step['naive'] / step['fused']:.2f} times as long as fused")
    if args.device == "cuda":
        losses = trainees["fused"].losses
        args.device = "cpu"
        on_cpu = Trainee("fused", args)
        on_cpu.step()
        print(
            f"fused, first loss {losses[0]:.3f}, on the CPU {on_cpu.losses[0]:.3f}; last {losses[-1]:.3f}"
        )


if __name__ == "__main__":
    main()
