"""Stage 1: run frozen encoders over pictures and keep their feature maps.

    python 01_extract.py                                                     the embedded benchmark, toycity
    python 01_extract.py --images holiday/ --encoders dinov3_b sam2_b        your own pictures, no labels needed
    python 01_extract.py --benchmark cityscapes_instance --data /datasets --encoders dinov3_b sam2_b
    torchrun --nproc_per_node=4 -- 01_extract.py …                           the pictures shared by four GPUs

Each picture is scaled to a working size and passes once through each encoder; only the native maps are stored, in
float16. A picture whose file is already there and whole is skipped, so an interrupted run goes on where it stopped. A
picture that cannot be read is named and left out.

Writes run.json, features/<encoder>/<picture>.safetensors and features.png to the run folder.
"""

import shlex
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import figures, run
from common.benchmarks import (
    find_benchmark,
    list_pictures,
    open_split,
    read_image,
    resize_image,
    without_a_file_name,
    working_size,
)
from common.encoders import ENCODERS, find_encoder, load_encoder, weights_origin
from common.run import UserError

# ---------------------------------------------------------------------------------------------- settings


def parse_arguments():
    parser = run.arguments(__doc__)
    known = f"of {', '.join(ENCODERS)}, or timm:NAME for a model of timm (default: tiny_vit tiny_hiera)"
    parser.set_defaults(run=None)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--benchmark", default="toycity", help="whose training pictures to take (default: toycity)")
    source.add_argument("--images", type=Path, metavar="FOLDER", help="take the pictures of a folder instead")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    parser.add_argument("--encoders", nargs="+", default=["tiny_vit", "tiny_hiera"], metavar="NAME", help=known)
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["pretrained"],
        metavar="pretrained|none|NAME=FILE",
        help="for all encoders, or a checkpoint file for one of them (default: pretrained)",
    )
    parser.add_argument(
        "--limit", type=run.positive, help="pictures, evenly spaced (default: 24 for toycity, else 200)"
    )
    parser.add_argument("--size", help="HEIGHTxWIDTH, a short side, SHORT/LONGEST, own (default: the benchmark's)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    return parser.parse_args()


def choose_weights(encoders: list[str], words: list[str]) -> dict[str, str]:
    """--weights as {encoder: "pretrained", "none" or a file}; UserError for words that mean nothing here."""
    if len(set(encoders)) < len(encoders):
        raise UserError(f"--encoders names one of {', '.join(encoders)} twice")
    weights = dict.fromkeys(encoders, "pretrained")
    for word in sorted(words, key=lambda word: "=" in word):  # single encoders overrule the word for all
        name, equals, file = word.partition("=")
        if equals and name in encoders:
            weights[name] = str(Path(file).resolve())
        elif word in ("pretrained", "none"):
            weights = dict.fromkeys(encoders, word)
        else:
            raise UserError(f"--weights {word}: expected pretrained, none, or NAME=FILE with NAME one of --encoders")
    return weights


# ---------------------------------------------------------------------------------------------- extraction


def look_at(pictures: "Pictures", workers: int) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Read every picture once, which costs little beside an encoder, so that all that follows can rely on it.

    Returns {name: height and width at the working size}, and {name: reason} of those that cannot be used.
    """

    def look(name: str) -> tuple[int, int] | str:
        try:
            height, width = read_image(pictures.root / name).shape[1:]
        except UserError as error:
            return str(error)
        if "x" not in pictures.size and max(height, width) > 16 * min(height, width):
            return f"{pictures.root / name} is {height} x {width}, too long for its aspect to be kept: give --size HxW"
        return working_size(height, width, pictures.size)

    with ThreadPoolExecutor(workers) as pool:
        found = list(
            tqdm(
                pool.map(look, pictures.names),
                "reading",
                len(pictures),
                unit="picture",
                disable=not pictures.names or run.rank() > 0,
            )
        )
    found = dict(zip(pictures.names, found, strict=True))
    reasons = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    return {name: size for name, size in found.items() if name not in reasons}, reasons


class Pictures(Dataset):
    """Pictures at their working size: (name, float32 [3, H, W] in [0, 1])."""

    def __init__(self, root: Path, names: list[str], size: str):
        self.root, self.names, self.size = root, names, size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        return self.names[index], resize_image(read_image(self.root / self.names[index]), self.size)


def unfinished(folder: Path, encoder: str, names: list[str]) -> list[str]:
    """The pictures without a whole feature file; damaged files are named on the screen."""
    todo = []
    for name in names:
        path = run.feature_path(folder, encoder, name)
        try:
            safe_open(path, "pt")  # compares the file's length with what its header promises
        except FileNotFoundError:
            todo.append(name)
        except SafetensorError as error:
            print(f"{path} is damaged ({error}): extracting it again")
            todo.append(name)
    return todo


def bytes_to_write(shape: tuple[int, int], channels: dict[int, int]) -> int:
    """Of one picture's maps in float16; shape: height and width in pixels, channels: {native stride: C}."""
    return sum(2 * c * (shape[0] // s) * (shape[1] // s) for s, c in channels.items())


def need_disk(folder: Path, gigabytes: float) -> None:
    """Raise UserError if `folder`'s disk has less than `gigabytes` (and 5 % of them for good measure) free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    if free < 1.05 * gigabytes:
        raise UserError(
            f"{folder.absolute()} has {free:.2f} GB free, {gigabytes:.2f} GB are needed: "
            "free some, choose a --run on another disk, or lower --limit or --size"
        )


@torch.inference_mode()
def extract(encoder, pictures: Pictures, folder: Path, device: str, workers: int) -> None:
    """One file a picture; one picture at a time, as a folder may hold many sizes."""
    loader = DataLoader(
        pictures,
        batch_size=None,
        num_workers=workers,
        pin_memory=device == "cuda",
        worker_init_fn=run.leave_interrupts_to_the_parent,
    )
    writing = deque()
    with ThreadPoolExecutor(1) as writer:  # the encoder goes on while files are written, a few pictures ahead at most
        for name, image in tqdm(loader, encoder.name, unit="picture", disable=run.rank() > 0):
            native = encoder(image[None].to(device, non_blocking=True))  # {stride: [1, C, h, w]}
            maps = {str(s): feature[0].half().contiguous() for s, feature in native.items()}
            writing.append(writer.submit(write, run.feature_path(folder, encoder.name, name), maps))
            if len(writing) > 4:
                writing.popleft().result()
        for written in writing:
            written.result()


def write(path: Path, maps: dict[str, torch.Tensor]) -> None:
    """On a GPU, fetching the maps waits for it: here, in the background. Nothing else is computed here, as PyTorch
    would start a second set of threads for this one, and the two would get in each other's way."""
    with run.whole_file(path) as temporary:
        save_file({stride: feature.cpu() for stride, feature in maps.items()}, temporary)


def main():
    args = parse_arguments()
    run.join_processes(args.device)
    weights = choose_weights(args.encoders, args.weights)

    # Which pictures, evenly spaced over the sorted list
    if args.images:
        benchmark, root, names = None, args.images, list_pictures(args.images)
        size = args.size or "512"
        folder = args.run or Path("runs") / root.resolve().name
    else:
        benchmark = args.benchmark
        size = args.size or find_benchmark(benchmark).size
        with run.first_process_first():  # toycity is drawn when it is first asked for
            samples = open_split(benchmark, args.data, "train")
        root, names = samples.root, samples.names
        folder = args.run or Path("runs") / benchmark
    working_size(512, 512, size)  # refuses a --size that means nothing
    count = min(len(names), args.limit or (24 if benchmark == "toycity" else 200))
    names = [names[i * len(names) // count] for i in range(count)]

    # What is left to do, and what cannot be used; a picture that was extracted before was readable
    origin = {encoder: weights_origin(encoder, weights[encoder]) for encoder in args.encoders}
    left_out = without_a_file_name(root, names)
    todo = {e: unfinished(folder, e, [name for name in names if name not in left_out]) for e in args.encoders}
    sizes, unusable = look_at(Pictures(root, sorted({name for e in todo for name in todo[e]}), size), args.workers)
    left_out |= unusable
    todo = {encoder: {name for name in todo[encoder] if name not in left_out} for encoder in todo}
    names = [name for name in names if name not in left_out]
    for reason in left_out.values():
        print(f"left out: {reason}")
    if not names:
        raise UserError(f"none of the {count} pictures of {root} can be used")
    settings = {"benchmark": benchmark, "data": str(args.data), "root": str(root), "images": names, "size": size}
    settings |= {"encoders": args.encoders, "weights": weights, "weights_from": origin, "seed": args.seed}
    for encoder in args.encoders:  # a file that does not fit is refused before anything is written
        if todo[encoder] and weights[encoder] not in ("pretrained", "none"):
            load_encoder(encoder, weights[encoder])
    with run.first_process_first():
        run.open_run(folder, settings, shlex.join(["python", "01_extract.py", *sys.argv[1:]]))

    # Whether the disk can take it
    gigabytes = sum(bytes_to_write(sizes[n], find_encoder(e).channels) for e in todo for n in todo[e]) / 1e9
    print(f"{len(names)} pictures of {root} for {', '.join(args.encoders)}: {gigabytes:.2f} GB to write under {folder}")
    need_disk(folder, gigabytes)

    for encoder_name in args.encoders:
        run.seed_everything(args.seed)  # random weights are the same in every run
        if weights[encoder_name] == "none":
            print(f"WARNING: {encoder_name} has random weights; its maps say nothing about the trained model")
        mine = [name for name in names if name in todo[encoder_name]][run.rank() :: run.world()]
        if mine:
            encoder = load_encoder(encoder_name, weights[encoder_name], args.device)
            extract(encoder, Pictures(root, mine, size), folder, args.device, args.workers)
    run.gather(None)  # all are done
    if run.rank():
        return

    # What was found
    print(f"\nmaps of {names[0]}")
    wide = max(12, *map(len, args.encoders))
    print(f"{'encoder':<{wide}} {'stride':>6} {'channels':>8} {'map':>11} {'mean':>9} {'std':>9}")
    for encoder_name in args.encoders:
        random = "  RANDOM WEIGHTS" if weights[encoder_name] == "none" else ""
        for stride, feature in run.read_features(run.feature_path(folder, encoder_name, names[0])).items():
            c, h, w = feature.shape
            mean, std = feature.float().mean(), feature.float().std()
            print(f"{encoder_name:<{wide}} {stride:>6} {c:>8} {f'{h} x {w}':>11} {mean:>9.3f} {std:>9.3f}{random}")
    shown = names[:: max(1, len(names) // 3)][:3]
    figures.draw_features(
        folder / "features.png",
        [resize_image(read_image(root / name), size) for name in shown],
        {e: [run.read_features(run.feature_path(folder, e, name)) for name in shown] for e in args.encoders},
        [e for e in args.encoders if weights[e] == "none"],
    )
    print(f"\nwrote {folder}/run.json, features/, features.png")
    print(f"next: {run.command('02_metrics.py', folder)}")


if __name__ == "__main__":
    run.start(main)
