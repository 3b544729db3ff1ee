"""Stage 4: train the fused model.

    python 04_train.py                                       the selection of runs/toycity
    python 04_train.py --out runs/stride8 --stride 8         an ablation, in a folder of its own; so is --fusion none
    python 04_train.py --steps 0                             only say what would be trained, and on what
    torchrun --nproc_per_node=8 -- 04_train.py --schedule mask2former …   16 images a step, two on each of eight GPUs
    python 04_train.py --accumulate 8 --schedule mask2former …            on one, in eight micro-batches

Each part of a batch has a loss of its own, over its own segments; the parts' gradients are averaged.

The master is fine-tuned at a tenth of the decoder's learning rate, the auxiliary stays frozen, and a Mask2Former
decoder is trained from scratch on both: one stage, one loss. A training that was interrupted, even killed, goes on with
the same command from its last checkpoint; on a CPU it ends at the same weights, to the last bit, as one that was not.

Reads run.json and selection.json of --run. Writes checkpoint.pt, log.csv and loss.png to --out (default: --run).
"""

import contextlib
import os
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from common import figures, run
from common.datasets import BENCHMARKS, open_split, working_size
from common.encoders import weights_origin
from common.model import FUSIONS, LOSS_WEIGHTS, PADDING, build_model
from common.run import CORES, DEVICES, UserError, flag, natural, need, positive

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

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

# torchrun starts WORLD processes, of which this one is number RANK; without it there is one.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOG = ("step", "loss", *LOSS_WEIGHTS, "learning_rate", "seconds")


# ------------------------------------------------------------------ settings
@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder")
    out: Path | None = flag(None, "folder for the training (default: the run folder)")
    data: Path | None = flag(None, "data root (default: as in stage 1)")
    master: str | None = flag(None, "instead of the selected one", metavar="NAME")
    auxiliary: str | None = flag(None, "instead of the selected one", metavar="NAME")
    stride: int | None = flag(None, "instead of the selected one", choices=(4, 8, 16, 32))
    schedule: str = flag("release", "the authors', 3 images a step; or 16", choices=("release", "mask2former"))
    fusion: str = flag("replace", "none: no auxiliary", choices=FUSIONS)
    master_mode: str = flag("ft", "fine-tuned or frozen", choices=("ft", "fz"))
    aux_mode: str = flag("fz", "fine-tuned or frozen", choices=("ft", "fz"))
    accumulate: int = flag(1, "micro-batches of a step, one after the other", type=positive)
    seed: int | None = flag(None, "(default: as in stage 1)", type=natural)
    device: str = flag(DEVICES[0], choices=DEVICES)
    workers: int = flag(CORES, "helpers beside each process", type=natural)


def crop_size(text):
    sides = tuple(int(side) if side.isdecimal() else 0 for side in text.split("x"))
    right = len(sides) == 2 and min(sides) > 0 and not any(side % 32 for side in sides)
    need(right, f"--crop {text}: expected HEIGHTxWIDTH in pixels, multiples of 32, as 512x1024")
    return sides


@dataclass(frozen=True)
class Recipe:
    """How a benchmark is trained, and at which size it is evaluated; pixels throughout. As it stands: street scenes,
    as the authors' release trains on them with one GPU."""

    steps: int = flag(180_000, "0: only say what would be done")
    batch: int = flag(3, "images a step, over all processes", type=positive)
    crop: tuple[int, int] = flag((512, 1024), "multiples of 32", type=crop_size, metavar="HxW")
    resize: tuple[int, int] = flag((512, 2048), "range of a side of the scaled image", nargs=2)
    resized_side: str = flag("short", "the side that --resize speaks of", choices=("short", "long"))
    longest: int = flag(4096, "limit of the scaled image's long side", type=positive)
    colour_jitter: bool = flag(True, "vary brightness, contrast, saturation and hue")
    test_size: str = flag("1024x2048", "of evaluation, as --size of stage 1")
    learning_rate: float = flag(1e-4, "of the decoder")
    master_rate: float = flag(0.1, "of the encoders, relative to the decoder's; 1 for a random master")
    drops: tuple[int, ...] = flag(
        (), "steps where the rate falls to a tenth; none: (1 - step / steps)^power", nargs="*"
    )
    power: float = flag(1.0, "of the falling rate")
    weight_decay: float = flag(0.05)
    clip: float = flag(0.01, "norm of the whole model's gradient")
    width: int = flag(256, "channels of the decoder", type=positive)
    queries: int = flag(100, "segments that it can find", type=positive)
    encoder_layers: int = flag(6, "of the pixel decoder", type=positive)
    decoder_layers: int = flag(9, "of the transformer decoder", type=positive)
    heads: int = flag(8, "of attention", type=positive)
    points: int = flag(12544, "sampled on each mask for the loss", type=positive)
    vit_widths: tuple[int, int, int, int] = flag((128, 256, 512, 1024), "channels of a ViT master's levels", nargs=4)
    save_every: int = flag(1000, "steps", type=positive)


COCO = {"colour_jitter": False, "test_size": "800/1333", "drops": (327_778, 355_092), "queries": 200}
COCO = Recipe(368_750, 3, (1024, 1024), (102, 2048), "long", **COCO)  # large-scale jitter: 0.1 to 2 times the crop
TINY = {"width": 64, "queries": 50, "encoder_layers": 2, "decoder_layers": 3, "heads": 4, "points": 1024}
TINY |= {"vit_widths": (32, 64, 64, 128), "colour_jitter": False, "save_every": 200, "learning_rate": 2e-3}
# What is trained for Cityscapes is street scenes; what has no recipe here gets one that fits it, by fit_recipe.
RECIPES = dict.fromkeys((name for name in BENCHMARKS if "cityscapes" in name), Recipe()) | {
    "coco_instance": COCO,
    "coco_panoptic": COCO,
    # What the release did on ADE20K is not known: this is Mask2Former's own.
    "ade20k_semantic": Recipe(160_000, 16, (640, 640), (320, 1280), longest=2560, test_size="640", power=0.9),
    "kitti360_instance": Recipe(crop=(384, 672), resize=(413, 752), longest=1504, test_size="own"),
    # Encoders of a million parameters, pretrained for minutes, have less to keep than real ones: a higher rate.
    "toycity": Recipe(900, 2, (160, 320), (188, 300), test_size="224", master_rate=0.4, **TINY),
}


@dataclass
class Training:
    """All that decides the result; kept in the checkpoint, which goes on with no other."""

    benchmark: str
    master: str
    auxiliary: str
    stride: int
    fusion: str
    master_mode: str
    aux_mode: str
    seed: int
    weights: dict[str, str]  # of each encoder, "pretrained", "none" or a file
    weights_from: dict[str, str]
    train_images: int
    class_names: list[str]
    isthing: list[bool]
    recipe: Recipe


def fit_recipe(samples, device):
    """A recipe for a data set that has none, by its pictures' number and median size, and the device.

    A crop is three quarters of a picture. Pictures are only scaled down, to 2^20 pixels on a GPU, with crops about as
    large as the release's; to 2^18 on a CPU, where a step takes a second or two.
    """
    sizes = [samples[i]["image"].shape[1:] for i in run.evenly_spaced(range(len(samples)), 25)]
    height, width = np.median(sizes, axis=0)
    print(f"a recipe for {len(samples)} pictures of some {height:.0f} x {width:.0f} pixels, on {device}")
    scale = min(1, (2 ** (20 if device == "cuda" else 18) / (height * width)) ** 0.5)
    short = max(32, round(scale * min(height, width)))
    fitted = {"crop": tuple(max(32, round(0.75 * scale * side / 32) * 32) for side in (height, width))}
    fitted |= {"resize": (round(0.75 * short), round(1.5 * short)), "test_size": str(short)}
    # A decoder from scratch needs some hundred steps for any data set. Epochs: a GPU's are near those of street scenes,
    # 180, and at most as many steps; a CPU's take an hour at most.
    epochs, least, most = (150, 5000, 180_000) if device == "cuda" else (10, 400, 2000)
    steps = min(max(least, epochs * len(samples) // 4), most)
    # toycity's rate does for a pretrained encoder too: on CamVid, 200 steps of an EfficientNet without auxiliary gave
    # mIoU 45.5 at 2e-3, 40.0 at 1e-3, 37.8 at 5e-4 (40 test pictures, one seed).
    return Recipe(steps, 4, **fitted, **({} if device == "cuda" else TINY))


def choose_recipe(recipe, changes, settings):
    """The recipe with what the command line changes; UserError for what cannot be."""
    steps, accumulate = changes.get("steps", 0), settings.accumulate
    if settings.schedule == "mask2former" and recipe.batch == 3:  # where the release has its own
        recipe = replace(recipe, batch=16, **({} if recipe.drops else {"steps": 90_000, "power": 0.9}))
    need(steps >= 0, f"--steps {steps}: may not be negative")
    if steps:
        changes = {"drops": tuple(round(drop * steps / recipe.steps) for drop in recipe.drops)} | changes
    recipe = replace(recipe, **changes | {"steps": steps or recipe.steps})
    numbers = (recipe.learning_rate, recipe.master_rate, recipe.clip, recipe.weight_decay, recipe.power)
    finite = np.isfinite(numbers).all()
    need(finite, "--learning-rate, --master-rate, --clip, --weight-decay, --power: expected finite numbers")
    above = min(recipe.learning_rate, recipe.master_rate, recipe.clip, *recipe.vit_widths) > 0
    need(above, "--learning-rate, --master-rate, --clip, --vit-widths: must be above 0")
    need(min(recipe.weight_decay, recipe.power) >= 0, "--weight-decay, --power: must not be below 0")
    need(0 < recipe.resize[0] <= recipe.resize[1], "--resize: expected two sides in pixels, the smaller one first")
    fits = recipe.width % 32 == 0 and recipe.width % recipe.heads == 0
    need(fits, f"--width {recipe.width}: must be a multiple of 32 and of --heads, {recipe.heads}")
    working_size(512, 512, recipe.test_size)  # refuses a size that means nothing
    shared = f"{WORLD} process(es) with --accumulate {accumulate}"
    even = recipe.batch % (WORLD * accumulate) == 0
    need(even, f"--batch {recipe.batch} cannot be shared evenly by {shared}: change one of these")
    return recipe


# ------------------------------------------------------------------ data
class TrainCrops:
    """An endless, shuffled, augmented stream over a data set: item n depends on the seed and n alone.

    So the order does not change with the number of workers or processes, and an interrupted training finds its place.
    """

    def __init__(self, samples, recipe, seed):
        self.samples, self.recipe, self.seed = samples, recipe, seed

    def __getitem__(self, n):
        epoch, place = divmod(n, len(self.samples))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.samples))
        return augment(self.samples[order[place]], self.recipe, np.random.default_rng((self.seed, 1, n)))


def augment(sample, recipe, rng):
    """Random scale, crop, flip and colours. Void, crowds and what lies outside the crop get no mask.

    Returns image float32 [3, h, w] in [0, 1], masks bool [S, h, w], labels int64 [S], and the picture's name; h and w
    the recipe's crop. Where a scaled image is smaller, it is padded below and to the right; no mask covers that.
    """
    height, width = sample["image"].shape[1:]
    crop_height, crop_width = recipe.crop
    scale = rng.uniform(*recipe.resize) / (min if recipe.resized_side == "short" else max)(height, width)
    scale = min(scale, recipe.longest / max(height, width))
    # The crop is cut from the original and then scaled, which spares scaling what is cut away.
    box_height, box_width = (max(1, round(side / scale)) for side in recipe.crop)
    box_height, box_width = min(height, box_height), min(width, box_width)
    size = (min(crop_height, max(1, round(height * scale))), min(crop_width, max(1, round(width * scale))))
    top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
    box = (top, left, box_height, box_width)
    image = TF.resize(TF.crop(sample["image"], *box), size, antialias=True).float() / 255

    if sample.get("rles"):  # masks that may overlap
        planes = torch.from_numpy(rle.decode(sample["rles"])).permute(2, 0, 1)  # [S, H, W]
    else:
        planes = sample.get("segments", torch.zeros(height, width))[None].float()  # [1, H, W]
    planes = F.interpolate(TF.crop(planes, *box)[:, None], size, mode="nearest-exact")[:, 0]  # [S or 1, *size]

    if rng.random() < 0.5:
        image, planes = image.flip(-1), planes.flip(-1)
    if recipe.colour_jitter:
        image = jitter_colours(image, rng)
    padding = (0, crop_width - size[1], 0, crop_height - size[0])
    image, planes = F.pad(image, padding, value=PADDING), F.pad(planes, padding)

    numbers = torch.arange(1, len(sample["labels"]) + 1)[:, None, None]
    masks = planes.bool() if sample.get("rles") else planes == numbers  # [S, h, w]
    seen = masks.flatten(1).any(1) & ~sample["crowd"]
    return {"image": image, "masks": masks[seen], "labels": sample["labels"][seen], "name": sample["name"]}


def jitter_colours(image, rng):
    """Vary brightness, contrast, saturation and hue, each in half of the images, as SSD does (Liu et al. 2016).

    image: float32 [3, h, w] in [0, 1].
    """
    changes = [
        lambda image: image + rng.uniform(-32, 32) / 255,
        lambda image: TF.adjust_saturation(image, rng.uniform(0.5, 1.5)),
        lambda image: TF.adjust_hue(image, rng.uniform(-0.1, 0.1)),  # of the circle; 18 in OpenCV's half degrees
    ]
    # Contrast changes before the colours or after them.
    changes.insert(rng.choice([1, 3]), lambda image: image * rng.uniform(0.5, 1.5))
    for change in changes:
        if rng.random() < 0.5:
            image = change(image).clamp(0, 1)
    return image


def load_micro_batches(samples, training, settings, first):
    """This process's micro-batches from step `first` on; those of all processes, in order of rank, are the batches.

    Yields images float32 [b, 3, h, w], and of each: masks float32 [S, h, w], labels int64 [S], name.
    """
    recipe, device, accumulate = training.recipe, settings.device, settings.accumulate
    size = recipe.batch // (WORLD * accumulate)  # images in a micro-batch
    parts = range(RANK * accumulate, (RANK + 1) * accumulate)
    starts = (step * recipe.batch + part * size for step in range(first, recipe.steps) for part in parts)
    places = (range(start, start + size) for start in starts)
    helpers = run.loader_arguments(settings.workers) | {"pin_memory": device == "cuda"}
    stream = TrainCrops(samples, recipe, training.seed)
    for crops in DataLoader(stream, batch_sampler=places, collate_fn=list, **helpers):
        images = torch.stack([crop["image"].to(device, non_blocking=True) for crop in crops])
        masks = [crop["masks"].to(device).float() for crop in crops]
        labels = [crop["labels"].to(device) for crop in crops]
        yield images, masks, labels, [crop["name"] for crop in crops]


# ------------------------------------------------------------------ training
def make_optimiser(model, recipe):
    """AdamW; encoders at `master_rate` of the rate, no weight decay on norms, biases, embeddings, position tables."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables = ("pos_embed", "rel_pos", "relative_position", "level_embed", "_token")
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        encoder = name.startswith(("pyramid.master.", "pyramid.auxiliary."))
        table = id(parameter) in embeddings or any(word in name for word in tables)
        decays = parameter.ndim > 1 and not table
        if parameter.requires_grad:
            groups[recipe.master_rate if encoder else 1.0, recipe.weight_decay if decays else 0.0].append(parameter)
    groups = [{"params": p, "rate": recipe.learning_rate * rate, "weight_decay": d} for (rate, d), p in groups.items()]
    return torch.optim.AdamW(groups, fused=True)


def schedule(step, recipe):
    """What the learning rates are multiplied by in a step, counted from 0."""
    if recipe.drops:
        return 0.1 ** sum(step >= drop for drop in recipe.drops)
    return (1 - step / recipe.steps) ** recipe.power


def begin(model, recipe, checkpoint):
    """What the forward pass goes through, so that processes average their gradients; the optimiser; the first step."""
    optimiser, first = make_optimiser(model, recipe), 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimiser.load_state_dict(checkpoint["optimiser"])
        first = checkpoint["step"]
        checkpoint.clear()  # it is as large as what it filled
    if WORLD == 1:
        return model, optimiser, first
    dist.all_reduce(total := torch.tensor(first, device=next(model.parameters()).device))
    need(total == first * WORLD, "not all processes read the same checkpoint: can all of them see the run folder?")
    return DistributedDataParallel(model, gradient_as_bucket_view=True), optimiser, first


@contextlib.contextmanager
def collect_signals():
    """Yield a list for Ctrl-C and SIGTERM, to be answered once the step is done; the second one ends it at once."""
    signals = []

    def answer(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        os.write(2, b"\nfinishing this step, then saving\n")  # print might be interrupted in the middle of itself

    before = {number: signal.signal(number, answer) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(model, samples, training, settings, folder, checkpoint=None):
    """Train for the recipe's steps, or for what is left of them after `checkpoint` (see load_checkpoint).

    Leaves checkpoint.pt and log.csv. Returns the signal that ended it early, or None; raises UserError for a loss or
    gradient that is not finite.
    """
    recipe, device, accumulate = training.recipe, settings.device, settings.accumulate
    learner, optimiser, first = begin(model.to(device).train(), recipe, checkpoint)
    micro_batches = load_micro_batches(samples, training, settings, first)
    bar = tqdm(range(first, recipe.steps), "training", recipe.steps, initial=first, unit="step", disable=RANK > 0)
    with collect_signals() as signals, open_log(folder, first) as log:
        for step in bar:
            # ---------------------------------------------------------- learning rate
            began, terms, pictures = time.perf_counter(), 0, []
            for group in optimiser.param_groups:  # "rate" is a group's own at the start
                group["lr"] = group["rate"] * schedule(step, recipe)

            for micro_batch in range(accumulate):
                # ------------------------------------------------------ forward
                images, masks, labels, names = next(micro_batches)
                pictures += names
                stopped = f"training stopped in step {step + 1}, images {', '.join(pictures)}"
                # The loss samples points, and no two micro-batches of a training draw them alike.
                part = RANK * accumulate + micro_batch
                torch.manual_seed(training.seed * 1_000_003 + step + (part << 40))
                learner.require_backward_grad_sync = micro_batch == accumulate - 1  # processes average only then
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    outputs = learner(images)
                # ------------------------------------------------------ loss
                try:
                    losses = model.losses(outputs, masks, labels)
                except FloatingPointError as error:
                    raise UserError(f"{stopped}: {error}") from None
                terms += torch.stack([loss.detach() for loss in losses.values()]) / accumulate
                # ------------------------------------------------------ backward
                (sum(losses.values()) / accumulate).backward()
            # ---------------------------------------------------------- clip
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            need(norm.isfinite(), f"{stopped}: the gradient is not finite")
            # ---------------------------------------------------------- step
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            # ---------------------------------------------------------- log
            shared = torch.cat([terms, terms.new_tensor([len(signals)])])
            if WORLD > 1:  # all must agree to stop: one that ended alone would leave the others waiting
                dist.all_reduce(shared)
            *terms, stop = (shared / WORLD).tolist()
            seconds = time.perf_counter() - began
            print(step + 1, sum(terms), *terms, group["lr"], seconds, sep=",", file=log)
            bar.set_postfix_str(f"loss {sum(terms):.2f}", refresh=False)
            # ---------------------------------------------------------- save
            last = step + 1 == recipe.steps
            if (step + 1) % recipe.save_every == 0 or last or stop:
                save_checkpoint(folder, model, optimiser, step + 1, training)
            if stop and not last:
                return signals[0] if signals else signal.SIGTERM


# ------------------------------------------------------------------ files
def open_log(folder, first):
    """log.csv, locked, and begun anew with a training; steps after the last checkpoint get a second row."""
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / "log.csv" if RANK == 0 else os.devnull, "a", buffering=1)  # noqa: SIM115
    if fcntl and RANK == 0:
        try:  # held until this process ends, in whichever way; its helpers do not inherit this kind
            fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another training is writing to {folder}: wait for it, or give another --out") from None
        except OSError as error:  # some network file systems have no locks
            print(f"WARNING: {folder} cannot be locked ({error}): let no other training write to it")
    if RANK == 0 and (not first or log.tell() == 0):
        log.truncate(0)
        print(*LOG, sep=",", file=log)
    return log


def read_log(folder):
    """The columns of log.csv by name, one number a step, of its last row; UserError if it is gone."""
    path = folder / "log.csv"
    try:
        rows = {row[0]: row for row in np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)}
        return dict(zip(LOG, np.array([rows[step] for step in sorted(rows)]).T, strict=True))
    except (OSError, ValueError):
        raise UserError(f"training is complete, but {path} is gone or damaged: nothing to report or draw") from None


def save_checkpoint(folder, model, optimiser, step, training):
    """Schedule, place in the data and random numbers all follow from the step and the seed."""
    content = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
    content |= {"step": step, "settings": asdict(training)}
    if RANK == 0:
        for left in folder.glob(".checkpoint.pt.*.tmp"):  # by a process that was killed while it wrote
            left.unlink()
        with run.whole_file(folder / "checkpoint.pt") as temporary:
            try:
                torch.save(content, temporary)
            except RuntimeError as error:  # torch's word for a full disk is "unexpected pos"
                raise UserError(f"no checkpoint could be written to {folder}, is the disk full? ({error})") from None


def load_checkpoint(folder, training):
    """The folder's checkpoint, or None; UserError if it is damaged or was made with other settings."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return None
    try:
        checkpoint = run.read_checkpoint(path)
        step, settings = checkpoint["step"], checkpoint["settings"]
    except Exception as error:  # torch raises many types for a damaged file
        raise UserError(f"{path} cannot be read ({type(error).__name__}): move it away to start anew") from None
    run.refuse_other_settings(path, settings, asdict(training), "give another --out, or delete it")
    then = "going on from there" if step < training.recipe.steps else "nothing is left to train"
    print(f"{path} holds step {step} of {training.recipe.steps}: {then}")
    return checkpoint


# ------------------------------------------------------------------ the stage
def join_processes(device):
    """Meet the others that torchrun started, each with a GPU of its own where there are some; the first one prints."""
    if device == "cuda":
        mine, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        need(mine < there, f"there are {there} GPUs: give torchrun no more --nproc_per_node")
        torch.cuda.set_device(mine)
        torch.set_float32_matmul_precision("high")  # TF32
    if WORLD > 1:
        dist.init_process_group()  # NCCL between GPUs, Gloo between CPUs
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends


def choose_pair(settings, selection, folder):
    """The selection with what the command line changes; UserError if that is no pair or needs a folder of its own."""
    given = {name: getattr(settings, name) for name in ("master", "auxiliary", "stride")}
    given = {name: value for name, value in given.items() if value is not None}
    method = (settings.fusion, settings.master_mode, settings.aux_mode) == ("replace", "ft", "fz")
    own = folder.resolve() != settings.run.resolve()
    need(own or method and not given, f"this is not the selection of {settings.run}: give it its own folder with --out")
    fresh = not (own and (folder / "features").exists())
    need(fresh, f"{folder} holds features, it is a run of its own: give another --out")
    selection |= given | {"chosen_by_hand": sorted({*selection["chosen_by_hand"], *given})}
    pair = settings.fusion == "none" or selection["master"] != selection["auxiliary"]
    need(pair, f"master and auxiliary are both {selection['master']}: choose two, or --fusion none")
    return selection


def plan(settings, changes, found, selection):
    """What is trained, from run.json, the selection and the command line, and on what; UserError for what cannot be."""
    names = ("master", "auxiliary") if settings.fusion != "none" else ("master",)
    weights = {selection[name]: found["weights"].get(selection[name], "pretrained") for name in names}
    weights_from = {encoder: weights_origin(encoder, kind) for encoder, kind in weights.items()}
    for encoder, now in weights_from.items():
        before = found["weights_from"].get(encoder, now)
        advice = "bring those back, or begin with 01_extract.py and another --run"
        need(now == before, f"{encoder} was measured with other weights ({before}) than these ({now}): {advice}")
        if weights[encoder] == "none":
            print(f"WARNING: {encoder} starts from random weights")
    # Random weights have nothing to keep, and learn as fast as the decoder.
    if weights[selection["master"]] == "none":
        changes = {"master_rate": 1.0} | changes
    data = settings.data or Path(found["data"])
    need(data.is_dir(), f"there is no folder {data}: say where your data sets are with --data")
    samples = open_split(found["benchmark"], data, "train")
    recipe = RECIPES.get(found["benchmark"]) or fit_recipe(samples, settings.device)
    recipe = choose_recipe(recipe, changes, settings)

    facts = found | vars(settings) | selection  # the later the stronger: the pair stands in the selection
    facts |= {"recipe": recipe, "weights": weights, "weights_from": weights_from, "train_images": len(samples)}
    facts["seed"] = found["seed"] if settings.seed is None else settings.seed
    facts["class_names"] = [category.name for category in samples.categories]
    facts["isthing"] = [category.isthing for category in samples.categories]
    return Training(**{field.name: facts[field.name] for field in fields(Training)}), samples


def describe(model, training, samples, parts):
    """What is trained, on what, and for how long."""
    recipe, mode = training.recipe, {"ft": "fine-tuned", "fz": "frozen"}
    print(f"master      {training.master}, {mode[training.master_mode]}")
    if training.fusion != "none":
        how = f"{mode[training.aux_mode]}, at stride {training.stride} by {training.fusion}"
        print(f"auxiliary   {training.auxiliary}, {how}")
    learn, fixed = (sum(p.numel() for p in model.parameters() if p.requires_grad is on) / 1e6 for on in (True, False))
    print(f"parameters  {learn:.2f} M learn, {fixed:.2f} M are frozen")
    print(f"data        {len(samples)} images of {samples.root}, {len(training.class_names)} classes")
    epochs = recipe.steps * recipe.batch / len(samples)
    print(f"schedule    {recipe.steps} steps of {recipe.batch} images, in {parts} part(s): {epochs:.1f} epochs")
    print("recipe      " + ", ".join(f"{name} {value}" for name, value in asdict(recipe).items()))


def report(folder):
    """Draw the losses, and print their means over the four quarters of the training."""
    log, terms = read_log(folder), ("loss", *LOSS_WEIGHTS)
    figures.draw_loss(folder / "loss.png", log, terms)
    rows = [["steps", *terms, "seconds"]]
    for quarter in filter(len, np.array_split(np.arange(len(log["step"])), 4)):
        means = (run.number(log[name][quarter].mean(), 3) for name in (*terms, "seconds"))
        rows.append([f"{quarter[0] + 1}-{quarter[-1] + 1}", *means])
    print(f"\n{run.table(rows)}\nwrote {folder}/checkpoint.pt, log.csv, loss.png")
    print(f"next: {run.command('05_eval.py', folder)}")


def main():
    settings, changes = run.parse(__doc__, Settings, Recipe)
    join_processes(settings.device)
    folder = settings.out or settings.run
    found = run.read_stage(settings.run, "run.json", "01_extract.py")
    selection = run.read_stage(settings.run, "selection.json", "03_select.py")
    labelled = found["benchmark"] is not None
    need(labelled, f"{settings.run} holds pictures without labels: training needs a run made with --benchmark")
    selection = choose_pair(settings, selection, folder)
    training, samples = plan(settings, changes, found, selection)
    torch.manual_seed(training.seed)
    model = build_model(asdict(training), training.weights)
    describe(model, training, samples, WORLD * settings.accumulate)
    if changes.get("steps") == 0:
        return None

    checkpoint = load_checkpoint(folder, training)
    # Nothing was refused: an ablation's folder becomes a run of its own.
    if RANK == 0 and folder.resolve() != settings.run.resolve():
        run.write_json(folder / "run.json", found)
        run.write_json(folder / "selection.json", selection)
    ended_by = train(model, samples, training, settings, folder, checkpoint)
    if WORLD > 1:
        dist.destroy_process_group()
    if ended_by:
        print(f"\ninterrupted; {folder}/checkpoint.pt is up to date, and the same command goes on from there")
        return 128 + ended_by
    if RANK == 0:
        report(folder)
    return None


if __name__ == "__main__":
    run.start(main)
