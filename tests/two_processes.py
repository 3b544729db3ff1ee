"""What test_distributed.py asks of two processes on a CPU. The first one writes the answers.

    torchrun --standalone --nproc_per_node=2 tests/two_processes.py FOLDER

At last both end at a loss that is not finite in one of them.
"""

import dataclasses
import hashlib
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from common import run  # noqa: E402
from common.model import FUSIONS  # noqa: E402

from test_train import RECIPE, Shapes, build, record_losses, stage4, train, training_for  # noqa: E402

SMALL = dataclasses.replace(RECIPE, batch_size=4, steps=3)


def digest(model) -> str:
    """A checksum of all parameters."""
    checksum = hashlib.sha256()
    for parameter in model.parameters():
        checksum.update(parameter.detach().numpy().tobytes())
    return checksum.hexdigest()


def some_batch(seed, segments=4):
    """Images, masks and labels of two crops, with only the first few of their segments."""
    images = []
    masks = []
    labels = []
    for number in range(2):
        random = np.random.default_rng(number)
        crop = stage4.augment(Shapes()[seed + number], RECIPE, random)
        images.append(crop["image"])
        masks.append(crop["masks"][:segments].float())
        labels.append(crop["labels"][:segments])
    return torch.stack(images), masks, labels


def gradients(learner, model, images, masks, labels) -> list[torch.Tensor | None]:
    """The gradient of each parameter that learns."""
    torch.manual_seed(0)
    sum(model.losses(learner(images), masks, labels).values()).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    found = [None if gradient is None else gradient.clone() for gradient in found]
    model.zero_grad()
    return found


def gather(value) -> list:
    """The value of each process."""
    values = [None] * stage4.WORLD
    dist.all_gather_object(values, value)
    return values


def check_training(folder: Path) -> dict:
    """A few steps leave both with the same parameters, bit for bit, which do not begin alike."""
    model = build(training_for(SMALL, seed=stage4.RANK))
    if stage4.RANK == 0:
        model = build(training_for(SMALL))
    recorded = record_losses(model)
    train(folder, SMALL, model=model, accumulate=2)
    return {"parameters": gather(digest(model)), "losses": gather(recorded)}


def check_gradients() -> float:
    """The same half on both gives the gradient of one: the greatest relative difference."""
    model = build(training_for(SMALL))
    batch = some_batch(0)
    alone = gradients(model, model, *batch)
    both = gradients(DistributedDataParallel(model), model, *batch)
    differences = [(a - b).abs().max().item() for a, b in zip(alone, both, strict=True)]
    return max(differences) / max(gradient.abs().max().item() for gradient in alone)


def check_models() -> int:
    """Whatever the model, neither waits for the other, even if one has no segment at all."""
    masters = ("tiny_vit", "tiny_hiera")
    ways = list(itertools.product(masters, (4, 32), FUSIONS, ("frozen", "finetuned")))
    for master, stride, fusion, aux_mode in ways:
        auxiliary = "tiny_hiera" if master == "tiny_vit" else "tiny_vit"
        training = training_for(
            SMALL,
            master=master,
            auxiliary=auxiliary,
            stride=stride,
            fusion=fusion,
            aux_mode=aux_mode,
        )
        if fusion == "none":
            training["auxiliary"] = training["stride"] = None
        model = build(training)
        learner = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # First only the second process has segments, then only the first, then neither.
        segments_of_ranks = ((0, 4), (4, 0), (0, 0))
        for segments in segments_of_ranks:
            batch = some_batch(2 * stage4.RANK, segments[stage4.RANK])
            for gradient in gradients(learner, model, *batch):
                assert gradient is not None, training
                assert gradient.isfinite().all(), training
    return len(ways)


def train_with_nan(folder: Path) -> None:
    """What is not finite in one of them ends both. This does not return."""
    model = build(training_for(SMALL))
    criterion = model.criterion.forward

    def spoil_loss(*arguments):
        return {name: value * torch.nan for name, value in criterion(*arguments).items()}

    if stage4.RANK == 1:
        model.criterion.forward = spoil_loss
    train(folder, SMALL, model=model)


def main():
    stage4.join_processes("cpu")
    folder = Path(sys.argv[1])
    answers = check_training(folder)
    answers["gradients"] = check_gradients()
    answers["models"] = check_models()
    if stage4.RANK == 0:
        run.write_json(folder / "answers.json", answers)
    train_with_nan(folder / "nan")


if __name__ == "__main__":
    run.start(main)
