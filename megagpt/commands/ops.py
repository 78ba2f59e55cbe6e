"""Compiles DeepSpeed's ops, the data pipeline's and the kernels', so that no run waits."""

from __future__ import annotations

import argparse
import logging

from megagpt.data.native import load_native
from megagpt.kernels.registry import BACKENDS, Kernels
from megagpt.operations.hardware import training_device
from megagpt.operations.prebuild import prebuild


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def main(options: argparse.Namespace) -> None:
    """Compiles."""
    training_device()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    prebuild()
    load_native()  # says so where it cannot be compiled
    kernels = Kernels("auto")
    for op in BACKENDS:
        kernels.choose(op, size=64, head_size=64, rows=64)
    for line in kernels.table():
        print(line)
