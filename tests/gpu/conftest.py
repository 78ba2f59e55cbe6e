"""These tests need a GPU; without one they end at once, and not as passed."""

import sys
from pathlib import Path

import pytest
import torch

from megagpt.testing.distributed import DEVICE

# Cells that run on the CPU too stand beside the tests that run them there.
for room in ("parity", "distributed"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / room))

if DEVICE != "cuda" or not torch.cuda.is_available():
    pytest.exit(
        f"tests/gpu needs a GPU (DS_ACCELERATOR={DEVICE}, "
        f"torch.cuda.is_available()={torch.cuda.is_available()}); on a machine with one: "
        "make gpu-test",
        returncode=1,
    )


def pytest_report_header():
    """Which card the results are of."""
    return (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    )
