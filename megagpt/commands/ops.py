"""Compiles DeepSpeed's ops and the data pipeline's, so that no run waits for them."""

from __future__ import annotations

import argparse
import logging

from megagpt.data.native import load_native
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
