"""What test_distributed.py asks of two processes on a CPU, started by torchrun; the first one writes the answers.

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
from test_train import RECIPE, Shapes, settings_for, stage4  # noqa: E402

from common import run  # noqa: E402
from common.model import build_model  # noqa: E402

SMALL = dataclasses.replace(RECIPE, batch=4, steps=3)


def digest(model) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def some_batch(seed, segments=4):
    """Two crops of the shapes, with only the first few of their segments."""
    crops = [stage4.augment(Shapes()[seed + i], RECIPE, stage4.np.random.default_rng(i)) for i in range(2)]
    images = torch.stack([crop["image"] for crop in crops])
    return images, [c["masks"][:segments].float() for c in crops], [c["labels"][:segments] for c in crops]


def gradients(learner, model, images, masks, labels) -> list[torch.Tensor]:
    counts = run.sum_over_processes(model.loss_counts(labels))
    counts[0].clamp_(min=1)
    counts /= 2
    torch.manual_seed(0)
    sum(model.losses(learner(images), masks, labels, counts).values()).backward()
    found = [p.grad.clone() if p.grad is not None else None for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def main():
    run.join_processes("cpu")
    folder, answers = Path(sys.argv[1]), {}

    # A few steps of training leave both with the same parameters, bit for bit
    settings = settings_for(SMALL)
    torch.manual_seed(run.rank())  # they do not even begin alike: the first one's parameters count
    model = build_model(settings, {})
    if run.rank() == 0:
        torch.manual_seed(0)
        model = build_model(settings, {})
    stage4.train(model, Shapes(), SMALL, settings, folder, workers=0)
    answers["parameters"] = run.gather(digest(model))

    # The same half on both gives the gradient of one
    batch = some_batch(0)
    alone = gradients(model, model, *batch)
    both = gradients(DistributedDataParallel(model), model, *batch)
    difference = max((a - b).abs().max().item() for a, b in zip(alone, both, strict=True))
    answers["gradients"] = difference / max(a.abs().max().item() for a in alone)

    # Whatever the model, and if one of them has no segment at all, none waits for the other
    answers["models"] = 0
    ways = itertools.product(("tiny_vit", "tiny_hiera"), (4, 32), ("replace", "concat", "add", "none"), ("fz", "ft"))
    for master, stride, fusion, mode in ways:
        other = "tiny_hiera" if master == "tiny_vit" else "tiny_vit"
        torch.manual_seed(0)
        changes = {"master": master, "auxiliary": other, "stride": stride, "fusion": fusion, "aux_mode": mode}
        model = build_model(settings_for(SMALL, **changes), {})
        learner = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        for segments in (4 if run.rank() else 0, 0 if run.rank() else 4, 0):
            found = gradients(learner, model, *some_batch(2 * run.rank(), segments))
            assert all(grad is not None and grad.isfinite().all() for grad in found), (master, stride, fusion)
        answers["models"] += 1

    # What is not finite in one of them stops both
    model = build_model(settings, {})
    if run.rank() == 1:
        inside = model.criterion.forward
        model.criterion.forward = lambda *given: {name: value * torch.nan for name, value in inside(*given).items()}
    try:
        stage4.train(model, Shapes(), SMALL, settings, folder / "stopped", workers=0)
    except run.UserError as error:
        answers["stopped"] = run.gather(str(error))
    answers["kept"] = sorted(path.name for path in (folder / "stopped").iterdir())
    if run.rank() == 0:
        run.write_json(folder / "answers.json", answers)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
