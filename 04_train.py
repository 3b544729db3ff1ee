"""Stage 4: train the fused model.

    python 04_train.py                                       the selection of runs/toycity
    python 04_train.py --out runs/stride8 --stride 8         an ablation: other stride, own folder
    python 04_train.py --out runs/alone --fusion none        the master alone

The master is fine-tuned at a tenth of the decoder's learning rate, the auxiliary stays frozen, and a Mask2Former
decoder is trained from scratch on both: one stage, one loss. A training that was interrupted goes on with the same
command from its last checkpoint, and ends at the same weights as one that was not.

Reads run.json and selection.json of --run. Writes checkpoint.pt, log.csv and loss.png to --out (default: --run).
"""

import csv
import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import figures, run
from common.benchmarks import open_split
from common.encoders import weights_origin
from common.model import LOSS_WEIGHTS, FusedModel, build_model
from common.run import UserError

# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Recipe:
    """How one benchmark is trained and at which size it is evaluated; pixels throughout."""

    steps: int
    batch: int
    learning_rate: float  # of the decoder
    short_side: tuple[int, int]  # the image is scaled so that its short side falls between these
    crop: tuple[int, int]  # height and width, multiples of 32
    test_size: str  # as --size of stage 1
    width: int  # channels of the decoder
    queries: int
    encoder_layers: int  # of the pixel decoder
    decoder_layers: int  # of the transformer decoder
    heads: int
    points: int  # sampled on each mask for the loss
    vit_widths: tuple[int, int, int, int]  # of a ViT master's levels
    master_rate: float = 0.1  # learning rate of the encoders relative to the decoder's; 1 where they start at random
    weight_decay: float = 0.05
    clip: float = 0.01  # norm of the whole model's gradient
    save_every: int = 200


RECIPES = {
    "toycity": Recipe(
        steps=1200,
        batch=4,
        learning_rate=2e-3,
        short_side=(208, 336),
        crop=(128, 256),
        test_size="256",
        width=64,
        queries=50,
        encoder_layers=2,
        decoder_layers=3,
        heads=4,
        points=1024,
        vit_widths=(32, 64, 64, 128),
    )
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
    parser.add_argument("--steps", type=run.positive, help="instead of the recipe's")
    parser.add_argument("--batch", type=run.positive, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, help="(default: as in stage 1)")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------- data


class TrainCrops(Dataset):
    """An endless, shuffled, augmented stream over a data set: item n depends on the seed and n alone.

    So the order does not change with the number of workers, and an interrupted training finds its place again.
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
    """Random scale, crop and flip. Masks are made after the crop; void and crowds get none.

    Returns image float32 [3, h, w] in [0, 1], masks bool [S, h, w] and labels int64 [S], h and w the recipe's crop.
    """
    height, width = sample["image"].shape[1:]
    crop_height, crop_width = recipe.crop
    scale = rng.uniform(*recipe.short_side) / min(height, width)
    # The crop is cut from the original and then scaled, which spares scaling what is cut away.
    box_height, box_width = min(height, round(crop_height / scale)), min(width, round(crop_width / scale))
    size = (min(crop_height, round(height * scale)), min(crop_width, round(width * scale)))  # of the box once scaled
    top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
    image = TF.crop(sample["image"], top, left, box_height, box_width)
    segments = TF.crop(sample["segments"], top, left, box_height, box_width)
    image = TF.resize(image, size, antialias=True).float() / 255
    segments = F.interpolate(segments[None, None].float(), size, mode="nearest-exact")[0, 0].int()
    if rng.random() < 0.5:
        image, segments = image.flip(-1), segments.flip(-1)
    padding = (0, crop_width - size[1], 0, crop_height - size[0])  # where the scaled image is smaller than the crop
    image, segments = F.pad(image, padding), F.pad(segments, padding)

    present = segments.unique()
    present = present[present > 0].long()
    present = present[~sample["crowd"][present - 1]]
    return {"image": image, "masks": segments == present[:, None, None], "labels": sample["labels"][present - 1]}


def collate(items: list[dict]) -> tuple[torch.Tensor, list, list]:
    """Images become one tensor [B, 3, h, w]; masks and labels stay lists, each image has its own number."""
    return torch.stack([i["image"] for i in items]), [i["masks"] for i in items], [i["labels"] for i in items]


# ---------------------------------------------------------------------------------------------- training


def make_optimiser(model: FusedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; encoders at `master_rate` of the learning rate, no weight decay on norms, biases and embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            encoder = name.startswith(("pyramid.master.", "pyramid.auxiliary."))
            table = id(parameter) in embeddings or any(word in name for word in ("pos_embed", "level_embed", "_token"))
            groups.setdefault((encoder, parameter.ndim > 1 and not table), []).append(parameter)
    return torch.optim.AdamW(
        {
            "params": parameters,
            "rate": recipe.learning_rate * (recipe.master_rate if encoder else 1.0),
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for (encoder, decays), parameters in groups.items()
    )


def train(
    model: FusedModel,
    samples: Dataset,
    recipe: Recipe,
    settings: dict,
    folder: Path,
    checkpoint: dict | None = None,
    device: str = "cpu",
    workers: int = 2,
) -> None:
    """Train for the recipe's steps, or for what is left of them after `checkpoint` (see load_checkpoint).

    settings: what decides the result, its seed among it; kept in the checkpoint. Leaves checkpoint.pt (model,
    optimiser, step, settings), the one before it, and log.csv. Raises UserError when a loss is not finite.
    """
    model.to(device).train()
    optimiser = make_optimiser(model, recipe)
    first = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimiser.load_state_dict(checkpoint["optimiser"])
        first = checkpoint["step"]
        print(f"{folder / 'checkpoint.pt'} holds step {first} of {recipe.steps}: going on from there")

    log = read_log(folder)[:first] if first else []
    crops = TrainCrops(samples, recipe, settings["seed"])
    loader = DataLoader(
        crops,
        recipe.batch,
        sampler=range(first * recipe.batch, len(crops)),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=run.leave_interrupts_to_the_parent,
    )
    bar = tqdm(loader, "training", initial=first, total=recipe.steps, unit="step")
    for step, (images, masks, labels) in enumerate(bar, first):
        started = time.perf_counter()
        torch.manual_seed(settings["seed"] * 1_000_003 + step)  # the loss samples points: a resumed run draws the same
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * (1 - step / recipe.steps) ** 0.9

        outputs = model(images.to(device))
        try:
            losses = model.losses(outputs, [m.to(device).float() for m in masks], [k.to(device) for k in labels])
        except FloatingPointError as error:
            raise UserError(f"training stopped at step {step}: {error}; {folder} keeps its last checkpoint") from None
        loss = sum(losses.values())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

        terms = {name: value.item() for name, value in losses.items()}
        row = {"step": step + 1, "loss": loss.item(), **terms, "learning_rate": optimiser.param_groups[-1]["lr"]}
        log.append(row | {"seconds": time.perf_counter() - started})
        bar.set_postfix(loss=f"{sum(r['loss'] for r in log[-50:]) / len(log[-50:]):.2f}")
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            save_checkpoint(folder, model, optimiser, step + 1, settings, log)


def save_checkpoint(folder: Path, model: nn.Module, optimiser, step: int, settings: dict, log: list[dict]) -> None:
    """Bring log.csv up to date, write checkpoint.pt whole, and keep the one before it as checkpoint_previous.pt."""
    with run.whole_file(folder / "log.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, log[0])
        writer.writeheader()
        writer.writerows(log)
    content = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "settings": settings}
    path = folder / "checkpoint.pt"
    with run.whole_file(path) as temporary:
        torch.save(content, temporary)
        if path.is_file():
            os.replace(path, folder / "checkpoint_previous.pt")


def read_log(folder: Path) -> list[dict[str, float]]:
    if not (folder / "log.csv").is_file():
        return []
    with open(folder / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def load_checkpoint(folder: Path, settings: dict) -> dict | None:
    """The folder's newest readable checkpoint, or None; UserError if it was made with other settings."""
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        if not (folder / name).is_file():
            continue
        try:
            checkpoint = torch.load(folder / name, "cpu", weights_only=True)
        except Exception as error:  # torch raises many types for a damaged file
            print(f"{folder / name} cannot be read ({type(error).__name__}): trying the one before it")
            continue
        run.same_settings(folder / name, checkpoint["settings"], settings, "give another --out, or delete it")
        return checkpoint
    return None


def main():
    args = parse_arguments()
    source = args.run
    asked = run.read_stage(source, "run.json", "01_extract.py")
    selection = run.read_stage(source, "selection.json", "03_select.py")
    name = asked["benchmark"]
    if name is None:
        raise UserError(f"{source} holds pictures without labels: training needs a run made with --benchmark")
    if name not in RECIPES:
        raise UserError(f"there is no training recipe for {name} yet; there is one for {', '.join(RECIPES)}")

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
    changes = {key: getattr(args, key) for key in ("steps", "batch") if getattr(args, key)}
    if weights[selection["master"]] == "none":
        changes["master_rate"] = 1.0
    recipe = dataclasses.replace(RECIPES[name], **changes)
    samples = open_split(name, args.data or Path(asked["data"]), "train")
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
    settings |= {"classes": [name for _, name, _ in samples.categories]}
    settings |= {"isthing": [isthing for _, _, isthing in samples.categories], **dataclasses.asdict(recipe)}

    checkpoint = load_checkpoint(folder, settings)  # refuses a folder of other settings before anything is written
    if folder.resolve() != source.resolve():
        extraction = {key: value for key, value in asked.items() if key not in ("command", "versions")}
        run.open_run(folder, extraction, asked["command"])
        run.write_json(folder / "selection.json", selection)

    for encoder in used:
        if weights[encoder] == "none":
            print(f"WARNING: {encoder} starts from random weights")
    run.seed_everything(settings["seed"])
    model = build_model(settings, weights)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    what = f"{settings['master']} ({args.master_mode})"
    if args.fusion != "none":
        what += f", {settings['auxiliary']} ({args.aux_mode}) at stride {settings['stride']} by {args.fusion}"
    print(f"{what}: {trainable / 1e6:.2f} M parameters learn, {frozen / 1e6:.2f} M are frozen; {len(samples)} images")
    train(model, samples, recipe, settings, folder, checkpoint, args.device, args.workers)

    # What came of it
    log = read_log(folder)
    if not log:
        raise UserError(f"training is complete, but {folder}/log.csv is gone: nothing to report or draw")
    figures.draw_loss(folder / "loss.png", log)
    print(f"\n{'steps':>12} {'loss':>8} " + " ".join(f"{name:>14}" for name in LOSS_WEIGHTS) + f" {'s/step':>8}")
    edges = sorted({0, len(log) // 4, len(log) // 2, 3 * len(log) // 4, len(log)})
    for begin, end in zip(edges, edges[1:], strict=False):
        mean = {key: np.mean([row[key] for row in log[begin:end]]) for key in log[0]}
        terms = " ".join(f"{mean[name]:>14.3f}" for name in LOSS_WEIGHTS)
        print(f"{f'{begin + 1}-{end}':>12} {mean['loss']:>8.3f} {terms} {mean['seconds']:>8.3f}")
    print(f"\nwrote {folder}/checkpoint.pt, log.csv, loss.png")
    print(f"next: {run.command('05_eval.py', folder)}")


if __name__ == "__main__":
    run.start(main)
