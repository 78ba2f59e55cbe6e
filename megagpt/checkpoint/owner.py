"""Which run writes to a folder of checkpoints: one at a time, and the last that took it.

A second run on the same host is refused while the first is alive. Of another host nothing is known,
and one that has died must not keep a job from being started again: the folder is taken over, and
the older run, should it be alive, finds before it writes that the folder is no longer its own.
Knows no torch. Next file: `saver.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Any

import psutil

from megagpt.files import encode_json, write_atomically

logger = logging.getLogger("megagpt")

OWNER_FILE = ".owner"
_CLOCK_SECONDS = 5.0
"""How far apart two tellings of one process's start may be; an id comes again much later."""


class Ownership:
    """A folder as this process has taken it; one process of a run does.

    Args:
        checkpoints: Of one run.

    Raises:
        ValueError: If a live process of this host has it.
        OSError: If it cannot be written.
    """

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints
        self.token = secrets.token_hex(8)
        _refuse_live_owner(checkpoints)
        owner = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
        }
        write_atomically(checkpoints / OWNER_FILE, encode_json(owner))

    @property
    def is_kept(self) -> bool:
        """Whether no other run has taken the folder since."""
        return is_owned(self.checkpoints, self.token)

    def require(self) -> None:
        """Checks that no other run has taken the folder since.

        Raises:
            OSError: If one has.
        """
        owner = _read(self.checkpoints)
        if owner.get("token") != self.token:
            raise OSError(
                f"{self.checkpoints} has been taken by another run (process {owner.get('pid')} "
                f"on {owner.get('host')})"
            )

    def release(self) -> None:
        """Lets another run take the folder."""
        if self.is_kept:
            with contextlib.suppress(OSError):  # on a disk that has become read-only
                (self.checkpoints / OWNER_FILE).unlink()


def is_owned(checkpoints: Path, token: str) -> bool:
    """Whether a folder is the one that the run of a token has taken."""
    return _read(checkpoints).get("token") == token


def _refuse_live_owner(checkpoints: Path) -> None:
    owner = _read(checkpoints)
    host, pid, started = (owner.get(key) for key in ("host", "pid", "started"))
    if not isinstance(host, str) or type(pid) is not int or not isinstance(started, float):
        return
    if host != socket.gethostname():
        logger.info(f"warning: {checkpoints} is taken over from a run on {host}")
        return
    try:
        is_alive = abs(psutil.Process(pid).create_time() - started) < _CLOCK_SECONDS
    except (psutil.Error, ValueError):
        return
    if is_alive and pid != os.getpid():
        raise ValueError(
            f"{checkpoints} is written by another run (process {pid}); wait until it has ended, "
            "or name another --output_dir"
        )


def _read(checkpoints: Path) -> dict[str, Any]:
    try:
        owner = json.loads((checkpoints / OWNER_FILE).read_bytes().decode())
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}
