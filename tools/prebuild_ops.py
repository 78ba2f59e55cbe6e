"""Compiles DeepSpeed's CPU ops and the data pipeline's, so that the first run does not wait."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from megagpt.config.command import run_command
from megagpt.data.native import load_native
from megagpt.operations.prebuild import prebuild


def main(arguments: list[str]) -> int:
    """Parses the command line and compiles."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    prebuild()
    load_native()  # says so where it cannot be compiled
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
