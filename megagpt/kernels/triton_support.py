"""What the Triton back ends share: whether they can run, and launches that torch knows by shape.

Each launch is a torch operator of its own, so that fake tensors go through it: shapes, types and
memory of a step on a GPU can be had without one. Kernels stand in `triton_kernels.py` beside each
`triton.py`, which imports them only when one runs: Triton is not everywhere.
"""

from __future__ import annotations

import importlib.util
import os

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_COLUMNS = 8192
"""Of a row that one program holds: `ahead_of_time.py` has compiled so many, beyond them RMSNorm's
backward spills registers to memory."""


def triton_problem(device: torch.device, dtype: torch.dtype, row: int = 0) -> str | None:
    """Why a kernel cannot run on tensors like these; None if it can.

    Args:
        device: Of the tensors; a CPU too under Triton's interpreter (TRITON_INTERPRET=1).
        dtype: Of the tensors.
        row: Elements that a program holds at once.
    """
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (is_interpreted and device.type == "cpu"):
        return f"it is for GPUs, not {device.type}"
    if dtype not in _DTYPES:
        return f"it knows fp32, bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if row > MOST_COLUMNS:
        return f"rows of {row} are longer than {MOST_COLUMNS}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return None


def power_of_two(size: int) -> int:
    """The least that is not below size."""
    return 1 << max(size - 1, 0).bit_length()


def num_warps(block: int) -> int:
    """Warps of a program over a row of so many elements: a thread holds at most 16 of them.

    With fewer warps a row of 8,192 spills registers to memory on sm_90.
    """
    return min(max(block // 512, 1), 32)
