"""A process of its own for fake CUDA tensors: what the guard registers is there for good."""

import ctypes
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fake_device import compile_guard  # noqa: E402


@pytest.fixture(scope="session")
def on_fake_cuda(tmp_path_factory):
    """Calls a function in a process that has loaded the guard before it imports torch."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("torch is built for GPUs here; the guard stands in for what a CPU build lacks")
    library = str(compile_guard(tmp_path_factory.mktemp("guard")))
    with ProcessPoolExecutor(1, get_context("spawn"), ctypes.CDLL, (library,)) as worker:
        yield lambda function, *arguments: worker.submit(function, *arguments).result()
