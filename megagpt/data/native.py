"""Compiles and loads `native.cpp`, the inner loops of the data pipeline.

The library is compiled once into the user's cache by the machine's C++ compiler, under a name made
of its source, so that a stale one is never loaded. Where there is no compiler the callers go on in
Python, and `load_native` has said so. Every function has its equal in Python, next to its caller.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")
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
    """The library's path, compiled if it is not there yet (about 5 seconds).

    Raises:
        ValueError: If there is no compiler, or it fails.
        OSError: If the cache cannot be written.
    """
    compiler = os.environ.get("CXX") or "c++"
    content = SOURCE.read_bytes() + " ".join((*_FLAGS, platform.machine())).encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megagpt"
    library = cache / f"native_{hashlib.sha256(content).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    if shutil.which(compiler) is None:
        raise ValueError(f"no C++ compiler {compiler}; install one (g++), or name it in CXX")
    cache.mkdir(parents=True, exist_ok=True)
    temporary = library.with_suffix(f".tmp{os.getpid()}")
    # The ranks of a machine wait for the one that compiles.
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.is_file():
            return library
        try:
            command = [compiler, *_FLAGS, str(SOURCE), "-o", str(temporary)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.splitlines() or ["no message"]
                raise ValueError(f"{compiler} cannot compile {SOURCE.name}: {lines[0]}")
            temporary.rename(library)
        finally:
            temporary.unlink(missing_ok=True)
    return library


def address(array: np.ndarray) -> int:
    """Address of an array's first element, for the library; the caller keeps the array."""
    assert array.flags.c_contiguous, "the library knows no strides"
    return array.ctypes.data
