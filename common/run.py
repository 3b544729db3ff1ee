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
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

STAGES = ["01_extract.py", "02_metrics.py", "03_select.py", "04_train.py", "05_eval.py"]


class UserError(Exception):
    """A mistake that its maker can mend: one line, what was wrong, where, and what to do."""


def start(main) -> None:
    """Run a stage's main(); a UserError or Ctrl-C ends it in one line, without a stack trace."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; files are whole, and the same command goes on from here")


def arguments(description: str) -> argparse.ArgumentParser:
    """The parser that every stage begins with: its docstring as help, and the flags that mean the same everywhere."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder (default: runs/<benchmark>)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes that read pictures")
    return parser


def leave_interrupts_to_the_parent(worker: int) -> None:
    """For DataLoader's worker_init_fn: Ctrl-C reaches all processes, one of them is to answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries draw from the global generator
    torch.manual_seed(seed)


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
    """The shell command that runs a stage on a run folder; `--run` is left out where it is the default."""
    words = ["python", stage]
    if folder != Path("runs/toycity"):
        words += ["--run", str(folder)]
    return shlex.join([*words, *flags])


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


# ---------------------------------------------------------------------------------------------- the run


def versions() -> dict:
    packages = ["torch", "torchvision", "timm", "sam2", "transformers", "numpy"]
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def open_run(folder: Path, settings: dict) -> None:
    """Write run.json, or check that the one there was made with the same settings; UserError names what differs.

    A run.json without any feature is from a run that failed at once, on its weights say: it binds nobody.
    """
    if (folder / "run.json").is_file() and (folder / "features").is_dir():
        old = read_stage(folder, "run.json", STAGES[0])
        same_settings(folder, old, settings, "give another --run, or delete it")
    else:
        write_json(folder / "run.json", settings | {"versions": versions()})


def same_settings(what: Path, old: dict, new: dict, advice: str) -> None:
    """Raise UserError, naming what differs, if any of the settings `new` was another one in `old`."""
    differ = [f"{key} was {_short(old.get(key))}, now {_short(new[key])}" for key in new if old.get(key) != new[key]]
    if differ:
        raise UserError(f"{what} was made with other settings ({'; '.join(differ)}): {advice}")


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
        raise UserError(
            f"feature file {path} is {problem}: run `{command(STAGES[0], path.parents[2])}` again, it mends only that"
        ) from None
