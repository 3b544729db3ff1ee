"""Shared by the tests: no network, and one small toycity on disk."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it

import contextlib
import ctypes
import gc
import importlib
import signal
import sys

from common import toycity

import pytest
import torch


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data root with a small toycity: 16 training and 6 validation scenes."""
    root = tmp_path_factory.mktemp("data")
    toycity.write(root / "toycity", {"train": 16, "val": 6})
    return root


@pytest.fixture
def stage(monkeypatch, capsys):
    """Run a numbered stage as from the shell, in this process, and return what it printed.

    stage("01_extract", "--run", folder) is `python 01_extract.py --run FOLDER`. A user's mistake
    raises UserError, which run.start would print as one line.
    """

    def call(name: str, *words) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        capsys.readouterr()
        # Stage 2 sets its own number of threads, and stage 4 its own handlers of signals. A
        # process of theirs ends with the stage, whereas the tests go on.
        threads = torch.get_num_threads()
        on_interrupt = signal.getsignal(signal.SIGINT)
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            importlib.import_module(name).main()
        finally:
            torch.set_num_threads(threads)
            signal.signal(signal.SIGINT, on_interrupt)
            signal.signal(signal.SIGTERM, on_terminate)
        return capsys.readouterr().out

    return call


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_grad_enabled(True)


def free_memory():
    """Give unused memory back to the system.

    Without this, glibc would keep the gigabytes of the largest models until the tests end.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def tidied():
    yield
    free_memory()
