"""Compiles DeepSpeed's CPU ops and the data pipeline's, so that no run waits for them."""

from __future__ import annotations

import argparse
import logging
import os

from megagpt.data.native import load_native
from megagpt.operations.prebuild import prebuild


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def main(options: argparse.Namespace) -> None:
    """Compiles."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    prebuild()
    load_native()  # says so where it cannot be compiled
