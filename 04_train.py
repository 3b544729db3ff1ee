"""Stage 4: train the fused model.

    python 04_train.py                                       the selection of runs/toycity
    python 04_train.py --out runs/stride8 --stride 8         an ablation: other stride, own folder
    python 04_train.py --out runs/alone --fusion none        the master alone
    python 04_train.py --steps 0                             only say what would be trained, on what, and how long
    torchrun --nproc_per_node=8 -- 04_train.py …             on eight GPUs, each with an eighth of the batch
    python 04_train.py --accumulate 8 …                      the same batch on one, in eight parts

The master is fine-tuned at a tenth of the decoder's learning rate, the auxiliary stays frozen, and a Mask2Former
decoder is trained from scratch on both: one stage, one loss. A training that was interrupted, even killed, goes on with
the same command from its last checkpoint; on a CPU it ends at the same weights, to the last bit, as one that was not.
Nothing is evaluated on the way: the last checkpoint is the model.

Reads run.json and selection.json of --run. Writes checkpoint.pt, log.csv and loss.png to --out (default: --run).
"""

import contextlib
import csv
import dataclasses
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from pycocotools import mask as rle
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import figures, run
from common.benchmarks import open_split
from common.encoders import weights_origin
from common.model import LOSS_WEIGHTS, PADDING, FusedModel, build_model
from common.run import UserError

# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Recipe:
    """How one benchmark is trained and at which size it is evaluated; pixels throughout."""

    steps: int
    resize: tuple[int, int]  # the image is scaled so that its short (or long) side falls between these
    crop: tuple[int, int]  # height and width, multiples of 32
    test_size: str  # as --size of stage 1
    resized_side: str = "short"  # or "long": which one `resize` speaks of
    colour_jitter: bool = False
    batch: int = 16  # images a step, over all processes
    learning_rate: float = 1e-4  # of the decoder
    master_rate: float = 0.1  # of the encoders, relative to the decoder's; 1 where they start at random
    drops: tuple[int, ...] = ()  # steps at which the rate falls to a tenth; none: it falls as (1 - step / steps)^0.9
    weight_decay: float = 0.05
    clip: float = 0.01  # norm of the whole model's gradient
    width: int = 256  # channels of the decoder
    queries: int = 100
    encoder_layers: int = 6  # of the pixel decoder
    decoder_layers: int = 9  # of the transformer decoder
    heads: int = 8
    points: int = 12544  # sampled on each mask for the loss
    vit_widths: tuple[int, int, int, int] = (128, 256, 512, 1024)  # channels of a ViT master's four levels
    save_every: int = 1000


STREETS = Recipe(90_000, resize=(512, 2048), crop=(512, 1024), test_size="1024x2048", colour_jitter=True)
COCO = Recipe(
    368_750,
    resize=(102, 2048),  # 0.1 to 2 times the crop: large-scale jitter
    resized_side="long",
    crop=(1024, 1024),
    test_size="800/1333",
    drops=(327_778, 355_092),
    queries=200,
)
RECIPES = {
    "cityscapes_semantic": STREETS,
    "cityscapes_instance": STREETS,
    "urbansyn_to_cityscapes_instance": STREETS,
    "synscapes_to_cityscapes_instance": STREETS,
    "synthia_to_cityscapes_instance": STREETS,
    "coco_instance": COCO,
    "coco_panoptic": COCO,
    "ade20k_semantic": Recipe(160_000, (320, 1280), (640, 640), test_size="640", colour_jitter=True),
    "kitti360_instance": Recipe(90_000, (376, 752), (384, 672), test_size="own", colour_jitter=True),
    "toycity": Recipe(
        steps=1200,
        resize=(208, 336),
        crop=(128, 256),
        test_size="256",
        batch=4,
        learning_rate=2e-3,
        width=64,
        queries=50,
        encoder_layers=2,
        decoder_layers=3,
        heads=4,
        points=1024,
        vit_widths=(32, 64, 64, 128),
        save_every=200,
    ),
}
METHOD = ("replace", "ft", "fz")  # fusion, the master fine-tuned, the auxiliary frozen


def parse_arguments():
    parser = run.arguments(__doc__)
    parser.add_argument("--out", type=Path, help="folder for the training (default: the run folder)")
    parser.add_argument("--data", type=Path, help="data root (default: as in stage 1)")
    parser.add_argument("--master", metavar="NAME", help="instead of the selected one")
    parser.add_argument("--auxiliary", metavar="NAME", help="instead of the selected one")
    parser.add_argument("--stride", type=int, choices=(4, 8, 16, 32), help="instead of the selected one")
    parser.add_argument(
        "--fusion", choices=("replace", "concat", "add", "none"), default="replace", help="none: no auxiliary"
    )
    parser.add_argument("--master-mode", choices=("ft", "fz"), default="ft", help="fine-tuned or frozen")
    parser.add_argument("--aux-mode", choices=("ft", "fz"), default="fz", help="fine-tuned or frozen")
    parser.add_argument("--steps", type=int, help="instead of the recipe's; 0: say what would be done, and stop")
    parser.add_argument("--batch", type=run.positive, help="images a step, instead of the recipe's")
    parser.add_argument("--accumulate", type=run.positive, default=1, help="parts of a batch, one after the other")
    parser.add_argument("--learning-rate", type=float, help="of the decoder, instead of the recipe's")
    parser.add_argument("--crop", metavar="HxW", help="instead of the recipe's, multiples of 32")
    parser.add_argument("--seed", type=int, help="(default: as in stage 1)")
    return parser.parse_args()


def choose_recipe(args, name: str) -> Recipe:
    """The benchmark's recipe with what the command line changes; UserError for what cannot be."""
    recipe = RECIPES[name]
    if args.steps is not None and args.steps < 0:
        raise UserError(f"--steps {args.steps}: may not be negative")
    if args.learning_rate is not None and args.learning_rate <= 0:
        raise UserError(f"--learning-rate {args.learning_rate}: must be above 0")
    changes = {key: getattr(args, key) for key in ("steps", "batch", "learning_rate") if getattr(args, key)}
    if args.steps:
        changes["drops"] = tuple(round(drop * args.steps / recipe.steps) for drop in recipe.drops)
    if args.crop:
        sides = args.crop.split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) and int(side) % 32 == 0 for side in sides):
            raise UserError(f"--crop {args.crop}: expected HEIGHTxWIDTH in pixels, multiples of 32, as 512x1024")
        changes["crop"] = tuple(map(int, sides))
    recipe = dataclasses.replace(recipe, **changes)
    if recipe.batch % (run.world() * args.accumulate):
        raise UserError(
            f"a batch of {recipe.batch} cannot be shared evenly by {run.world()} process(es) with --accumulate "
            f"{args.accumulate}: change --batch, --accumulate or the number of processes"
        )
    return recipe


# ---------------------------------------------------------------------------------------------- data


class TrainCrops(Dataset):
    """An endless, shuffled, augmented stream over a data set: item n depends on the seed and n alone.

    So the order does not change with the number of workers or processes, and an interrupted training finds its place.
    """

    def __init__(self, samples: Dataset, recipe: Recipe, seed: int):
        self.samples, self.recipe, self.seed = samples, recipe, seed

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch

    def __getitem__(self, n: int) -> dict:
        epoch, place = divmod(n, len(self.samples))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.samples))
        return augment(self.samples[order[place]], self.recipe, np.random.default_rng((self.seed, 1, n)))


def augment(sample: dict, recipe: Recipe, rng: np.random.Generator) -> dict:
    """Random scale, crop, flip and colours. Masks are made after the crop; void and crowds get none.

    Returns image float32 [3, h, w] in [0, 1], masks bool [S, h, w], labels int64 [S], and the picture's name; h and w
    the recipe's crop. Where a scaled image is smaller, it is padded below and to the right; no mask covers that.
    """
    height, width = sample["image"].shape[1:]
    crop_height, crop_width = recipe.crop
    scale = rng.uniform(*recipe.resize) / (min if recipe.resized_side == "short" else max)(height, width)
    # The crop is cut from the original and then scaled, which spares scaling what is cut away.
    box_height, box_width = min(height, round(crop_height / scale)), min(width, round(crop_width / scale))
    # the size of the box once scaled
    size = (min(crop_height, max(1, round(height * scale))), min(crop_width, max(1, round(width * scale))))
    top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
    box = (top, left, box_height, box_width)
    image = TF.resize(TF.crop(sample["image"], *box), size, antialias=True).float() / 255

    labels, wanted = sample["labels"], ~sample["crowd"]
    if "rles" in sample:  # masks that may overlap
        codes = [code for code, kept in zip(sample["rles"], wanted.tolist(), strict=True) if kept]
        planes = torch.from_numpy(rle.decode(codes)).permute(2, 0, 1) if codes else torch.zeros(0, height, width)
        labels = labels[wanted]
    else:
        planes = sample["segments"][None].float()
    planes = F.interpolate(TF.crop(planes, *box)[:, None], size, mode="nearest-exact")[:, 0]  # [S or 1, *size]

    if rng.random() < 0.5:
        image, planes = image.flip(-1), planes.flip(-1)
    if recipe.colour_jitter:
        image = jitter_colours(image, rng)
    padding = (0, crop_width - size[1], 0, crop_height - size[0])
    image, planes = F.pad(image, padding, value=PADDING), F.pad(planes, padding)

    if "rles" in sample:
        present = planes.flatten(1).any(1).nonzero()[:, 0]
        masks = planes[present].bool()
    else:
        present = planes.unique().long() - 1
        present = present[present >= 0]
        present = present[wanted[present]]
        masks = planes == present[:, None, None] + 1
    return {"image": image, "masks": masks, "labels": labels[present], "name": sample["name"]}


def jitter_colours(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, each in half of the images, as SSD does (Liu et al. 2016).

    image: float32 [3, h, w] in [0, 1].
    """
    changes = [
        lambda image: image + rng.uniform(-32, 32) / 255,
        lambda image: TF.adjust_saturation(image, rng.uniform(0.5, 1.5)),
        lambda image: TF.adjust_hue(image, rng.uniform(-0.1, 0.1)),  # of the circle; 18 in OpenCV's half degrees
    ]
    # contrast, before the colours or after them
    changes.insert(rng.choice([1, 3]), lambda image: image * rng.uniform(0.5, 1.5))
    for change in changes:
        if rng.random() < 0.5:
            image = change(image).clamp(0, 1)
    return image


def collate(items: list[dict]) -> tuple[torch.Tensor, list, list, list]:
    """Images become one tensor [B, 3, h, w]; masks and labels stay lists, each image has its own number."""
    masks, labels, names = ([item[key] for item in items] for key in ("masks", "labels", "name"))
    return torch.stack([item["image"] for item in items]), masks, labels, names


# ---------------------------------------------------------------------------------------------- training


def make_optimiser(model: FusedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; encoders at `master_rate` of the rate, no weight decay on norms, biases, embeddings, position tables."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables = ("pos_embed", "rel_pos", "relative_position", "level_embed", "_token")
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            encoder = name.startswith(("pyramid.master.", "pyramid.auxiliary."))
            table = id(parameter) in embeddings or any(word in name for word in tables)
            groups.setdefault((encoder, parameter.ndim > 1 and not table), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "rate": recipe.learning_rate * (recipe.master_rate if encoder else 1.0),
                "weight_decay": recipe.weight_decay if decays else 0.0,
            }
            for (encoder, decays), parameters in groups.items()
        ],
        fused=next(model.parameters()).is_cuda,
    )


def schedule(step: int, recipe: Recipe) -> float:
    """What the learning rates are multiplied by in a step, counted from 0."""
    if recipe.drops:
        return 0.1 ** sum(step >= drop for drop in recipe.drops)
    return (1 - step / recipe.steps) ** 0.9


@contextlib.contextmanager
def collect_signals():
    """Ctrl-C and SIGTERM come into the list that is yielded, to be answered once the step is done."""
    received = []

    def receive(number, frame):
        received.append(number)
        os.write(2, b"\nfinishing this step, then saving\n")  # print might be interrupted in the middle of itself

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    model: FusedModel,
    samples: Dataset,
    recipe: Recipe,
    settings: dict,
    folder: Path,
    checkpoint: dict | None = None,
    device: str = "cpu",
    workers: int = 2,
    accumulate: int = 1,
) -> int | None:
    """Train for the recipe's steps, or for what is left of them after `checkpoint` (see load_checkpoint).

    settings: what decides the result, its seed among it; kept in the checkpoint. A step's batch is shared by all
    processes, and by each cut into `accumulate` parts. Leaves checkpoint.pt, the one before it, and log.csv. Returns
    the signal that ended it early, or None. Raises UserError when a loss is not finite.
    """
    cuda = device == "cuda"
    model.to(device).train()
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32
        model.to(memory_format=torch.channels_last)
    optimiser = make_optimiser(model, recipe)
    first = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimiser.load_state_dict(checkpoint["optimiser"])
        # The checkpoint may come from another kind of device, with another kernel and another layout of memory.
        for group in optimiser.param_groups:
            group["fused"] = cuda
        for parameter, moments in optimiser.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
            moments["step"] = moments["step"].to(device)
        first = checkpoint["step"]
        checkpoint.clear()  # it is as large as model and optimiser together
        then = "going on from there" if first < recipe.steps else "nothing is left to train"
        print(f"{folder / 'checkpoint.pt'} holds step {first} of {recipe.steps}: {then}")
    if run.sum_over_processes(torch.tensor(first, device=device)).item() != first * run.world():
        raise UserError(f"not all processes read the same checkpoint of {folder}: can all of them see the folder?")
    learner = model  # what the forward pass goes through, so that the backward pass averages over the processes
    if run.world() > 1:
        learner = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # A batch is cut into parts, one for each process and turn; what is random in a part depends on its number alone.
    parts = range(run.rank() * accumulate, (run.rank() + 1) * accumulate)  # of this process
    size = recipe.batch // (run.world() * accumulate)  # images in a part
    loader = DataLoader(
        TrainCrops(samples, recipe, settings["seed"]),
        batch_sampler=(
            range(step * recipe.batch + part * size, step * recipe.batch + (part + 1) * size)
            for step in range(first, recipe.steps)
            for part in parts
        ),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=cuda,
        worker_init_fn=run.leave_interrupts_to_the_parent,
    )
    stream, recent = iter(loader), deque(maxlen=50)
    bar = tqdm(range(first, recipe.steps), "training", recipe.steps, initial=first, unit="step", disable=run.rank() > 0)
    with collect_signals() as signals, open_log(folder, first) as log:
        for step in bar:
            began = time.perf_counter()
            batch = [next(stream) for _ in parts]  # images [b, 3, h, w], masks, labels and names of each part
            waiting = time.perf_counter() - began
            for group in optimiser.param_groups:  # "rate" is a group's own at the start
                group["lr"] = group["rate"] * schedule(step, recipe)

            # the loss of a part samples points; no two parts of a training draw them alike
            seeds = [settings["seed"] * 1_000_003 + step + (part << 40) for part in parts]
            counts = average_counts(model, batch, device)
            terms, problem, failed, stop = forward_backward(learner, batch, seeds, counts, device, signals)
            if not failed:
                norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                problem = None if norm.isfinite() else "the gradient is not finite"
            if problem:
                file = save_problem(folder, model, settings, step, counts, seeds, batch)
            if problem or failed:
                run.gather(None)  # wait for all: torchrun kills the others once one has left
            if problem:
                names = ", ".join(name for *_, names in batch for name in names)
                raise UserError(
                    f"training stopped in step {step + 1}, images {names}: {problem}; {file} holds what reproduces it, "
                    "the last checkpoint stays"
                )
            if failed:
                raise UserError(f"training stopped in step {step + 1}: another process says why")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

            # Report, and save
            terms = (run.sum_over_processes(terms) / run.world()).tolist()
            seconds, memory = time.perf_counter() - began, peak_memory(device)
            rate = optimiser.param_groups[-1]["lr"]  # the decoder's
            recent.append([sum(terms), *terms, seconds, waiting])
            log.writerow([step + 1, sum(terms), *terms, rate, seconds, waiting, recipe.batch / seconds, memory])
            bar.set_postfix_str(progress(recent, rate, recipe.batch, memory), refresh=False)
            last = step + 1 == recipe.steps
            if (step + 1) % recipe.save_every == 0 or last or stop:
                save_checkpoint(folder, model, optimiser, step + 1, settings)
            if stop and not last:
                return signals[0] if signals else signal.SIGTERM
    return None


def average_counts(model: FusedModel, batch: list, device: str) -> torch.Tensor:
    """The mean of loss_counts over the parts of a batch, of all processes: what each part's losses are divided by."""
    counts = run.sum_over_processes(sum(model.loss_counts(labels) for _, _, labels, _ in batch).to(device)).cpu()
    counts[0].clamp_(min=1)  # masks; the library divides by one where there is none
    return counts / (run.world() * len(batch))


def forward_backward(learner: nn.Module, batch: list, seeds: list[int], counts, device: str, signals: list):
    """Gradients of a batch's loss, part by part, averaged over the processes with the last one.

    Returns the loss terms [3], what went wrong here or None, whether it went wrong in any process, and whether any
    process was told to stop: one that ended alone would leave the others waiting for its gradients.
    """
    model, cuda = getattr(learner, "module", learner), device == "cuda"
    terms = torch.zeros(len(LOSS_WEIGHTS), device=device)
    for turn, (seed, (images, masks, labels, _)) in enumerate(zip(seeds, batch, strict=True)):
        torch.manual_seed(seed)
        images = images.to(device, non_blocking=True)
        masks, labels = [m.to(device).float() for m in masks], [k.to(device) for k in labels]
        last = turn == len(batch) - 1
        with contextlib.nullcontext() if last or learner is model else learner.no_sync():
            with torch.autocast(device, torch.bfloat16, enabled=cuda):
                outputs = learner(images.to(memory_format=torch.channels_last) if cuda else images)
            problem = None
            try:
                losses = model.losses(outputs, masks, labels, counts)
            except FloatingPointError as error:
                problem = str(error)
            ends = torch.tensor([problem is not None, len(signals)], device=device)
            failed, stop = run.sum_over_processes(ends).tolist()
            if failed:
                break
            (sum(losses.values()) / len(batch)).backward()
        terms += torch.stack([value.detach() for value in losses.values()]) / len(batch)
    return terms, problem, failed, stop


def progress(recent: deque, rate: float, batch: int, memory: float) -> str:
    """What stands beside the bar, from the last rows: loss, its terms, seconds of a step, of these waiting for data."""
    loss, *terms, seconds, waiting = np.mean(recent, axis=0)
    terms = " + ".join(f"{name} {term:.2f}" for name, term in zip(LOSS_WEIGHTS, terms, strict=True))
    shown = f"loss {loss:.2f} = {terms}, rate {rate:.1e}, {batch / seconds:.1f} images/s, {memory:.1f} GB"
    if len(recent) < recent.maxlen or waiting < 0.1 * seconds:  # the first steps wait for the workers to start
        return shown
    return f"{shown}, {waiting / seconds:.0%} of the time waiting for data: raise --workers"


def peak_memory(device: str) -> float:
    """Of this process, in GB: on a GPU what tensors took there, else what it took of the machine's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return np.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


@contextlib.contextmanager
def open_log(folder: Path, rows: int):
    """log.csv, cut back to its first `rows`: what was done after the last checkpoint is done again. Yields a writer."""
    path = folder / "log.csv" if run.rank() == 0 else Path(os.devnull)
    if run.rank() == 0:
        columns = ["step", "loss", *LOSS_WEIGHTS, "learning_rate", "seconds", "waiting", "images_per_second", "memory"]
        lines = path.read_text().splitlines()[1:] if rows and path.is_file() else []
        lines = [line for line in lines if line.partition(",")[0].isdecimal() and int(line.partition(",")[0]) <= rows]
        with run.whole_file(path) as temporary:
            temporary.write_text("\n".join([",".join(columns), *lines, ""]))
    with open(path, "a", newline="", buffering=1) as file:
        yield csv.writer(file, lineterminator="\n")


def read_log(folder: Path) -> dict[str, np.ndarray]:
    """The columns of log.csv by name, one number a step; UserError if it is gone."""
    path = folder / "log.csv"
    try:
        with open(path) as file:
            columns = file.readline().strip().split(",")
        return dict(zip(columns, np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2).T, strict=True))
    except (OSError, ValueError):
        raise UserError(f"training is complete, but {path} is gone or damaged: nothing to report or draw") from None


def save_checkpoint(folder: Path, model: nn.Module, optimiser, step: int, settings: dict) -> None:
    """Write checkpoint.pt whole, and keep the one before it as checkpoint_previous.pt.

    The step stands for the schedule, the place in the data and the random numbers: they follow from it and the seed.
    """
    if run.rank():
        return
    content = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "settings": settings}
    path = folder / "checkpoint.pt"
    for left in folder.glob(f".{path.name}.*.tmp"):  # by a process that was killed while it wrote
        left.unlink()
    with run.whole_file(path) as temporary:
        torch.save(content, temporary)
        if path.is_file():
            os.replace(path, folder / "checkpoint_previous.pt")


def save_problem(folder: Path, model: nn.Module, settings: dict, step: int, counts, seeds: list, batch: list) -> Path:
    """Write nonfinite.pt, with which this process's share of a step can be looked into. On a CPU it is the very step; a
    GPU draws other points for the loss, and computes in bfloat16.

    saved = torch.load("nonfinite.pt", "cpu", weights_only=True)
    model = build_model(saved["settings"], weights={}).train()
    model.load_state_dict(saved["model"])
    for seed, (images, masks, labels, names) in zip(saved["seeds"], saved["batch"]):
        torch.manual_seed(seed)
        losses = model.losses(model(images), [m.float() for m in masks], labels, saved["counts"])
        sum(losses.values()).backward()
    """
    path = folder / ("nonfinite.pt" if run.rank() == 0 else f"nonfinite_{run.rank()}.pt")
    content = {"settings": settings, "model": model.state_dict(), "step": step}
    with run.whole_file(path) as temporary:
        torch.save(content | {"counts": counts, "seeds": seeds, "batch": batch}, temporary)
    return path


def load_checkpoint(folder: Path, settings: dict) -> dict | None:
    """The folder's newest readable checkpoint, or None; UserError if it was made with other settings."""
    paths = [folder / name for name in ("checkpoint.pt", "checkpoint_previous.pt")]
    paths = [path for path in paths if path.is_file()]
    for path in paths:
        try:
            checkpoint = torch.load(path, "cpu", weights_only=True)
        except Exception as error:  # torch raises many types for a damaged file
            print(f"{path} cannot be read ({type(error).__name__})")
            continue
        run.same_settings(path, checkpoint["settings"], settings, "give another --out, or delete the checkpoints there")
        return checkpoint
    if paths:
        raise UserError(f"no checkpoint of {folder} can be read: move them away to start anew")
    return None


# ---------------------------------------------------------------------------------------------- the stage


def describe(model: FusedModel, samples: Dataset, settings: dict, recipe: Recipe, accumulate: int) -> None:
    """What is trained, on what, and for how long."""
    print(f"master      {settings['master']}, {'fine-tuned' if settings['master_mode'] == 'ft' else 'frozen'}")
    if settings["fusion"] != "none":
        mode = "fine-tuned" if settings["aux_mode"] == "ft" else "frozen"
        print(f"auxiliary   {settings['auxiliary']}, {mode}, at stride {settings['stride']} by {settings['fusion']}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) / 1e6
    print(f"parameters  {trainable:.2f} M learn, {frozen:.2f} M are frozen")
    things = sum(settings["isthing"])
    print(f"data        {len(samples)} images of {samples.root}, {len(settings['classes'])} classes, {things} things")
    epochs = recipe.steps * recipe.batch / len(samples)
    shared = f", in {run.world() * accumulate} parts" if run.world() * accumulate > 1 else ""
    print(f"schedule    {recipe.steps} steps of {recipe.batch} images{shared}: {epochs:.1f} epochs")
    drops = f"a tenth from steps {', '.join(map(str, recipe.drops))}" if recipe.drops else "falling to 0"
    rates = f"{recipe.learning_rate:.1e}, encoders {recipe.learning_rate * recipe.master_rate:.1e}, {drops}"
    print(f"rate        {rates}")
    print(
        f"pictures    {recipe.resized_side} side {recipe.resize[0]} to {recipe.resize[1]}, crops of "
        f"{recipe.crop[0]} x {recipe.crop[1]}; evaluated at {recipe.test_size}"
    )


def main():
    args = parse_arguments()
    run.join_processes(args.device)
    source = args.run
    asked = run.read_stage(source, "run.json", "01_extract.py")
    selection = run.read_stage(source, "selection.json", "03_select.py")
    name = asked["benchmark"]
    if name is None:
        raise UserError(f"{source} holds pictures without labels: training needs a run made with --benchmark")

    # What is trained: the selection, unless the command line says otherwise. Then it is another run, in its own folder.
    folder = args.out or source
    by_hand = {k: getattr(args, k) for k in ("master", "auxiliary", "stride") if getattr(args, k) is not None}
    if folder.resolve() == source.resolve() and (by_hand or (args.fusion, args.master_mode, args.aux_mode) != METHOD):
        raise UserError(f"this is not the selection of {source}: give it a folder of its own with --out")
    selection |= by_hand
    selection["chosen_by_hand"] = sorted({*selection["chosen_by_hand"], *by_hand})
    if selection["master"] == selection["auxiliary"] and args.fusion != "none":
        raise UserError(f"master and auxiliary are both {selection['master']}: choose two, or --fusion none")
    used = [selection["master"]] + ([selection["auxiliary"]] if args.fusion != "none" else [])
    weights = {encoder: asked["weights"].get(encoder, "pretrained") for encoder in used}
    recipe = choose_recipe(args, name)
    if weights[selection["master"]] == "none":
        recipe = dataclasses.replace(recipe, master_rate=1.0)
    data = args.data or Path(asked["data"])
    if not data.is_dir():
        raise UserError(f"there is no folder {data}: say where your data sets are with --data")
    with run.first_process_first():
        samples = open_split(name, data, "train")
    settings = {key: selection[key] for key in ("master", "auxiliary", "stride")}
    settings |= {"benchmark": name, "fusion": args.fusion, "master_mode": args.master_mode, "aux_mode": args.aux_mode}
    origin = {encoder: weights_origin(encoder, weights[encoder]) for encoder in used}
    for encoder in used:
        if origin[encoder] != (measured := asked.get("weights_from", {}).get(encoder, origin[encoder])):
            raise UserError(
                f"{encoder} was measured with other weights ({measured}) than these ({origin[encoder]}): "
                "bring those back, or begin with 01_extract.py and another --run"
            )
    settings |= {"weights": weights, "weights_from": origin, "seed": asked["seed"] if args.seed is None else args.seed}
    settings |= {"train_images": len(samples), "classes": [name for _, name, _ in samples.categories]}
    settings |= {"isthing": [isthing for _, _, isthing in samples.categories], **dataclasses.asdict(recipe)}

    for encoder in used:
        if weights[encoder] == "none":
            print(f"WARNING: {encoder} starts from random weights")
    run.seed_everything(settings["seed"])
    model = build_model(settings, weights)
    describe(model, samples, settings, recipe, args.accumulate)
    if args.steps == 0:
        return None

    checkpoint = load_checkpoint(folder, settings)  # refuses a folder of other settings before anything is written
    if folder.resolve() != source.resolve():
        extraction = {key: value for key, value in asked.items() if key not in ("command", "versions")}
        with run.first_process_first():
            run.open_run(folder, extraction, asked["command"])
            if run.rank() == 0:
                run.write_json(folder / "selection.json", selection)
    ended_by = train(model, samples, recipe, settings, folder, checkpoint, args.device, args.workers, args.accumulate)
    if ended_by:
        print(f"\ninterrupted; {folder}/checkpoint.pt is up to date, and the same command goes on from there")
        return 128 + ended_by
    if run.rank():
        return None

    # What came of it
    log = read_log(folder)
    figures.draw_loss(folder / "loss.png", log, ["loss", *LOSS_WEIGHTS])
    print(f"\n{'steps':>15} {'loss':>8} " + " ".join(f"{name:>14}" for name in LOSS_WEIGHTS) + f" {'s/step':>8}")
    count = len(log["step"])
    edges = sorted({0, count // 4, count // 2, 3 * count // 4, count})
    for begin, end in zip(edges, edges[1:], strict=False):
        mean = {name: column[begin:end].mean() for name, column in log.items()}
        terms = " ".join(f"{mean[name]:>14.3f}" for name in LOSS_WEIGHTS)
        print(f"{f'{begin + 1}-{end}':>15} {mean['loss']:>8.3f} {terms} {mean['seconds']:>8.3f}")
    print(f"\nwrote {folder}/checkpoint.pt, log.csv, loss.png")
    print(f"next: {run.command('05_eval.py', folder)}")
    return None


if __name__ == "__main__":
    run.start(main)
