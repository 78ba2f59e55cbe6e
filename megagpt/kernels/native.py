"""Compiles and loads the C++ of the CPU back ends: a `native.cpp` beside each `cpu.py`.

Every function stands in it once for each type that it knows, as `megagpt_NAME_TYPE`.
"""

from __future__ import annotations

import ctypes
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megagpt.compiled import compile_library

POINTER, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
"""Of arguments: what `at` gives, a count, a number."""

_SHARED = Path(__file__).with_name("elements.inc")
# Vectors of the whole width; nothing traps, and errno is nobody's. Sums in the order that is
# written, but for those that the source marks.
_FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
_SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Library:
    """The functions of one `native.cpp`; compiled when one is first asked for.

    Args:
        caller: The `cpu.py` beside it.
        signatures: Arguments of each function, the same for each type.
    """

    def __init__(self, caller: str, signatures: dict[str, list[Any]]) -> None:
        self.source = Path(caller).with_name("native.cpp")
        self._signatures = signatures

    @cached_property
    def _loaded(self) -> ctypes.CDLL | str:
        """The library, or why there is none."""
        try:
            return ctypes.CDLL(str(compile_library(self.source, _FLAGS, included=(_SHARED,))))
        except (ValueError, OSError) as error:
            return str(error)

    def problem(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the functions cannot run on tensors like these; None if they can."""
        if device.type != "cpu":
            return f"it is for CPUs, not {device.type}"
        word = str(dtype).removeprefix("torch.")
        if dtype not in _SUFFIXES:
            return f"it knows fp32 and bf16, not {word}"
        if isinstance(self._loaded, str):
            return self._loaded
        for name in self._signatures:
            if not hasattr(self._loaded, f"megagpt_{name}_{_SUFFIXES[dtype]}"):
                return f"this processor has no 512-bit vectors for {word}"
        return None

    def call(self, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        """Calls one function for tensors of a type."""
        assert not isinstance(self._loaded, str), self._loaded
        function = getattr(self._loaded, f"megagpt_{name}_{_SUFFIXES[dtype]}")
        if function.argtypes is None:
            function.restype, function.argtypes = None, self._signatures[name]
        function(*arguments)


def at(tensor: torch.Tensor | None) -> int | None:
    """Address of a tensor's first element; the caller keeps the tensor."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "the passes know no strides"
    return tensor.data_ptr()
