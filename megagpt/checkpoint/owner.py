"""Which run writes to a folder of checkpoints: one at a time, and the last that took it.

A second run on the same host is refused while the first is alive. Of another host nothing is known,
and one that has died must not keep a job from being started again: the folder is taken over, and
the older run, should it be alive, finds before it writes that the folder is no longer its own.
Knows no torch. Next file: `directory.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from megagpt.files import decode_json, write_json

logger = logging.getLogger("megagpt")

OWNER_FILE = ".owner"
_CLOCK_SECONDS = 5.0
"""How far apart two tellings of one process's start may be; an id comes again much later."""

_DYING_SECONDS = 40.0
"""DeepSpeed's launcher gives ranks 30 seconds to end."""


class FolderTaken(OSError):
    """Another run writes to the folder now."""


class Ownership:
    """A folder as this process has taken it; one process of a run does.

    Raises:
        ValueError: If a live process of this host has it.
        OSError: If it cannot be written.
    """

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints
        self.token = secrets.token_hex(8)
        self._inode = checkpoints.stat().st_ino
        self._former = _read(checkpoints)
        self._has_written = False
        _judge(self._former, checkpoints)
        self._write(os.getpid())

    def _write(self, pid: int | None) -> None:
        started = psutil.Process().create_time()
        owner = {"token": self.token, "place": _place(), "pid": pid, "started": started}
        owner["inode"] = self._inode
        write_json(self.checkpoints / OWNER_FILE, owner)

    def require(self) -> None:
        """To be called before each change: checks that no other run has taken the folder since.

        Raises:
            FolderTaken: If one has.
            OSError: If that cannot be read.
        """
        try:
            require_owner(self.checkpoints, self.token)
        except FileNotFoundError:
            if self.checkpoints.stat().st_ino != self._inode:
                raise OSError(
                    f"{self.checkpoints} is not the folder that it was; is it still mounted?"
                ) from None
            self._write(os.getpid())  # someone has tidied up; a run never removes it
        self._has_written = True

    def release(self) -> None:
        """Lets another run take the folder; one that was taken over unchanged is given back."""
        if not is_owned(self.checkpoints, self.token):
            return
        with contextlib.suppress(OSError):  # on a disk that has become read-only
            if self._former and not self._has_written:
                write_json(self.checkpoints / OWNER_FILE, self._former)
            else:
                self._write(None)


def is_owned(checkpoints: Path, token: str) -> bool:
    """Whether a folder is the one that the run of a token has taken."""
    return _read(checkpoints).get("token") == token


def require_owner(checkpoints: Path, token: str) -> None:
    """Checks that a folder is the one that the run of a token has taken.

    Raises:
        FolderTaken: If another run has taken it.
        OSError: If that cannot be read.
    """
    owner = _decode((checkpoints / OWNER_FILE).read_bytes())
    if "token" not in owner:
        raise OSError(f"{checkpoints / OWNER_FILE} is damaged; remove it")
    if owner["token"] != token:
        raise FolderTaken(f"{checkpoints} has been taken by another run, on {owner.get('place')}")


def _judge(owner: dict[str, Any], checkpoints: Path) -> None:
    """Refuses a folder whose owner is alive; tells of one that has not ended in order."""
    place, pid, started = (owner.get(key) for key in ("place", "pid", "started"))
    if not isinstance(place, str) or type(pid) is not int or not isinstance(started, float):
        return
    if owner.get("inode") != checkpoints.stat().st_ino:
        return  # it came with a copy of another folder
    if place == _place() and pid == os.getpid():
        return
    if place == _place() and _stays_alive(pid, started, checkpoints):
        raise ValueError(
            f"{checkpoints} is written by another run (process {pid}); wait until it has ended, "
            "or name another --output_dir"
        )
    logger.info(
        f"{checkpoints} is taken over from a run that has not ended in order (process {pid} on "
        f"{place})"
    )


def _place() -> str:
    """The host, and the name space of its processes, in which alone their numbers mean anything."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _stays_alive(pid: int, started: float, checkpoints: Path) -> bool:
    """Whether a process is there, and not about to end: one that was killed takes its time."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > _CLOCK_SECONDS:
            return False  # another one has its number
        deadline, is_told = time.monotonic() + _DYING_SECONDS, False
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if not is_told:
                logger.info(f"waiting for process {pid}, which writes to {checkpoints}, to end")
                is_told = True
            if time.monotonic() > deadline:
                return True
            time.sleep(0.1)
    except (psutil.Error, ValueError):
        pass  # gone
    return False


def _read(checkpoints: Path) -> dict[str, Any]:
    try:
        return _decode((checkpoints / OWNER_FILE).read_bytes())
    except OSError:
        return {}


def _decode(content: bytes) -> dict[str, Any]:
    try:
        owner = decode_json(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
