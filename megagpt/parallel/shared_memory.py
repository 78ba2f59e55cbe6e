"""The files of shared memory that DeepSpeed's all-reduce on CPUs makes, 66 MiB a rank.

It removes them only when its groups are taken down, which a signal or an error leaves out (0.19.8).
A file that is unlinked lives on for those who have mapped it, so nothing stays whatever ends a run.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

import torch.distributed as dist

_FOLDER = Path("/dev/shm")
_PREFIX = "deepspeed_allreduce_buffer"
_YOUNG_SECONDS = 60.0
"""One that is younger may be about to be mapped."""


def release_shared_memory() -> None:
    """Unlinks the files of this world's ranks, once all have mapped them; a collective.

    Removes those of runs before it too, which no process maps; other users' stay.
    """
    # barrier over the world: after it every rank has mapped the file of every other
    dist.barrier()
    # As DeepSpeed names it; a group that was there before it may have no address.
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    own = f"{_PREFIX}_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    with contextlib.suppress(FileNotFoundError):
        (_FOLDER / own).unlink()
    remove_abandoned(_FOLDER)


def remove_abandoned(folder: Path) -> list[Path]:
    """Removes the files that ended runs of this user have left, and gives their names."""
    now = time.time()
    found = []
    for path in folder.glob(f"{_PREFIX}_{os.getuid()}_*"):
        with contextlib.suppress(FileNotFoundError):
            if now - path.stat().st_mtime > _YOUNG_SECONDS:
                found.append(path)
    mapped = _mapped() if found else set()
    abandoned = [path for path in found if str(path) not in mapped]
    for path in abandoned:
        path.unlink(missing_ok=True)
    return abandoned


def _mapped() -> set[str]:
    """Files of that name that a process maps, as far as this user may look: its own."""
    paths: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        # A process that has ended meanwhile, or is another user's, whose files are not looked at.
        with contextlib.suppress(OSError):
            paths.update(re.findall(rf"(/\S*{_PREFIX}_\S+)", maps.read_text(errors="replace")))
    return paths
