"""Compiles DeepSpeed's CPU ops before a run needs them, and removes the locks of killed builds.

torch compiles an op under a file `lock` in the op's folder, which a killed build leaves behind;
every later run then waits in `FileBaton.wait` for ever, without a message. Importing this module
needs the standard library only. The command is `megagpt ops`.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

OPS = ("ShareMemCommBuilder", "CPUAdamBuilder", "FusedAdamBuilder")
ASYNC_IO = "AsyncIOBuilder"
"""Op of NVMe offload, built where libaio is installed."""
LOCK_NAME = "lock"

_REPORT_SECONDS = 10.0
# Where the holder cannot be seen (another user, another host): far longer than any op compiles.
_UNSEEN_HOLDER_SECONDS = 3600.0
_COMPILERS = frozenset(
    {"ninja", "c++", "g++", "cc1plus", "collect2", "ld", "as", "clang", "clang++", "nvcc", "ptxas"}
)
_NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs"})


def extensions_root() -> Path:
    """Folder of torch's compiled extensions: TORCH_EXTENSIONS_DIR, else the user's cache."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "torch_extensions"


def remove_stale_locks(
    root: Path | None = None, *, report: Callable[[str], None] | None = None
) -> list[Path]:
    """Removes the lock of every build that no process is working on.

    A live build has its lock open (torch's `FileBaton` keeps the descriptor), or a compiler at work
    in the folder. Where processes cannot be seen, a lock counts as stale after an hour.

    Args:
        root: Folder of extensions; default `extensions_root()`.
        report: Called with one line for each removed lock; default: stderr.

    Returns:
        The locks removed.
    """
    root = root or extensions_root()
    report = report or _to_stderr
    removed = []
    # One level below TORCH_EXTENSIONS_DIR, two below the cache (py311_cpu/<op>).
    for lock in sorted([*root.glob(f"*/{LOCK_NAME}"), *root.glob(f"*/*/{LOCK_NAME}")]):
        try:
            before = lock.stat()
            if _is_held(lock, before):
                continue
            now = lock.stat()
            # Another rank may have removed it and begun to build meanwhile.
            if (now.st_ino, now.st_mtime_ns) != (before.st_ino, before.st_mtime_ns):
                continue
            _remove_cut_libraries(lock.parent, report)
            lock.unlink()
        except FileNotFoundError:
            continue
        age = time.time() - before.st_mtime
        report(
            f"removed the stale build lock {lock} ({age:.0f} s old, its build is gone); "
            "the op compiles anew if it is not whole"
        )
        removed.append(lock)
    return removed


def prebuild(
    *, report: Callable[[str], None] | None = None, ops: tuple[str, ...] = OPS
) -> dict[str, float]:
    """Compiles and loads each op; one that is compiled already is only loaded.

    Args:
        report: Called with each line of progress; default: stderr.
        ops: Names of DeepSpeed's builders.

    Returns:
        Seconds of each op; empty on another accelerator than the CPU, whose ops DeepSpeed compiles
        at the first use.

    Raises:
        ValueError: If an op cannot be compiled.
    """
    report = report or _to_stderr
    # torch looks for ninja on PATH, and another version of it would compile every op anew.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    remove_stale_locks(report=report)
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        report(
            f"accelerator={accelerator.device_name()}: nothing is prebuilt; DeepSpeed compiles its "
            "ops at the first use (for CPU ops set DS_ACCELERATOR=cpu)"
        )
        return {}
    seconds = {}
    if ops == OPS:
        if problem := async_io_problem():
            report(f"op {ASYNC_IO} is left out, without it there is no NVMe offload: {problem}")
        else:
            ops = (*OPS, ASYNC_IO)
    for number, name in enumerate(ops, 1):
        begin = time.monotonic()
        _load(name, f"op {number}/{len(ops)} {name}", report)
        seconds[name] = time.monotonic() - begin
    return seconds


def async_io_problem() -> str | None:
    """Why the op of NVMe offload cannot be compiled here, with the remedy; None if it can."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(ASYNC_IO)
    if builder is not None and builder.is_compatible(verbose=False):
        return None
    return (
        "offload to nvme needs libaio and its headers, which are not here; install them "
        "(Debian, Ubuntu: apt-get install libaio-dev; Fedora: dnf install libaio-devel), or "
        "offload to cpu"
    )


def _load(name: str, title: str, report: Callable[[str], None]) -> None:
    """Loads one op in a thread, while this one reports and watches for locks left by others."""
    errors: list[Exception] = []

    def load() -> None:
        try:
            _load_op(name, report)
        except Exception as error:  # handed to the caller's thread
            errors.append(error)

    begin = time.monotonic()
    worker = threading.Thread(target=load, daemon=True)
    worker.start()
    while True:
        worker.join(_REPORT_SECONDS)
        elapsed = time.monotonic() - begin
        if not worker.is_alive():
            break
        report(f"{title}: compiling, {elapsed:.0f} s (about 30 to 100 s on an idle machine)")
        remove_stale_locks(report=report)
    if errors:
        first_line = (str(errors[0]).strip() or type(errors[0]).__name__).splitlines()[0]
        raise ValueError(
            f"{name} cannot be compiled ({first_line}); a C++ compiler is needed: install g++, or "
            "see the whole output with MEGAGPT_TRACEBACK=1"
        ) from errors[0]
    report(f"{title}: ready in {elapsed:.1f} s")


def _load_op(name: str, report: Callable[[str], None]) -> None:
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    if builder is None:
        raise ValueError(f"DeepSpeed has no {name} for this accelerator")
    root = extensions_root()
    for folder in (root / builder.name, *root.glob(f"*/{builder.name}")):
        # Under a lock another process is writing them.
        if not (folder / LOCK_NAME).exists():
            _remove_cut_libraries(folder, report)
    builder.load(verbose=False)


def _remove_cut_libraries(folder: Path, report: Callable[[str], None]) -> None:
    """Removes libraries that were cut off while they were linked.

    Such a file is newer than its objects, so ninja keeps it, and loading it ends the process with a
    bus error.
    """
    for library in folder.glob("*.so"):
        if not _is_whole_library(library):
            library.unlink(missing_ok=True)
            report(f"removed {library}, which is cut off; the op compiles anew")


def _is_whole_library(library: Path) -> bool:
    """Whether an ELF file holds its table of sections, which ends it; other formats pass."""
    with library.open("rb") as file:
        header = file.read(64)
    if sys.platform != "linux":
        return True
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":  # 64 bit
        return False
    table, entry_bytes, num_entries = struct.unpack_from("<40xQ10xHH", header)
    return library.stat().st_size >= table + entry_bytes * num_entries


def _is_held(lock: Path, status: os.stat_result) -> bool:
    """Whether a process is building under this lock."""
    folder = str(lock.parent.resolve())
    target = f"{folder}/{LOCK_NAME}"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(_points_to(fd, target) for fd in (process / "fd").iterdir()):
                return True
            # Compilers outlive a killed Python and still write into the folder.
            name = (process / "comm").read_text().strip()
            if name in _COMPILERS and _points_to(process / "cwd", folder):
                return True
        except OSError:  # it ended meanwhile, or belongs to another user
            continue
    sees_holder = (
        Path("/proc/self/fd").is_dir()
        and os.geteuid() in (0, status.st_uid)
        and _file_system(folder) not in _NETWORK_FILE_SYSTEMS
    )
    return not sees_holder and time.time() - status.st_mtime < _UNSEEN_HOLDER_SECONDS


def _points_to(link: Path, target: str) -> bool:
    try:
        return os.readlink(link) == target
    except OSError:
        return False


def _file_system(folder: str) -> str:
    """Type of the mounted file system that holds a folder."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [
        (len(where), kind)
        for _, where, kind, *_ in mounts
        if folder == where or folder.startswith(where.rstrip("/") + "/")
    ]
    return max(holding, default=(0, ""))[1]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
