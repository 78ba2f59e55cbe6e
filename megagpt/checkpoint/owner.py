"""Which run writes to a folder of checkpoints: one at a time, and the last that took it.

A lock tells at the start that another run of this host is alive; where locks do not reach, as
between hosts on some file systems, the older run finds before it writes that the folder is no
longer its own. A run that is gone never keeps another from starting. Knows no torch.
Next file: `saver.py`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Any

logger = logging.getLogger("megagpt")

OWNER_FILE = ".owner"


class Ownership:
    """The folder as this process has taken it; one process of a run does.

    Args:
        checkpoints: Of one run.

    Raises:
        ValueError: If a live process of this host has it.
        OSError: If it cannot be written.
    """

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints
        self.token = secrets.token_hex(8)
        path = checkpoints / OWNER_FILE
        # Open until `release`, for the lock ends with the descriptor.
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            owner = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid()}
            content = (json.dumps(owner) + "\n").encode()
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, content, 0)
            os.fsync(self._descriptor)  # for ranks that see it through another host
        except BaseException:
            self.release()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read(self.checkpoints)
            host = owner.get("host", socket.gethostname())
            if host == socket.gethostname():
                raise ValueError(
                    f"{self.checkpoints} is written by another run (process {owner.get('pid')}); "
                    "wait until it has ended, or name another --output_dir"
                ) from None
            # The lock of a host that has died may outlive it.
            logger.info(f"warning: {self.checkpoints} is taken over from a run on {host}")
        except OSError:
            pass  # a file system without locks

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

    @property
    def is_kept(self) -> bool:
        """Whether no other run has taken the folder since."""
        return is_owned(self.checkpoints, self.token)

    def release(self) -> None:
        """Lets another run take the folder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_owned(checkpoints: Path, token: str) -> bool:
    """Whether a folder is the one that the run of a token has taken."""
    return _read(checkpoints).get("token") == token


def _read(checkpoints: Path) -> dict[str, Any]:
    try:
        owner = json.loads((checkpoints / OWNER_FILE).read_bytes().decode())
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}
