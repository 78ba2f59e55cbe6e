"""Our own C++, compiled once into the user's cache by the machine's compiler.

A library's name is made of its source, its flags and, where it is made for one processor, that
processor's instructions: so neither a stale one nor another machine's is ever loaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

_FLAGS = ("-std=c++17", "-shared", "-fPIC")
_THIS_PROCESSOR = "-march=native"


def compile_library(
    source: Path, flags: tuple[str, ...], *, included: tuple[Path, ...] = ()
) -> Path:
    """The library's path, compiled if it is not there yet (about 5 seconds).

    Args:
        source: One file of C++.
        flags: Beside those that make it a library.
        included: Other files of ours that it is made of.

    Raises:
        ValueError: If there is no compiler, or it fails.
        OSError: If the cache cannot be written.
    """
    compiler = os.environ.get("CXX") or "c++"
    made_for = [*flags, *_FLAGS, platform.machine()]
    if _THIS_PROCESSOR in flags:
        made_for.append(_instructions())
    parts = [path.read_bytes() for path in (source, *included)]
    content = b"\0".join([*parts, " ".join(made_for).encode()])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megagpt"
    digest = hashlib.sha256(content).hexdigest()[:16]
    library = cache / f"{source.parent.name}_{source.stem}_{digest}.so"
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
            command = [compiler, *_FLAGS, *flags, str(source), "-o", str(temporary)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.splitlines() or ["no message"]
                raise ValueError(f"{compiler} cannot compile {source.name}: {lines[0]}")
            temporary.rename(library)
        finally:
            temporary.unlink(missing_ok=True)
    return library


def _instructions() -> str:
    """What tells this machine's processor from another that shares the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
