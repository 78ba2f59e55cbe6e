"""Compiles and loads `native.cpp`, the inner loops of the data pipeline.

Where there is no compiler the callers go on in Python, and `load_native` has said so. Every
function has its equal in Python, next to its caller.
"""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.compiled import compile_library

SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O3", "-ffp-contract=off")
# Bytes of the cache of chunks of one encoder; 99 % of the chunks of 150 MB of text are found in it.
CHUNK_CACHE_BYTES = 16 << 20

_POINTER: Any = ctypes.c_void_p
_INT64: Any = ctypes.c_int64
_INT32: Any = ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "bpe_create": (_POINTER, [_POINTER] * 4 + [_INT32, _INT32, _INT64]),
    "bpe_destroy": (None, [_POINTER]),
    "bpe_encode": (_INT64, [_POINTER] * 3 + [_INT64, _INT32, _INT32, _POINTER, _POINTER]),
    "gather": (
        _INT64,
        [_POINTER, _INT64, _INT32, _INT32, _POINTER, _POINTER, _INT64, _POINTER, _INT64]
        + [_POINTER, _INT64, _POINTER, _INT64, _POINTER, _INT64, _INT64, _INT64, _POINTER],
    ),
    "document_boundaries": (_INT64, [_POINTER, _INT64, _INT64, _INT64, _POINTER, _POINTER]),
    "blend": (None, [_POINTER] * 3 + [_INT64, _INT64, _POINTER, _POINTER]),
    "megatron_blend": (None, [_POINTER, _INT64, _INT64, _POINTER, _POINTER]),
}

logger = logging.getLogger("megagpt")


@lru_cache
def load_native() -> ctypes.CDLL | None:
    """The compiled library; None, after one warning with the reason, where it cannot be had."""
    try:
        library = ctypes.CDLL(str(compile_native()))
    except (ValueError, OSError) as error:
        logger.warning("warning: the data pipeline runs in Python, many times slower: %s", error)
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, f"megagpt_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def compile_native() -> Path:
    """The library's path, see `compile_library`."""
    return compile_library(SOURCE, _FLAGS)


def address(array: np.ndarray) -> int:
    """Address of an array's first element, for the library; the caller keeps the array."""
    assert array.flags.c_contiguous, "the library knows no strides"
    return array.ctypes.data
