"""Compiles and loads `native.cpp`, the passes over memory of the CPU back ends."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megagpt.compiled import compile_library

SOURCE = Path(__file__).with_name("native.cpp")
# Vectors of the whole width; nothing traps, and errno is nobody's. Order of sums as written, but
# for those that the source marks.
_FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
_SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "row_statistics": [_P, _P, _N, _N, _N, _P],
    "row_gradients": [_P, _P, _P, _P, _P, _N, _N, _N],
    "swiglu_forward": [_P, _P, _P, _N],
    "swiglu_backward": [_P, _P, _P, _P, _P, _N],
    "gelu_forward": [_P, _P, _N],
    "gelu_backward": [_P, _P, _P, _N],
    "rms_norm_forward": [_P, _P, _P, _P, _P, _P, _N, _N, _F],
    "rms_norm_backward": [_P, _P, _P, _P, _P, _P, _P, _N, _N, _N],
    "rotary_turn": [_P, _P, _P, _P, _N, _N, _N, _N, _F],
    "accumulate": [_P, _P, _N],
}


@lru_cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compile_library(SOURCE, _FLAGS)))
    for name, arguments in _SIGNATURES.items():
        for suffix in _SUFFIXES.values():
            function = getattr(library, f"megagpt_{name}_{suffix}")
            function.restype, function.argtypes = None, arguments
    return library


@lru_cache
def _compile_problem() -> str | None:
    try:
        _library()
    except (ValueError, OSError) as error:
        return str(error)
    return None


def native_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the passes cannot run on tensors like these; None if they can."""
    if device.type != "cpu":
        return f"it is for CPUs, not {device.type}"
    if dtype not in _SUFFIXES:
        return f"it knows fp32 and bf16, not {str(dtype).removeprefix('torch.')}"
    return _compile_problem()


def native(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """One pass for tensors of a type; takes addresses (`at`), sizes and numbers."""
    return getattr(_library(), f"megagpt_{name}_{_SUFFIXES[dtype]}")


def at(tensor: torch.Tensor | None) -> int | None:
    """Address of a tensor's first element; the caller keeps the tensor."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "the passes know no strides"
    return tensor.data_ptr()
