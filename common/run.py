"""The run folder: what one stage leaves on disk for the next, and the few habits that all stages share.

A stage raises UserError for anything a person can put right; `start` prints it as one line. Files appear whole or
not at all: they are written beside their place and renamed into it.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import random
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open


class UserError(Exception):
    """A mistake that its maker can mend: one line, what was wrong, where, and what to do."""

    def __init__(self, message: str):
        # A DataLoader's worker hands its error on as text, with its stack trace in front.
        super().__init__(str(message).rsplit("UserError: ", 1)[-1].strip())


def start(main) -> None:
    """Run a stage's main(), which may return an exit code; a UserError or Ctrl-C ends it in one line."""
    try:
        code = main()
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(code)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; what is written is whole, and the same command takes it up again", file=sys.stderr)
        sys.exit(130)


def arguments(description: str) -> argparse.ArgumentParser:
    """The parser that every stage begins with: its docstring as help, and the flags that mean the same everywhere."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/toycity"), help="run folder (stage 1 names it after its pictures)"
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda") if cuda else ("cpu",), default="cuda" if cuda else "cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes share the machine
    parser.add_argument(
        "--workers", type=positive, default=max(1, min(8, cores)), help="helpers beside the main process"
    )
    return parser


def positive(text: str) -> int:
    """For argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def leave_interrupts_to_the_parent(worker: int) -> None:
    """For DataLoader's worker_init_fn: Ctrl-C or a scheduler's SIGTERM reaches all processes, one is to answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = lambda *error: None  # a worker's errors go to the parent; this one would report the parent's end


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries draw from the global generator
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------------- processes
# `torchrun --nproc_per_node=N -- stage.py …` starts N of them; without it there is one, and all this does nothing.


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device: str) -> None:
    """Meet the other processes, each with a GPU of its own where there are some; only the first one prints."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # NCCL between GPUs, Gloo between CPUs
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends


@contextlib.contextmanager
def first_process_first():
    """What the first process has to do before the others do the same, on files that it makes for all."""
    if rank():
        dist.barrier()
    try:
        yield
    finally:
        if rank() == 0 and world() > 1:
            dist.barrier()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if world() > 1:
        dist.all_reduce(values)
    return values


def gather(value) -> list:
    """Every process's value, to the first one; an empty list to the others."""
    if world() == 1:
        return [value]
    values = [None] * world() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


# ---------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def whole_file(path: Path):
    """Yield a temporary path beside `path`; renamed into place on success, removed on any failure or Ctrl-C."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """JSON knows no NaN: a number that does not exist is written as null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n")


def read_stage(folder: Path, file: str, stage: str) -> dict:
    """Read a JSON file that `stage` wrote into a run folder; UserError names the command that makes it."""
    path = folder / file
    if not path.is_file():
        raise UserError(f"{path} is missing: run `{command(stage, folder)}` first")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run `{command(stage, folder)}`") from None


def command(stage: str, folder: Path, *flags: str) -> str:
    """The shell command that runs a stage on a run folder; stage 1's is the one that made it, kept in run.json."""
    if stage == "01_extract.py" and (folder / "run.json").is_file():
        return read_stage(folder, "run.json", stage)["command"]
    if folder == Path("runs/toycity"):
        return shlex.join(["python", stage, *flags])
    asked = " --benchmark NAME --data FOLDER --encoders NAMES" if stage == "01_extract.py" else ""
    return shlex.join(["python", stage, "--run", str(folder), *flags]) + asked


# ---------------------------------------------------------------------------------------------- the run


def versions() -> dict:
    packages = ["torch", "torchvision", "timm", "sam2", "transformers", "numpy"]
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def open_run(folder: Path, settings: dict, made_by: str) -> None:
    """Write run.json, or check that the one there was made with the same settings; UserError names what differs.

    A run.json without any feature is from a run that failed at once, on its weights say: it binds nobody.
    """
    if (folder / "run.json").is_file() and (folder / "features").is_dir():
        old = read_stage(folder, "run.json", "01_extract.py")
        same_settings(folder, old, settings, "give another --run, or delete it")
    elif rank() == 0:
        write_json(folder / "run.json", settings | {"command": made_by, "versions": versions()})


def same_settings(what: Path, old: dict, new: dict, advice: str) -> None:
    """Raise UserError, naming what differs, if any of the settings `new` was another one in `old`."""
    differ = []
    for key, value in new.items():
        before = old.get(key)
        if before != value:
            if key == "images" and before:
                unlike = [pair for pair in zip(before, value, strict=False) if pair[0] != pair[1]]
                before, value = unlike[0] if len(before) == len(value) else (len(before), len(value))
            elif isinstance(before, dict) and isinstance(value, dict):
                before, value = ({k: d[k] for k in d if before.get(k) != value.get(k)} for d in (before, value))
            differ.append(f"{key} was {json.dumps(before)}, now {json.dumps(value)}")
    if differ:
        raise UserError(f"{what} was made with other settings ({'; '.join(differ)}): {advice}")


# ---------------------------------------------------------------------------------------------- features


def feature_path(folder: Path, encoder: str, image: str) -> Path:
    """features/<encoder>/<image>.safetensors; "/" in the image's relative path becomes "__"."""
    return folder / "features" / encoder / f"{image.replace('/', '__')}.safetensors"


def read_features(path: Path) -> dict[int, torch.Tensor]:
    """One image's native maps, {stride: float16 [C,h,w]}; UserError if the file is missing or cut short."""
    try:
        with safe_open(path, "pt") as file:
            return {stride: file.get_tensor(str(stride)) for stride in sorted(map(int, file.keys()))}
    except Exception as error:  # safetensors raises its own types, OSError and ValueError alike
        problem = "missing" if not path.is_file() else f"damaged ({error})"
        again = command("01_extract.py", path.parents[2])
        raise UserError(f"feature file {path} is {problem}: run `{again}` again, it makes only that one") from None
