"""Shared by the tests: no network, and one small toycity on disk."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it

import contextlib
import ctypes
import gc
import importlib
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
    """Run a numbered stage as from the shell, in this process: stage("01_extract", "--run", folder) -> what it printed.

    A mistake of the user raises run.UserError, which run.start would print as one line.
    """

    def call(name: str, *words) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        capsys.readouterr()
        threads = torch.get_num_threads()
        try:
            importlib.import_module(name).main()
        finally:
            torch.set_num_threads(threads)  # stage 2 sets its own
        return capsys.readouterr().out

    return call


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_grad_enabled(True)


def free_memory():
    """Give the system back what is no longer used: glibc would keep the largest models' gigabytes to the end."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def tidied():
    yield
    free_memory()
