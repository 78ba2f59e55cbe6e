"""Compiles DeepSpeed's CPU ops before a run needs them, and removes the locks of killed builds.

torch compiles an op under a file `lock` in the op's folder, which a killed build leaves behind;
every later run then waits in `FileBaton.wait` for ever, without a message. Importing this module
needs the standard library only. The command is `megagpt ops`.
"""

from __future__ import annotations

import os
import re
import struct
import sys
import threading
import time
from pathlib import Path

OPS: dict[str, tuple[str, ...]] = {
    "cpu": ("ShareMemCommBuilder", "CPUAdamBuilder", "FusedAdamBuilder"),
    "cuda": ("CPUAdamBuilder", "FusedAdamBuilder"),
}
"""By accelerator."""
ASYNC_IO = "AsyncIOBuilder"
"""Op of NVMe offload, built where libaio is installed."""
LOCK_NAME = "lock"

_REPORT_SECONDS = 10.0
# Where the holder cannot be seen (another user, another host): far longer than any op compiles.
_UNSEEN_HOLDER_SECONDS = 3600.0
_ARCHITECTURE = re.compile(r"(\d+\.\d+)?(\+PTX)?")
_COMPILERS = frozenset(
    {"ninja", "c++", "g++", "cc1plus", "collect2", "ld", "as", "clang", "clang++", "nvcc", "ptxas"}
)
# All others may be seen by other hosts, whose processes are not.
_LOCAL_FILE_SYSTEMS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "apfs"}
)


def extensions_root() -> Path:
    """Folder of torch's compiled extensions: TORCH_EXTENSIONS_DIR, else the user's cache."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "torch_extensions"


def remove_stale_locks() -> None:
    """Removes the lock of every build that no process is working on, with a line on stderr.

    A live build has its lock open (torch's `FileBaton` keeps the descriptor), or a compiler at work
    in the folder. Where processes cannot be seen, a lock counts as stale after an hour.
    """
    root = extensions_root()
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
            _remove_cut_libraries(lock.parent)
            lock.unlink()
        except FileNotFoundError:
            continue
        age = time.time() - before.st_mtime
        _report(
            f"removed the stale build lock {lock} ({age:.0f} s old, its build is gone); "
            "the op compiles anew if it is not whole"
        )


def prepare_builds() -> None:
    """Lets this process compile and load ops: with the ninja of this Python, and no stale lock.

    torch takes the ninja on PATH, and another version of it would compile every op anew.
    """
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    remove_stale_locks()


def prebuild() -> None:
    """Compiles and loads each op, telling of it on stderr; one that is compiled is only loaded.

    On an accelerator that is neither CPU nor CUDA DeepSpeed compiles its ops at the first use.

    Raises:
        ValueError: If an op cannot be compiled.
    """
    prepare_builds()
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator().device_name()
    if accelerator not in OPS:
        _report(
            f"accelerator={accelerator}: nothing is prebuilt; DeepSpeed compiles its ops at the "
            "first use (for CPU ops set DS_ACCELERATOR=cpu)"
        )
        return
    ops = OPS[accelerator]
    if problem := fused_adam_problem():
        _report(f"op FusedAdamBuilder is left out, torch's Adam takes its place: {problem}")
        ops = tuple(name for name in ops if name != "FusedAdamBuilder")
    if problem := async_io_problem():
        _report(f"op {ASYNC_IO} is left out, without it there is no NVMe offload: {problem}")
    else:
        ops = (*ops, ASYNC_IO)
    for number, name in enumerate(ops, 1):
        _load(name, f"op {number}/{len(ops)} {name}")


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


def fused_adam_problem() -> str | None:
    """Why DeepSpeed's fused Adam cannot be compiled here; None if it can, or is there."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cuda":
        return None
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import builder

    if installed_ops.get("fused_adam", False):
        return None
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if odd := [arch for arch in re.split("[ ;]+", listed) if not _ARCHITECTURE.fullmatch(arch)]:
        # DeepSpeed 0.19.8 dies of it (`op_builder/builder.py`, `compute_capability_args`).
        return f"TORCH_CUDA_ARCH_LIST={listed} holds {odd[0]}, which DeepSpeed cannot read"
    try:
        builder.assert_no_cuda_mismatch("fused_adam")
    except (builder.MissingCUDAException, builder.CUDAMismatchException) as error:
        words = " ".join(str(error).split())
        return f"it needs nvcc of the CUDA that torch was built with ({words})"
    return None


def _load(name: str, title: str) -> None:
    """Loads one op in a thread, while this one reports and watches for locks left by others."""
    errors: list[Exception] = []

    def load() -> None:
        try:
            _load_op(name)
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
        _report(f"{title}: compiling, {elapsed:.0f} s (about 30 to 100 s on an idle machine)")
        remove_stale_locks()
    if errors:
        first_line = (str(errors[0]).strip() or type(errors[0]).__name__).splitlines()[0]
        raise ValueError(
            f"{name} cannot be compiled ({first_line}); a C++ compiler is needed: install g++, or "
            "see the whole output with MEGAGPT_TRACEBACK=1"
        ) from errors[0]
    _report(f"{title}: ready in {elapsed:.1f} s")


def _load_op(name: str) -> None:
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    if builder is None:
        raise ValueError(f"DeepSpeed has no {name} for this accelerator")
    root = extensions_root()
    for folder in (root / builder.name, *root.glob(f"*/{builder.name}")):
        # Under a lock another process is writing them.
        if not (folder / LOCK_NAME).exists():
            _remove_cut_libraries(folder)
    builder.load(verbose=False)


def _remove_cut_libraries(folder: Path) -> None:
    """Removes libraries that were cut off while they were linked.

    Such a file is newer than its objects, so ninja keeps it, and loading it ends the process with a
    bus error.
    """
    for library in folder.glob("*.so"):
        if not _is_whole_library(library):
            library.unlink(missing_ok=True)
            _report(f"removed {library}, which is cut off; the op compiles anew")


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
        and _file_system(folder) in _LOCAL_FILE_SYSTEMS
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


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
