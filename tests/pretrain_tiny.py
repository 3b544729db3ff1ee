"""Make the two encoders that ship with the project: common/tiny_vit.safetensors and tiny_hiera.safetensors.

    python tests/pretrain_tiny.py tiny_hiera --steps 1500
    python tests/pretrain_tiny.py tiny_vit --steps 1500
    python tests/pretrain_tiny.py tiny_vit --teach boundaries --out vit_boundaries.safetensors    # for a study of leans

Both learn from random weights with stage 4's own loop, alone under a Mask2Former decoder that is then thrown away, on
the "pretrain" split of toycity: other textures, colours and layouts than the benchmark's splits. Their tasks differ as
those of their big relatives do. tiny_hiera sees masks without classes, as SAM2 does; tiny_vit sees the classes. With
--teach the same architecture can be taught another thing, which separates the two.
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
PRETRAIN = dict(
    palette=toycity.colours("3c6e96 d29646 965082 509682 dccdbe 6e4632 646490 be5a5a 464b3c 96a0aa"), leaf=3,
    greens=toycity.colours("285a46 787828 5a4628 46785a"), rough=0.85, pole=0.09, rows=6, people=26, asphalt=(60, 150),
    wall=(0.25, 1.0, 0.12, 0.4), green=0.4, paving=(2.0, 0.6, 0.5, 0.25), window=(0.38, 0.18), storey=4.2,
    front=(6, 11), tall=(4, 22), trees=(14, 40), road=(6.8, 8.4), walk=(1.6, 2.4), focal=(0.85, 1.05),
    horizon=(0.50, 0.58), eye=(2.0, 2.7), centre=(0.25, 0.75), pavement=1.15, bonnet=0.5,
)  # fmt: skip


class WithoutClasses(Dataset):
    """The same pictures without classes: all their segments, or one of the boundaries between them, two pixels wide."""

    def __init__(self, samples: Dataset, boundaries: bool):
        self.samples, self.boundaries = samples, boundaries

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        if not self.boundaries:
            return sample | {"labels": torch.zeros_like(sample["labels"])}
        segments = sample["segments"]
        edges = torch.zeros_like(segments)
        for a, b, edge_a, edge_b in (
            (segments[:-1], segments[1:], edges[:-1], edges[1:]),
            (segments[:, :-1], segments[:, 1:], edges[:, :-1], edges[:, 1:]),
        ):
            edge_a[a != b] = edge_b[a != b] = 1
        return sample | {"segments": edges, "labels": torch.zeros(1).long(), "crowd": torch.zeros(1).bool()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", choices=("tiny_vit", "tiny_hiera"))
    parser.add_argument("--teach", choices=("classes", "masks", "boundaries"), help="(default: as above)")
    parser.add_argument("--out", type=Path, help="file of the weights (default: the one that ships)")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--folder", type=Path, help="for the training (default: runs/pretrain_<encoder>_<teach>)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    usual = {"tiny_hiera": "masks", "tiny_vit": "classes"}[args.encoder]
    teach = args.teach or usual
    if teach != usual and not args.out:
        parser.error("--teach something else wants an --out: the file that ships stays as it is")
    folder = args.folder or Path("runs") / f"pretrain_{args.encoder}_{teach}"

    toycity.write(args.data / "pretrain/toycity", {"pretrain": args.scenes}, PRETRAIN)
    samples = Split(BENCHMARKS["toycity"], args.data / "pretrain", "toycity pretrain")
    class_names = [category.name for category in samples.categories]
    if teach != "classes":
        samples, class_names = WithoutClasses(samples, teach == "boundaries"), ["segment"]
    own = stage4.TINY | {"learning_rate": 1e-3, "master_rate": 1.0, "points": 2048}
    recipe = stage4.Recipe(args.steps, 4, (128, 256), (192, 384), **own)
    training = stage4.Training(
        benchmark=f"toycity_pretrain_{teach}",
        master=args.encoder,
        auxiliary=None,
        stride=16,
        fusion="none",
        master_mode="ft",
        aux_mode="fz",
        seed=args.seed,
        weights={args.encoder: "none"},
        weights_from={},
        train_images=len(samples),
        class_names=class_names,
        isthing=[False] * len(class_names),
        recipe=recipe,
    )

    torch.manual_seed(args.seed)
    model = build_model(dataclasses.asdict(training), weights={})
    checkpoint = stage4.load_checkpoint(folder, training)
    stage4.train(model, samples, training, stage4.Settings(), folder, checkpoint)

    path = args.out or Path(__file__).parents[1] / "common" / f"{args.encoder}.safetensors"
    with run.whole_file(path) as temporary:
        save_file({k: v.half().contiguous() for k, v in model.pyramid.master.model.state_dict().items()}, temporary)
    load_encoder(args.encoder, str(path))  # reads back
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
