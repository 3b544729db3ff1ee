"""What all stages share: one-line errors, settings as flags, atomic writes, the run folder."""

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
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
RESAMPLES = 1000  # of the bootstrap


def count_cores():
    """Cores for this process, at most 8. The processes of torchrun share the machine."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 2
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, cores // processes))


CORES = count_cores()


# ------------------------------------------------------------------ errors
class UserError(Exception):
    """A mistake that its user can mend. One line says what was wrong, where, and what to do."""

    def __init__(self, message):
        # A DataLoader's worker hands its error over as a stack trace that ends in "UserError: …".
        super().__init__(str(message).rsplit("UserError: ", 1)[-1].strip())


def require(condition, message):
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def start(main):
    """Run a stage's main(), which may return an exit code.

    A user's mistake, a full disk, a full GPU and Ctrl-C end it in one line without a stack trace.
    """
    try:
        exit_code = main()
    except (UserError, OSError) as error:
        exit_code = f"error: {error}"
    except KeyboardInterrupt:
        print("\ninterrupted: start the same command again, it goes on from here", file=sys.stderr)
        exit_code = 130
    except torch.cuda.OutOfMemoryError:
        advice = "give more --accumulate, a smaller --crop, or --device cpu"
        exit_code = f"error: the GPU's memory is full: {advice}"
    except Exception as error:
        # PyTorch has no type of its own for the error that a worker was killed.
        if str(error).startswith("DataLoader"):
            advice = "give fewer --workers (0 for none), or more memory"
            exit_code = f"error: a worker process has died or hangs ({error}): {advice}"
        else:
            traceback.print_exc()
            exit_code = 1
    # After an error workers may still be alive, and they ignore Ctrl-C and SIGTERM. Without the
    # default handler PyTorch would report their end as a second error.
    for worker in multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):  # Windows has none
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        worker.kill()
    sys.exit(exit_code)


def loader_arguments(workers):
    """The arguments of a DataLoader that concern its worker processes."""
    # Workers hand images over through shared memory. In a container with little of it they would
    # wait for ever, so then there are none.
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir():
        free = shutil.disk_usage(shared_memory).free / 2**20
        all_workers = workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if free < 128 * all_workers:
            print(
                f"WARNING: {shared_memory} has {free:.0f} MB free and a worker may need 128. This "
                "process reads the images itself. To have workers, give the container more shared "
                "memory (docker run --shm-size 8g)"
            )
            workers = 0
    # A worker that is stuck is reported after ten minutes.
    timeout = 600 if workers else 0
    return {"num_workers": workers, "worker_init_fn": begin_worker, "timeout": timeout}


def begin_worker(worker):
    """Leave Ctrl-C, SIGTERM and errors to the main process, and let it compute first."""
    if hasattr(os, "nice"):  # Windows has none
        os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = lambda *error: None


# ------------------------------------------------------------------ settings
def flag(default, help="", **argparse_options):
    """A field of a stage's settings block: its default, its help, and options of add_argument."""
    return dataclasses.field(default=default, metadata={"help": help, **argparse_options})


def parse(description, settings_class, overrides=None):
    """Read the command line into an instance of `settings_class`, a dataclass of `flag` fields.

    The fields of `overrides`, another such dataclass, become flags too. Then the result is a pair:
    the instance, and {field of overrides: value} of the flags that were given.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(settings_class):
        add_flag(parser, field, show_default=True)
    if overrides:
        for field in dataclasses.fields(overrides):
            add_flag(parser, field, show_default=False)
    given = vars(parser.parse_args())
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    settings = settings_class()
    for field in dataclasses.fields(settings_class):
        if field.name in given:
            setattr(settings, field.name, given.pop(field.name))
    return (settings, given) if overrides else settings


def add_flag(parser, field, show_default):
    """Add a dataclass field to an argparse parser. parse_args() omits flags that are not given."""
    options = dict(field.metadata)
    if field.type is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif "type" not in options:
        # The type inside: int for "int | None" and for "tuple[int, ...]"
        inside = typing.get_args(field.type) or (field.type,)
        options["type"] = inside[0]
    default = field.default
    # What None, False and () stand for is said in the help text itself.
    has_plain_default = not (default is None or default is False or default == ())
    if show_default and has_plain_default:
        if isinstance(default, tuple):
            default = " ".join(map(str, default))
        options["help"] = f"{options['help']} (default: {default})".lstrip()
    name = "--" + field.name.replace("_", "-")
    parser.add_argument(name, default=argparse.SUPPRESS, **options)


def natural(text):
    """The type of a flag that is a whole number from 0, such as a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def positive(text):
    """The type of a flag that is a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


# ------------------------------------------------------------------ files
@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`.

    On success it is renamed to `path`, on any failure it is removed: no file is ever half-written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, content):
    """Write JSON, with null in place of NaN, which JSON does not have."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_stage(folder, file, stage):
    """Read a JSON file that `stage` wrote into a run folder.

    UserError if it is missing or damaged, naming the command that makes it.
    """
    path = folder / file
    again = f"run `{command(stage, folder)}`"
    if stage == "01_extract.py":  # which needs more than the folder
        again = f"run `{command(stage, folder)} …`"
    require(folder.is_dir(), f"the run folder {folder} is missing: {again} first")
    require(path.is_file(), f"{path} is missing: {again} first")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and {again}") from None


def command(stage, folder):
    """The shell command that runs a stage on a run folder."""
    return shlex.join(["python", stage, "--run", str(folder)])


def refuse_other_settings(what, before, now, advice):
    """Raise UserError if a setting in `now` was another one in `before`, naming all that differ."""
    names = ", ".join(differing_keys(before, now))
    require(not names, f"{what} was made with other settings ({names}): {advice}")


def differing_keys(before, now, prefix=""):
    """Names of the keys of `now` that have another value in `before`, as "recipe.steps"."""
    names = []
    for key, value in now.items():
        earlier = before.get(key)
        if isinstance(value, dict) and isinstance(earlier, dict):
            names += differing_keys(earlier, value, f"{prefix}{key}.")
            names += [f"{prefix}{key}.{gone}" for gone in earlier if gone not in value]
        elif value != earlier:
            names.append(prefix + key)
    return names


# ------------------------------------------------------------------ text for people
def first_few(items, separator=", "):
    """The first three items as text, and how many more there are."""
    text = separator.join(map(str, items[:3]))
    if len(items) > 3:
        text += f" and {len(items) - 3} more"
    return text


def number(value, digits=1):
    """A number for a table. A dash stands for one that does not exist."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.{digits}f}"


def table(rows):
    """A Markdown table whose columns line up on a screen too. The first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


# ------------------------------------------------------------------ what stages hand on
def feature_path(folder, encoder, image):
    return folder / "features" / encoder / f"{image}.safetensors"


def read_features(folder, encoder, image):
    """Read an image's feature maps: {native stride: float16 or float32 [C, h, w]}.

    UserError if the file is missing or damaged.
    """
    path = feature_path(folder, encoder, image)
    maps = {}
    try:
        with safe_open(path, "pt") as file:
            for stride in sorted(file.keys(), key=int):
                maps[int(stride)] = file.get_tensor(stride)
    except Exception as error:  # safetensors raises types of its own, OSError and ValueError
        raise UserError(
            f"the feature file {path} cannot be read ({error}): start 01_extract.py again "
            "with the flags it had"
        ) from None
    return maps


def evenly_spaced(items, count):
    """At most `count` items of a sequence, evenly spaced from the first one on."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def read_checkpoint(path):
    """Read a file that torch.save wrote: tensors and plain types only.

    ValueError or another exception if it is damaged. torch itself does not compare the checksums
    in the file.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} is damaged")
    return torch.load(path, "cpu", weights_only=True)


def bootstrap_weights(images, seed):
    """Weights [1 + RESAMPLES, images] whose rows turn values of images into means.

    Row 0 is the plain mean. Each other row is the mean of a resample, drawn with replacement.
    """
    random = np.random.default_rng(seed)
    draws = random.multinomial(images, np.full(images, 1 / images), RESAMPLES)
    return np.concatenate([np.ones((1, images)), draws]) / images
