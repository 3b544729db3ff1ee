"""What test_distributed.py asks of two processes on a CPU, started by torchrun; the first one writes the answers.

At last both end at a loss that is not finite in one of them.

torchrun --standalone --nproc_per_node=2 tests/two_processes.py FOLDER
"""

import dataclasses
import hashlib
import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from common import run  # noqa: E402

from test_train import RECIPE, Shapes, build, stage4, train, training_for  # noqa: E402

SMALL = dataclasses.replace(RECIPE, batch=4, steps=3)


def digest(model) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def some_batch(seed, segments=4):
    """Two crops of the shapes, with only the first few of their segments."""
    crops = [stage4.augment(Shapes()[seed + i], RECIPE, stage4.np.random.default_rng(i)) for i in range(2)]
    images = torch.stack([crop["image"] for crop in crops])
    return images, [c["masks"][:segments].float() for c in crops], [c["labels"][:segments] for c in crops]


def gradients(learner, model, images, masks, labels) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sum(model.losses(learner(images), masks, labels).values()).backward()
    found = [p.grad.clone() if p.grad is not None else None for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def check_training(folder: Path) -> list[str]:
    """A few steps leave both with the same parameters, bit for bit; they do not even begin alike."""
    model = build(training_for(SMALL, seed=stage4.RANK))
    if stage4.RANK == 0:
        model = build(training_for(SMALL))
    train(folder, SMALL, model=model, accumulate=2)
    digests = [None] * stage4.WORLD
    dist.all_gather_object(digests, digest(model))
    return digests


def check_gradients() -> float:
    """The same half on both gives the gradient of one; the greatest relative difference."""
    model, batch = build(training_for(SMALL)), some_batch(0)
    alone = gradients(model, model, *batch)
    both = gradients(DistributedDataParallel(model), model, *batch)
    difference = max((a - b).abs().max().item() for a, b in zip(alone, both, strict=True))
    return difference / max(a.abs().max().item() for a in alone)


def check_models() -> int:
    """Whatever the model, and if one of them has no segment at all, none waits for the other."""
    ways = itertools.product(("tiny_vit", "tiny_hiera"), (4, 32), ("replace", "concat", "add", "none"), ("fz", "ft"))
    ways = list(ways)
    for master, stride, fusion, mode in ways:
        other = "tiny_hiera" if master == "tiny_vit" else "tiny_vit"
        changes = {"master": master, "auxiliary": other, "stride": stride, "fusion": fusion, "aux_mode": mode}
        model = build(training_for(SMALL, **changes))
        learner = DistributedDataParallel(model, gradient_as_bucket_view=True)
        for segments in (4 if stage4.RANK else 0, 0 if stage4.RANK else 4, 0):
            found = gradients(learner, model, *some_batch(2 * stage4.RANK, segments))
            assert all(grad is not None and grad.isfinite().all() for grad in found), (master, stride, fusion)
    return len(ways)


def train_with_nan(folder: Path) -> None:
    """What is not finite in one of them ends both: this does not return."""
    model = build(training_for(SMALL))
    if stage4.RANK == 1:
        inside = model.criterion.forward
        model.criterion.forward = lambda *given: {name: value * torch.nan for name, value in inside(*given).items()}
    train(folder, SMALL, model=model)


def main():
    stage4.join_processes("cpu")
    folder = Path(sys.argv[1])
    answers = {"parameters": check_training(folder), "gradients": check_gradients(), "models": check_models()}
    if stage4.RANK == 0:
        run.write_json(folder / "answers.json", answers)
    train_with_nan(folder / "nan")


if __name__ == "__main__":
    run.start(main)
