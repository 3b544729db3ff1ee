"""What all stages share: mistakes told in a line, settings as flags, whole files, and the folder of a run."""

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import traceback
import typing
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
CORES = max(1, min(8, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # torchrun's processes share the machine
RESAMPLES = 1000  # bootstrap


# ------------------------------------------------------------------ mistakes
class UserError(Exception):
    """A mistake that its maker can mend: one line, what was wrong, where, and what to do."""

    def __init__(self, message):
        # A DataLoader's worker hands its error on as text, with its stack trace in front.
        super().__init__(str(message).rsplit("UserError: ", 1)[-1].strip())


def need(condition, message):
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def start(main):
    """Run a stage's main(), which may return an exit code; a mistake, a full disk or Ctrl-C ends it in one line."""
    try:
        end = main()
    except (UserError, OSError) as error:
        end = f"error: {error}"
    except KeyboardInterrupt:
        print("\ninterrupted; what is written is whole, and the same command takes it up again", file=sys.stderr)
        end = 130
    except torch.cuda.OutOfMemoryError:
        end = "error: the GPU's memory is full: more --accumulate, a smaller --crop, or --device cpu"
    except Exception as error:
        end = f"error: a helper process ended or hangs ({error}): give fewer --workers (0: none), or more memory"
        if not str(error).startswith("DataLoader"):
            traceback.print_exc()
            end = 1
    for helper in multiprocessing.active_children():  # after an error; they ignore what would end them in the usual way
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would report their end as another error
        helper.kill()
    sys.exit(end)


def loader_arguments(workers):
    """What DataLoader takes for its helper processes.

    It would wait for ever where they lack memory to hand data on: none of them if that is likely, else 600 s at most.
    """
    shared, all_workers = Path("/dev/shm"), workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = shutil.disk_usage(shared).free if shared.is_dir() else math.inf
    if free < all_workers * 2**27:
        advice = "give the container more of it (docker run --shm-size 8g), or fewer --workers"
        print(f"WARNING: no helpers, as {shared} has {free / 2**20:.0f} MB free and one may need 128: {advice}")
        workers = 0
    return {"num_workers": workers, "worker_init_fn": begin_helper, "timeout": 600 if workers else 0}


def begin_helper(worker):
    """Give way to the parent; Ctrl-C and SIGTERM reach all processes, and the parent is to answer them."""
    if hasattr(os, "nice"):  # Windows has none; a helper runs while one of the parent's threads waits for another
        os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = lambda *error: None  # a worker's errors go to the parent; this one would report the parent's end


# ------------------------------------------------------------------ settings
def flag(default, help="", **how):
    """A field of a stage's settings block: its default, its help, and what else argparse's add_argument takes."""
    return dataclasses.field(default=default, metadata={"help": help, **how})


def parse(description, block, changes=None):
    """The command line as an instance of `block`, a dataclass whose fields, each made by `flag`, are the flags.

    The fields of `changes`, another such dataclass, are flags too: those that were given come back as a dictionary,
    beside the instance.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    own, more = dataclasses.fields(block), dataclasses.fields(changes) if changes else ()
    for field in own + more:
        how = dict(field.metadata)
        if field.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:  # the first type inside: int for "int | None" and for "tuple[int, ...]"
            how.setdefault("type", (typing.get_args(field.type) or (field.type,))[0])
        if field in own and field.default not in (None, (), False):
            shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            how["help"] = f"{how['help']} (default: {shown})".lstrip()
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **how)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(parser.parse_args()).items()}
    settings = block(**{field.name: given.pop(field.name) for field in own if field.name in given})
    return (settings, given) if changes else settings


def natural(text):
    """For argparse: a whole number, as seeds are."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def positive(text):
    """For argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


# ------------------------------------------------------------------ files
@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; renamed into place on success, removed on any failure or Ctrl-C."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """JSON knows no NaN: a number that does not exist is written as null."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_stage(folder, file, stage):
    """Read a JSON file that `stage` wrote into a run folder; UserError names the command that makes it."""
    path, again = folder / file, f"run `{command(stage, folder)}`"
    need(path.is_file(), f"{path if folder.is_dir() else f'the run folder {folder}'} is missing: {again} first")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and {again}") from None


def command(stage, folder, *flags: str):
    """The shell command that runs a stage on a run folder; stage 1's is the one that made it, kept in run.json."""
    if stage == "01_extract.py":
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads((folder / "run.json").read_text())["command"]
    where = () if folder == Path("runs/toycity") else ("--run", str(folder))
    asked = " --encoders NAMES --benchmark NAME --data FOLDER (or --images FOLDER)"
    asked = asked if where and stage == "01_extract.py" else ""
    return shlex.join(["python", stage, *where, *flags]) + asked


def refuse_other_settings(what, old, new, advice):
    """Raise UserError, naming what differs, if any of the settings `new` was another one in `old`."""
    differ = []
    for key in (key for key in new if old.get(key) != new[key]):
        before, now = old.get(key), new[key]
        if isinstance(before, dict) and isinstance(now, dict):
            before, now = ({k: d[k] for k in d if before.get(k) != now.get(k)} for d in (before, now))
        elif isinstance(before, list) and isinstance(now, list):  # perhaps of thousands of pictures
            before, now = [v for v in before if v not in now][:3], [v for v in now if v not in before][:3]
        differ.append(f"{key} was {json.dumps(before)}, now {json.dumps(now)}")
    need(not differ, f"{what} was made with other settings ({'; '.join(differ)}): {advice}")


def some(items, comma=", "):
    """The first three, and how many more there are."""
    return comma.join(map(str, items[:3])) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def number(value, digits=1):
    """For tables; "-" stands for a number that does not exist."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def table(rows):
    """A table in Markdown whose columns line up on a screen as well; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"| {line} |\n" for line in lines)


# ------------------------------------------------------------------ what stages hand on
def feature_path(folder, encoder, image):
    return folder / "features" / encoder / f"{image}.safetensors"


def fingerprint(path):
    """Of a file's content."""
    return f"{zlib.crc32(path.read_bytes()):08x}"


def read_features(folder, encoder, image, picture):
    """One image's native maps, {stride: float16 or float32 [C,h,w]}.

    UserError if the file is missing, cut short, or was not made from the picture of this fingerprint.
    """
    path, problem = feature_path(folder, encoder, image), None
    try:
        with safe_open(path, "pt") as file:
            maps = {stride: file.get_tensor(str(stride)) for stride in sorted(map(int, file.keys()))}
            if (file.metadata() or {}).get("picture") != picture:
                problem = f"of another picture than {image} is now"
    except Exception as error:  # safetensors raises its own types, OSError and ValueError alike
        problem = f"damaged ({error})" if path.is_file() else "missing"
    need(not problem, f"feature file {path} is {problem}: run `{command('01_extract.py', folder)}` again")
    return maps


def evenly_spaced(items, count):
    """At most `count` of a sequence's items, from the first on."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def read_checkpoint(path):
    """What torch.save wrote, tensors and plain types alone; torch itself does not look at the file's checksums."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} is damaged")
    return torch.load(path, "cpu", weights_only=True)


def bootstrap(images, seed):
    """Weights [1 + RESAMPLES, image] under which a mean is that of a resample, drawn with replacement; the first
    row's is plain."""
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), RESAMPLES)
    return np.concatenate([np.ones((1, images)), draws]) / images
