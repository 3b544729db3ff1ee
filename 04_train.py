"""Stage 4: train the fused model.

    python 04_train.py                                    the selection of runs/toycity
    python 04_train.py --out runs/stride8 --stride 8      an ablation, in a folder of its own
    python 04_train.py --run runs/mine --fusion none      the run's only encoder, without fusion
    python 04_train.py --steps 0                          only say what would be trained
    python 04_train.py --recipe mask2former --accumulate 8           16 images a step in 8 parts
    torchrun --nproc_per_node=8 -- 04_train.py --recipe mask2former  two on each of eight GPUs

The master is fine-tuned at a tenth of the decoder's learning rate, and the auxiliary stays frozen.
A Mask2Former decoder is trained from scratch on both, at the same time and with its usual loss.
With --accumulate or several GPUs, each part of a batch divides its loss by its own number of
segments, and gradients are averaged: nearly, not exactly, the loss of the whole batch.

An interrupted training goes on from its last checkpoint with the same command. On a CPU it ends at
the same weights, to the last bit, as one that was not interrupted.

Reads run.json of --run, and selection.json unless an encoder is trained alone. Writes
checkpoint.pt, log.csv and loss.png to --out (default: --run).
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from common import figures, run
from common.datasets import BENCHMARKS, open_split
from common.encoders import weights_origin
from common.images import working_size
from common.model import FUSIONS, LOSS_WEIGHTS, PADDING, build_model
from common.run import CORES, DEVICES, UserError, flag, natural, positive, require

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from pycocotools import mask as rle
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

# torchrun starts WORLD processes, and this one is number RANK. Without it there is one.
RANK = int(os.environ.get("RANK") or 0)
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
LOG_COLUMNS = ("step", "loss", *LOSS_WEIGHTS, "learning_rate", "seconds")
MODES = ("finetuned", "frozen")


# ------------------------------------------------------------------ settings and recipes
@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder")
    out: Path | None = flag(None, "folder for the training (default: the run folder)")
    data: Path | None = flag(None, "data root (default: as in stage 1)")
    master: str | None = flag(None, "instead of the selected one", metavar="NAME")
    auxiliary: str | None = flag(None, "instead of the selected one", metavar="NAME")
    stride: int | None = flag(None, "instead of the selected one", choices=(4, 8, 16, 32))
    fusion: str = flag(
        "replace",
        "the auxiliary's map replaces the master's, is concatenated with it or added to it; none: "
        "there is no auxiliary",
        choices=FUSIONS,
    )
    master_mode: str = flag("finetuned", choices=MODES)
    aux_mode: str = flag("frozen", choices=MODES)
    recipe: str = flag(
        "release",
        "of the authors' release, 3 images a step, or of Mask2Former, 16 images a step",
        choices=("release", "mask2former"),
    )
    accumulate: int = flag(
        1, "parts of a batch, one after the other, to save memory", type=positive
    )
    save_every: int = flag(500, "steps between checkpoints", type=positive)
    seed: int | None = flag(None, "(default: as in stage 1)", type=natural)
    device: str = flag(DEVICES[0], choices=DEVICES)
    workers: int = flag(CORES, "processes that read images, for each GPU", type=natural)


def crop_size(text):
    """The type of --crop."""
    height, _, width = text.partition("x")
    sides = (0, 0)
    if height.isdecimal() and width.isdecimal():
        sides = (int(height), int(width))
    require(
        all(side > 0 and side % 32 == 0 for side in sides),
        f"--crop {text}: expected HEIGHTxWIDTH in pixels, multiples of 32, as 512x1024",
    )
    return sides


def not_negative(text):
    """The type of a flag that is a finite number from 0."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number from 0")
    return number


@dataclass(frozen=True)
class Recipe:
    """How a benchmark is trained, and at which size it is evaluated. Lengths are in pixels.

    The defaults are for street scenes, as the authors' release trains on them with one GPU.
    """

    steps: int = flag(180_000, "0 only says what would be trained")
    batch_size: int = flag(3, "images a step, over all processes", type=positive)
    crop: tuple[int, int] = flag((512, 1024), "multiples of 32", type=crop_size, metavar="HxW")
    resize: tuple[int, int] = flag(
        (512, 2048), "range of the side of an image after random scaling", nargs=2
    )
    resized_side: str = flag("short", "the side that --resize means", choices=("short", "long"))
    longest: int = flag(4096, "limit of the long side after random scaling", type=positive)
    colour_jitter: bool = flag(True, "vary brightness, contrast, saturation and hue")
    test_size: str = flag("1024x2048", "at evaluation, in the forms of stage 1's --size")
    learning_rate: float = flag(1e-4, "of the decoder", type=not_negative)
    encoder_multiplier: float = flag(
        0.1, "the encoders' learning rate, relative to the decoder's", type=not_negative
    )
    milestones: tuple[int, ...] = flag(
        (),
        "steps where the learning rate falls to a tenth (none: it decays by --poly-power)",
        nargs="*",
    )
    poly_power: float = flag(1.0, "of the decay (1 - step / steps)^power", type=not_negative)
    weight_decay: float = flag(0.05, type=not_negative)
    max_grad_norm: float = flag(0.01, "of the whole model", type=not_negative)
    hidden_dim: int = flag(256, "channels of the decoder", type=positive)
    queries: int = flag(100, "segments that the decoder can find", type=positive)
    pixel_decoder_layers: int = flag(6, type=positive)
    decoder_layers: int = flag(9, "of the transformer decoder", type=positive)
    heads: int = flag(8, "of attention", type=positive)
    sample_points: int = flag(12544, "of each mask, for the loss", type=positive)
    level_channels: tuple[int, int, int, int] = flag(
        (128, 256, 512, 1024), "of the levels of a ViT master", type=positive, nargs=4
    )


# Large-scale jitter: images are scaled to between 0.1 and 2 times the crop.
COCO = Recipe(
    steps=368_750,
    crop=(1024, 1024),
    resize=(102, 2048),
    resized_side="long",
    colour_jitter=False,
    test_size="800/1333",
    milestones=(327_778, 355_092),
    queries=200,
)
# What the release did on ADE20K is not known: this is Mask2Former's own.
ADE20K = Recipe(
    steps=160_000,
    batch_size=16,
    crop=(640, 640),
    resize=(320, 1280),
    longest=2560,
    test_size="640",
    poly_power=0.9,
)
KITTI360 = Recipe(crop=(384, 672), resize=(413, 752), longest=1504, test_size="original")
# A small decoder and how it learns, for a CPU
TINY = {
    "hidden_dim": 64,
    "queries": 50,
    "pixel_decoder_layers": 2,
    "decoder_layers": 3,
    "heads": 4,
    "sample_points": 1024,
    "level_channels": (32, 64, 64, 128),
    "colour_jitter": False,
    "learning_rate": 2e-3,
}
TOYCITY = Recipe(
    steps=900,
    batch_size=2,
    crop=(160, 320),
    resize=(188, 300),
    test_size="224",
    encoder_multiplier=0.4,  # encoders that were pretrained for minutes have little to keep
    **TINY,
)
RECIPES = {
    "toycity": TOYCITY,
    "coco_instance": COCO,
    "coco_panoptic": COCO,
    "ade20k_semantic": ADE20K,
    "kitti360_instance": KITTI360,
}
for _name in BENCHMARKS:
    if "cityscapes" in _name:  # whatever is evaluated on Cityscapes trains on street scenes
        RECIPES[_name] = Recipe()


def fit_recipe(samples, device):
    """A recipe for a data set that has none, by its images' number and size and the device.

    A crop has three quarters of an image's height and width. The working size is the images' own,
    or smaller: at most 2^20 pixels on a GPU, with crops about as large as the release's, and 2^18
    on a CPU, where a step takes a second or two. Training scales it at random by 0.75 to 1.5.
    """
    some = run.evenly_spaced(range(len(samples)), 25)
    sizes = [samples[index]["image"].shape[1:] for index in some]
    height, width = np.median(sizes, axis=0)
    found = f"{len(samples)} images of some {height:.0f} x {width:.0f} pixels"
    print(f"fitted a recipe to {found}, on {device}")
    if device == "cuda":
        most_pixels = 2**20
        # Somewhat fewer epochs than the release's on Cityscapes, 180
        epochs, least_steps, most_steps = 150, 5000, 180_000
        decoder = {}
    else:
        most_pixels = 2**18
        # A decoder from scratch needs some hundred steps, and an hour is enough on a CPU.
        epochs, least_steps, most_steps = 10, 400, 2000
        # Its learning rate suits a pretrained encoder, too: on CamVid, 200 steps of an EfficientNet
        # alone gave mIoU 45.5 at 2e-3, 40.0 at 1e-3, 37.8 at 5e-4 (40 test images, one seed).
        decoder = TINY
    scale = min(1, (most_pixels / (height * width)) ** 0.5)
    short = max(32, round(scale * min(height, width)))
    batch_size = 4
    steps = epochs * len(samples) // batch_size
    # The size "original" only rounds to multiples of 32.
    return Recipe(
        steps=min(max(least_steps, steps), most_steps),
        batch_size=batch_size,
        crop=working_size(0.75 * scale * height, 0.75 * scale * width, "original"),
        resize=(round(0.75 * short), round(1.5 * short)),
        test_size=str(short),
        **decoder,
    )


def choose_recipe(recipe, settings, changes):
    """The recipe with what the command line changes. UserError for what cannot be trained."""
    if settings.recipe == "mask2former":
        # The release's recipes are those of 3 images. ADE20K's is Mask2Former's own already.
        if recipe.batch_size != Recipe.batch_size:
            print("--recipe mask2former changes nothing for this benchmark")
        elif recipe.milestones:  # COCO's steps and milestones stay as they are
            recipe = replace(recipe, batch_size=16)
        else:
            recipe = replace(recipe, batch_size=16, steps=90_000, poly_power=0.9)
    steps = changes.get("steps", recipe.steps)
    require(steps >= 0, f"--steps {steps}: may not be negative")
    if steps == 0:  # nothing is trained, and the recipe is described as it stands
        steps = recipe.steps
    # Milestones move along with the number of steps, unless the command line gives them.
    milestones = tuple(round(at * steps / recipe.steps) for at in recipe.milestones)
    recipe = replace(recipe, **{"milestones": milestones, **changes, "steps": steps})

    require(
        min(recipe.learning_rate, recipe.encoder_multiplier, recipe.max_grad_norm) > 0,
        "--learning-rate, --encoder-multiplier, --max-grad-norm: with 0 nothing is learned",
    )
    smaller, larger = recipe.resize
    require(0 < smaller <= larger, "--resize: expected two sides in pixels, the smaller one first")
    fits = recipe.hidden_dim % 32 == 0 and recipe.hidden_dim % recipe.heads == 0
    require(
        fits,
        f"--hidden-dim {recipe.hidden_dim}: must be a multiple of 32 and of --heads, "
        f"{recipe.heads}",
    )
    working_size(512, 512, recipe.test_size)  # UserError for a size that means nothing
    parts = WORLD * settings.accumulate
    shared = f"{WORLD} process(es) with --accumulate {settings.accumulate}"
    require(
        recipe.batch_size % parts == 0,
        f"--batch-size {recipe.batch_size} cannot be shared evenly by {shared}: change one of "
        "these",
    )
    return recipe


# ------------------------------------------------------------------ data
class TrainCrops:
    """An endless, shuffled, augmented stream over a data set.

    Item n depends on the seed and on n alone. So the order does not change with the number of
    workers or processes, and an interrupted training finds its place.
    """

    def __init__(self, samples, recipe, seed):
        self.samples = samples
        self.recipe = recipe
        self.seed = seed

    def __getitem__(self, n):
        epoch, place = divmod(n, len(self.samples))
        # 0 and 1 keep the random numbers of the order and of the augmentation apart.
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.samples))
        random = np.random.default_rng((self.seed, 1, n))
        return augment(self.samples[order[place]], self.recipe, random)


def augment(sample, recipe, random):
    """Scale, crop, flip and colour a sample at random.

    Returns image float32 [3, h, w] in [0, 1], masks bool [S, h, w], labels int64 [S], and the
    image's name. h and w are the recipe's crop. A smaller image is padded below and to the right.
    Void, crowds, the padding and what lies outside the crop get no mask.
    """
    height, width = sample["image"].shape[1:]
    side = min(height, width) if recipe.resized_side == "short" else max(height, width)
    scale = random.uniform(*recipe.resize) / side
    scale = min(scale, recipe.longest / max(height, width))

    # The original is cropped and then scaled, so that what lies outside is not scaled in vain.
    crop_height, crop_width = recipe.crop
    box_height = min(height, max(1, round(crop_height / scale)))
    box_width = min(width, max(1, round(crop_width / scale)))
    size = (
        min(crop_height, max(1, round(height * scale))),
        min(crop_width, max(1, round(width * scale))),
    )
    top = random.integers(height - box_height + 1)
    left = random.integers(width - box_width + 1)
    box = (top, left, box_height, box_width)
    image = TF.resize(TF.crop(sample["image"], *box), size, antialias=True).float() / 255
    masks = crop_masks(sample, box, size)  # [S, *size]

    if random.random() < 0.5:
        image = image.flip(-1)
        masks = masks.flip(-1)
    if recipe.colour_jitter:
        image = jitter_colours(image, random)
    padding = (0, crop_width - size[1], 0, crop_height - size[0])
    image = F.pad(image, padding, value=PADDING)
    masks = F.pad(masks, padding)

    is_target = masks.flatten(1).any(1) & ~sample["iscrowd"]
    labels = sample["labels"][is_target]
    return {"image": image, "masks": masks[is_target], "labels": labels, "name": sample["name"]}


def crop_masks(sample, box, size):
    """The masks of a sample's segments in a box (top, left, height, width): bool [S, *size]."""
    if "segments" in sample:
        numbers = torch.arange(1, len(sample["labels"]) + 1)[:, None, None]
        segments = TF.crop(sample["segments"], *box)[None, None].float()
        return F.interpolate(segments, size, mode="nearest-exact")[0] == numbers
    if not sample["rles"]:  # an image without instances
        return torch.zeros(0, *size, dtype=torch.bool)
    masks = torch.from_numpy(rle.decode(sample["rles"])).permute(2, 0, 1)  # [S, H, W]
    masks = TF.crop(masks, *box)[:, None]
    return F.interpolate(masks, size, mode="nearest-exact")[:, 0].bool()


def jitter_colours(image, random):
    """Vary brightness, contrast, saturation and hue, each in half of the images (SSD, Liu 2016).

    image: float32 [3, h, w] in [0, 1].
    """
    contrast_first = random.random() < 0.5  # before the colours, or after them
    if random.random() < 0.5:
        image = (image + random.uniform(-32, 32) / 255).clamp(0, 1)
    if contrast_first:
        image = jitter_contrast(image, random)
    if random.random() < 0.5:
        image = TF.adjust_saturation(image, random.uniform(0.5, 1.5))
    if random.random() < 0.5:
        image = TF.adjust_hue(image, random.uniform(-0.1, 0.1))  # of the colour circle
    if not contrast_first:
        image = jitter_contrast(image, random)
    return image


def jitter_contrast(image, random):
    if random.random() < 0.5:
        image = (image * random.uniform(0.5, 1.5)).clamp(0, 1)
    return image


def crop_numbers(recipe, first, accumulate):
    """The numbers of the crops in each of this process's micro-batches, from step `first` on.

    The micro-batches of all processes, in order of RANK, make up a batch.
    """
    size = recipe.batch_size // (WORLD * accumulate)
    for step in range(first, recipe.steps):
        for part in range(RANK * accumulate, (RANK + 1) * accumulate):
            start = step * recipe.batch_size + part * size
            yield range(start, start + size)


class MicroBatch(NamedTuple):
    images: torch.Tensor  # float32 [b, 3, h, w] in [0, 1]
    masks: list[torch.Tensor]  # for each image float32 [S, h, w] of 0 and 1
    labels: list[torch.Tensor]  # int64 [S]
    names: list[str]


def load_micro_batches(samples, recipe, seed, settings, first):
    """Yield this process's MicroBatches from step `first` on."""
    device = settings.device
    loader = DataLoader(
        TrainCrops(samples, recipe, seed),
        batch_sampler=crop_numbers(recipe, first, settings.accumulate),
        collate_fn=list,
        pin_memory=device == "cuda",
        **run.loader_arguments(settings.workers),
    )
    for crops in loader:
        images = torch.stack([crop["image"].to(device, non_blocking=True) for crop in crops])
        masks = [crop["masks"].to(device).float() for crop in crops]
        labels = [crop["labels"].to(device) for crop in crops]
        names = [crop["name"] for crop in crops]
        yield MicroBatch(images, masks, labels, names)


# ------------------------------------------------------------------ optimiser and schedule
def make_optimiser(model, recipe):
    """AdamW with the encoders at their own learning rate.

    Norms, biases, embeddings and positional encodings have no weight decay.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    encodings = ("pos_embed", "rel_pos", "relative_position", "level_embed", "_token")
    groups = {}  # {(learning rate, weight decay): parameters}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        learning_rate = recipe.learning_rate
        if name.startswith(("pyramid.master.", "pyramid.auxiliary.")):
            learning_rate *= recipe.encoder_multiplier
        is_embedding = id(parameter) in embeddings or any(word in name for word in encodings)
        decays = parameter.ndim > 1 and not is_embedding
        weight_decay = recipe.weight_decay if decays else 0.0
        groups.setdefault((learning_rate, weight_decay), []).append(parameter)
    options = []
    for (learning_rate, weight_decay), parameters in groups.items():
        group = {"params": parameters, "initial_lr": learning_rate, "weight_decay": weight_decay}
        options.append(group)
    return torch.optim.AdamW(options, fused=True)


def schedule(step, recipe):
    """What the learning rates are multiplied by in a step, counted from 0."""
    if recipe.milestones:
        return 0.1 ** sum(step >= milestone for milestone in recipe.milestones)
    return (1 - step / recipe.steps) ** recipe.poly_power


# ------------------------------------------------------------------ training
def train(model, samples, training, settings, folder, checkpoint=None):
    """Train for the recipe's steps, or for what is left of them after `checkpoint`.

    training: what a checkpoint remembers, see main(). Leaves checkpoint.pt and log.csv in `folder`.
    Returns the signal that ended it early, or None. UserError for a loss or gradient that is not
    finite.
    """
    recipe = Recipe(**training["recipe"])
    device = settings.device
    accumulate = settings.accumulate
    model.to(device).train()
    optimiser = make_optimiser(model, recipe)
    first = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimiser.load_state_dict(checkpoint["optimiser"])
        first = checkpoint["step"]
        checkpoint.clear()  # frees its memory: it holds weights and moments a second time
    parallel_model = wrap_for_processes(model, first, device)
    micro_batches = load_micro_batches(samples, recipe, training["seed"], settings, first)
    stop = False
    bar = tqdm(
        range(first, recipe.steps), "training", recipe.steps, initial=first, disable=RANK > 0
    )
    with collect_signals() as signals, open_log(folder, first) as log:
        for step in bar:
            # ---------------------------------------------------------- learning rate
            began = time.perf_counter()
            factor = schedule(step, recipe)
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * factor

            terms = torch.zeros(len(LOSS_WEIGHTS), device=device)
            image_names = []
            for micro_batch_index in range(accumulate):
                # ------------------------------------------------------ forward
                micro_batch = next(micro_batches)
                image_names += micro_batch.names
                error_place = (
                    f"training stopped in step {step + 1}, images {', '.join(image_names)}"
                )
                # The loss samples points at random, and no two micro-batches draw the same ones: a
                # step moves the seed by 1, the training's seed by a million, a part by 2^40.
                part = RANK * accumulate + micro_batch_index
                torch.manual_seed(training["seed"] * 1_000_003 + step + (part << 40))
                if WORLD > 1:  # processes average their gradients once a step
                    is_last_part = micro_batch_index == accumulate - 1
                    parallel_model.require_backward_grad_sync = is_last_part
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    outputs = parallel_model(micro_batch.images)
                # ------------------------------------------------------ loss
                try:
                    losses = model.losses(outputs, micro_batch.masks, micro_batch.labels)
                except FloatingPointError as error:
                    raise UserError(f"{error_place}: {error}") from None
                terms += torch.stack([loss.detach() for loss in losses.values()]) / accumulate
                # ------------------------------------------------------ backward
                (sum(losses.values()) / accumulate).backward()
            # ---------------------------------------------------------- optimiser step
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            require(norm.isfinite(), f"{error_place}: the gradient is not finite")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            # ---------------------------------------------------------- log
            terms = terms.tolist()
            loss = sum(terms)
            seconds = time.perf_counter() - began
            row = (step + 1, loss, *terms, recipe.learning_rate * factor, seconds)
            print(*row, sep=",", file=log)
            bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
            # ---------------------------------------------------------- save
            is_last = step + 1 == recipe.steps
            stop = bool(signals) and not is_last  # read once, as a signal may come at any moment
            if (step + 1) % settings.save_every == 0 or is_last or stop:
                save_checkpoint(folder, model, optimiser, step + 1, training)
            if stop:
                break
    return signals[0] if stop else None


def wrap_for_processes(model, first, device):
    """The model to call in training, whose backward pass averages the processes' gradients.

    UserError if they do not begin at the same step.
    """
    if WORLD == 1:
        return model
    total = torch.tensor(first, device=device)
    dist.all_reduce(total)
    require(
        total == first * WORLD,
        "not all processes read the same checkpoint: can all of them see the run folder?",
    )
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextlib.contextmanager
def collect_signals():
    """Yield a list to which Ctrl-C and SIGTERM are added, so that the step that runs can end first.

    Processes do not wait for each other: torchrun signals all of them.
    """
    signals = []

    def remember(number, frame):
        signals.append(number)

    before_int = signal.signal(signal.SIGINT, remember)
    before_term = signal.signal(signal.SIGTERM, remember)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before_int)
        signal.signal(signal.SIGTERM, before_term)


# ------------------------------------------------------------------ files
def open_log(folder, first):
    """Open log.csv to append to it, with the rows up to step `first` of an earlier start."""
    path = folder / "log.csv"
    if RANK > 0:  # only the first process logs its losses
        path = Path(os.devnull)
    else:
        rows = [",".join(LOG_COLUMNS)]
        if first and path.is_file():
            for row in path.read_text(errors="replace").splitlines()[1:]:
                step = row.partition(",")[0]
                if step.isdecimal() and int(step) <= first:
                    rows.append(row)
        run.write_text(path, "\n".join(rows) + "\n")
    return open(path, "a", buffering=1)


def read_log(folder):
    """The columns of log.csv by name, one number a step. UserError if it is damaged."""
    path = folder / "log.csv"
    try:
        values = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
        return dict(zip(LOG_COLUMNS, values.T, strict=True))
    except (OSError, ValueError):
        raise UserError(
            f"training is complete, but {path} is gone or damaged: there is nothing to report "
            "or draw"
        ) from None


def save_checkpoint(folder, model, optimiser, step, training):
    """Write checkpoint.pt. Learning rate, data and random numbers follow from step and seed."""
    if RANK > 0:
        return
    content = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "training": training,
    }
    # A process that is killed while it writes leaves its temporary file.
    for left in folder.glob(".checkpoint.pt.*.tmp"):
        left.unlink()
    with run.whole_file(folder / "checkpoint.pt") as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's word for a full disk is "unexpected pos"
            raise UserError(
                f"no checkpoint could be written to {folder}, is the disk full? ({error})"
            ) from None


def load_checkpoint(folder, training):
    """The folder's checkpoint, or None. UserError if it is damaged or of another training."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return None
    try:
        checkpoint = run.read_checkpoint(path)
        step = checkpoint["step"]
        before = checkpoint["training"]
    except Exception as error:  # torch raises many types for a damaged file
        kind = type(error).__name__
        raise UserError(f"{path} cannot be read ({kind}): move it away to start anew") from None
    run.refuse_other_settings(path, before, training, "give another --out, or delete it")
    steps = training["recipe"]["steps"]
    then = "going on from there" if step < steps else "nothing is left to train"
    print(f"{path} holds step {step} of {steps}: {then}")
    return checkpoint


# ------------------------------------------------------------------ what is trained
def join_processes(device):
    """Join the processes that torchrun started. Each has a GPU of its own. The first one prints."""
    if device == "cuda":
        gpu = int(os.environ.get("LOCAL_RANK") or 0)
        gpus = torch.cuda.device_count()
        require(gpu < gpus, f"there are {gpus} GPUs: give torchrun no more --nproc_per_node")
        torch.cuda.set_device(gpu)
        torch.set_float32_matmul_precision("high")  # TF32
    if WORLD > 1:
        dist.init_process_group()  # NCCL between GPUs, Gloo between CPUs
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it stays open until the process ends


def choose_selection(settings, run_config, folder):
    """What is trained, as in selection.json. Without fusion, auxiliary and stride are None.

    UserError if that is no pair, or needs a folder of its own.
    """
    is_separate = folder.resolve() != settings.run.resolve()
    require(
        not (is_separate and (folder / "features").exists()),
        f"{folder} holds features, it is a run of its own: give another --out",
    )
    if settings.fusion == "none":
        return select_alone(settings, run_config, is_separate)
    return select_pair(settings, is_separate)


def select_pair(settings, is_separate):
    """selection.json with what the command line changes."""
    selection = run.read_stage(settings.run, "selection.json", "03_select.py")
    require(
        selection["auxiliary"],
        f"{settings.run} holds {selection['master']} without an auxiliary: give --fusion none",
    )
    requested = {}
    for part in ("master", "auxiliary", "stride"):
        if getattr(settings, part) is not None:
            requested[part] = getattr(settings, part)
    modes = (settings.fusion, settings.master_mode, settings.aux_mode)
    is_ablation = requested or modes != ("replace", "finetuned", "frozen")
    require(
        is_separate or not is_ablation,
        "an encoder, stride, fusion or mode other than selected needs its own folder with --out",
    )
    selection.update(requested)
    selection["chosen_by_hand"] = sorted({*selection["chosen_by_hand"], *requested})
    require(
        selection["master"] != selection["auxiliary"],
        f"master and auxiliary are both {selection['master']}: choose two, or --fusion none",
    )
    return selection


def select_alone(settings, run_config, is_separate):
    """The encoder of --fusion none: it is named, the run's only one, or the selected master."""
    require(
        settings.auxiliary is None and settings.stride is None,
        "--fusion none has no auxiliary: leave --auxiliary and --stride out",
    )
    selection = {"master": None, "auxiliary": None}
    if (settings.run / "selection.json").is_file():
        selection = run.read_stage(settings.run, "selection.json", "03_select.py")
    require(
        is_separate or selection["auxiliary"] is None,
        f"{settings.run} has a selected pair, so --fusion none needs its own folder with --out",
    )
    encoders = run_config["encoders"]
    master = settings.master or selection["master"]
    if master is None:
        require(len(encoders) == 1, f"choose one of {', '.join(encoders)} with --master")
        master = encoders[0]
    by_hand = ["master"] if settings.master else []
    return {"master": master, "auxiliary": None, "stride": None, "chosen_by_hand": by_hand}


def weights_as_measured(selection, run_config):
    """{encoder: weights} of those in use, and {encoder: where they come from}.

    UserError if they are not those that were measured.
    """
    weights = {}
    weights_from = {}
    for encoder in (selection["master"], selection["auxiliary"]):
        if encoder is None:
            continue
        # An encoder that was not measured can be trained all the same.
        weights[encoder] = run_config["weights"].get(encoder, "pretrained")
        now = weights_origin(encoder, weights[encoder])
        before = run_config["weights_from"].get(encoder, now)
        require(
            now == before,
            f"{encoder} was measured with other weights ({before}) than these ({now}): bring "
            "those back, or begin with 01_extract.py and another --run",
        )
        weights_from[encoder] = now
        if weights[encoder] == "none":
            print(f"WARNING: {encoder} starts from random weights")
    return weights, weights_from


def describe(model, training, samples, parts):
    """Print what is trained, on what, and for how long."""
    recipe = training["recipe"]
    print(f"master      {training['master']}, {training['master_mode']}")
    if training["fusion"] != "none":
        place = f"at stride {training['stride']} by {training['fusion']}"
        print(f"auxiliary   {training['auxiliary']}, {training['aux_mode']}, {place}")
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) / 1e6
    print(f"parameters  {learned:.2f} M learn, {frozen:.2f} M are frozen")
    classes = len(training["class_names"])
    print(f"data        {len(samples)} images of {samples.root}, {classes} classes")
    epochs = recipe["steps"] * recipe["batch_size"] / len(samples)
    steps = f"{recipe['steps']} steps of {recipe['batch_size']} images"
    print(f"schedule    {steps}, in {parts} part(s): {epochs:.1f} epochs")
    print("recipe      " + ", ".join(f"{name} {value}" for name, value in recipe.items()))


def report(folder):
    """Draw the losses, and print their means over the four quarters of the training."""
    log = read_log(folder)
    terms = ("loss", *LOSS_WEIGHTS)
    figures.draw_loss(folder / "loss.png", log, terms)
    rows = [["steps", *terms, "seconds"]]
    for quarter in np.array_split(np.arange(len(log["step"])), 4):
        if len(quarter) == 0:
            continue
        steps = log["step"][quarter]
        row = [f"{steps[0]:.0f}-{steps[-1]:.0f}"]
        for name in (*terms, "seconds"):
            row.append(run.number(log[name][quarter].mean(), 3))
        rows.append(row)
    print(f"\n{run.table(rows)}\nwrote {folder}/checkpoint.pt, log.csv, loss.png")
    print(f"next: {run.command('05_eval.py', folder)}")


def main():
    settings, changes = run.parse(__doc__, Settings, overrides=Recipe)
    join_processes(settings.device)
    folder = settings.out or settings.run
    run_config = run.read_stage(settings.run, "run.json", "01_extract.py")
    benchmark = run_config["benchmark"]
    require(
        benchmark,
        f"{settings.run} holds images without labels: training needs a run made with --benchmark",
    )
    selection = choose_selection(settings, run_config, folder)
    weights, weights_from = weights_as_measured(selection, run_config)
    # Random weights have nothing to keep, so they learn as fast as the decoder.
    if weights[selection["master"]] == "none":
        changes.setdefault("encoder_multiplier", 1.0)
    data = settings.data or Path(run_config["data"])
    require(data.is_dir(), f"there is no folder {data}: say where your data sets are with --data")
    samples = open_split(benchmark, data, "train")
    recipe = RECIPES.get(benchmark) or fit_recipe(samples, settings.device)
    recipe = choose_recipe(recipe, settings, changes)

    # All that decides the result. It is stored in the checkpoint, and a training only goes on from
    # a checkpoint that has the same.
    training = {
        "benchmark": benchmark,
        "master": selection["master"],
        "auxiliary": selection["auxiliary"],
        "stride": selection["stride"],
        "fusion": settings.fusion,
        "master_mode": settings.master_mode,
        "aux_mode": settings.aux_mode,
        "seed": run_config["seed"] if settings.seed is None else settings.seed,
        "parts": WORLD * settings.accumulate,  # of a batch, each with a loss of its own
        "weights": weights,
        "weights_from": weights_from,
        "train_images": len(samples),
        "class_names": [category.name for category in samples.categories],
        "isthing": [category.isthing for category in samples.categories],
        "recipe": asdict(recipe),
    }
    torch.manual_seed(training["seed"])
    model = build_model(training, weights)
    describe(model, training, samples, WORLD * settings.accumulate)
    if changes.get("steps") == 0:
        return None

    checkpoint = load_checkpoint(folder, training)
    # All checks have passed. The folder of an ablation gets what stage 5 and its reader need.
    if RANK == 0 and folder.resolve() != settings.run.resolve():
        run.write_json(folder / "run.json", run_config)
        run.write_json(folder / "selection.json", selection)
    ended_by = train(model, samples, training, settings, folder, checkpoint)
    if WORLD > 1:
        dist.destroy_process_group()
    if ended_by:
        print(f"\ninterrupted after a step; the same command goes on from {folder}/checkpoint.pt")
        return 128 + ended_by  # a shell's exit code for a signal
    if RANK == 0:
        report(folder)
    return None


if __name__ == "__main__":
    run.start(main)
