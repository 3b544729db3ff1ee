"""Make the two encoders that ship with the project: common/tiny_vit and tiny_hiera.safetensors.

    python tests/pretrain_tiny.py tiny_hiera --steps 1500
    python tests/pretrain_tiny.py tiny_vit --steps 1500

For a study of leans, an encoder can be taught something else:

    python tests/pretrain_tiny.py tiny_vit --teach boundaries --out vit_boundaries.safetensors

Both learn from random weights with stage 4's own loop, alone under a Mask2Former decoder that is
then thrown away. They learn on the "pretrain" split of toycity, which has other textures, colours
and layouts than the benchmark's splits. Their tasks differ as those of their big relatives do.
tiny_hiera sees masks without classes, as SAM2 does, and tiny_vit sees the classes. With --teach the
same architecture learns another task, which separates the two.
"""

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import run, toycity  # noqa: E402
from common.datasets import BENCHMARKS, Split  # noqa: E402
from common.encoders import load_encoder  # noqa: E402
from common.model import build_model  # noqa: E402

stage4 = importlib.import_module("04_train")

# Another kind of city than toycity.STREET: other colours, textures and geometry.
PALETTE = "3c6e96 d29646 965082 509682 dccdbe 6e4632 646490 be5a5a 464b3c 96a0aa"
PRETRAIN = dict(
    palette=toycity.colours(PALETTE),
    greens=toycity.colours("285a46 787828 5a4628 46785a"), rough=0.85, leaf=3, pole=0.09, rows=6,
    people=26, asphalt=(60, 150), wall=(0.25, 1.0, 0.12, 0.4), green=0.4,
    paving=(2.0, 0.6, 0.5, 0.25), window=(0.38, 0.18), storey=4.2, front=(6, 11), tall=(4, 22),
    trees=(14, 40), road=(6.8, 8.4), walk=(1.6, 2.4), focal=(0.85, 1.05), horizon=(0.50, 0.58),
    eye=(2.0, 2.7), centre=(0.25, 0.75), pavement=1.15, bonnet=0.5,
)  # fmt: skip


class WithoutClasses(Dataset):
    """The same images without classes.

    What is left are all their segments, or one segment that is the boundaries between them, two
    pixels wide.
    """

    def __init__(self, samples: Dataset, boundaries: bool):
        self.samples = samples
        self.boundaries = boundaries

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = dict(self.samples[index])
        sample["labels"] = torch.zeros_like(sample["labels"])
        if self.boundaries:
            sample["segments"] = boundaries_of(sample["segments"])
            sample["labels"] = torch.zeros(1, dtype=torch.int64)
            sample["iscrowd"] = torch.zeros(1, dtype=torch.bool)
        return sample


def boundaries_of(segments: torch.Tensor) -> torch.Tensor:
    """1 on both sides of each boundary between segments [H, W], 0 elsewhere."""
    boundaries = torch.zeros_like(segments)
    below = segments[:-1] != segments[1:]
    boundaries[:-1][below] = 1
    boundaries[1:][below] = 1
    beside = segments[:, :-1] != segments[:, 1:]
    boundaries[:, :-1][beside] = 1
    boundaries[:, 1:][beside] = 1
    return boundaries


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("encoder", choices=("tiny_vit", "tiny_hiera"))
    teach_help = "(default: masks for tiny_hiera, classes for tiny_vit)"
    parser.add_argument("--teach", choices=("classes", "masks", "boundaries"), help=teach_help)
    parser.add_argument(
        "--out", type=Path, help="file of the weights (default: the one that ships)"
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--data", type=Path, default=Path("data"))
    folder_help = "for the training (default: runs/pretrain_<encoder>_<teach>)"
    parser.add_argument("--folder", type=Path, help=folder_help)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    usual = {"tiny_hiera": "masks", "tiny_vit": "classes"}[args.encoder]
    teach = args.teach or usual
    if teach != usual and not args.out:
        parser.error("--teach something else wants an --out: the file that ships stays as it is")
    folder = args.folder or Path("runs") / f"pretrain_{args.encoder}_{teach}"

    root = args.data / "pretrain" / "toycity"
    toycity.write(root, {"pretrain": args.scenes}, PRETRAIN)
    benchmark = BENCHMARKS["toycity"]
    layout = benchmark.train_on.find(benchmark.train_on, root, "pretrain", benchmark.task)
    samples = Split(root, layout, benchmark)
    class_names = [category.name for category in samples.categories]
    if teach != "classes":
        samples = WithoutClasses(samples, teach == "boundaries")
        class_names = ["segment"]

    recipe = dataclasses.replace(
        stage4.RECIPES["toycity"],
        steps=args.steps,
        batch_size=4,
        crop=(128, 256),
        resize=(192, 384),
        learning_rate=1e-3,
        encoder_multiplier=1.0,
        sample_points=2048,
    )
    training = {
        "benchmark": f"toycity_pretrain_{teach}",
        "master": args.encoder,
        "auxiliary": None,
        "stride": None,
        "fusion": "none",
        "master_mode": "finetuned",
        "aux_mode": "frozen",
        "seed": args.seed,
        "parts": 1,
        "weights": {args.encoder: "none"},
        "weights_from": {},
        "train_images": len(samples),
        "class_names": class_names,
        "isthing": [False] * len(class_names),
        "recipe": dataclasses.asdict(recipe),
    }

    torch.manual_seed(args.seed)
    model = build_model(training, weights={})
    checkpoint = stage4.load_checkpoint(folder, training)
    stage4.train(model, samples, training, stage4.Settings(), folder, checkpoint)

    path = args.out or Path(__file__).parents[1] / "common" / f"{args.encoder}.safetensors"
    tensors = {}
    for name, tensor in model.pyramid.master.model.state_dict().items():
        tensors[name] = tensor.half().contiguous()
    with run.whole_file(path) as temporary:
        save_file(tensors, temporary)
    load_encoder(args.encoder, str(path))  # It must read back.
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
