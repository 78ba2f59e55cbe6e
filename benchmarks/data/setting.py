"""What all measurements of the data pipeline share: a folder, a text, and processes to run in."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_PEERS = Path(__file__).with_name("peers.py")


@dataclass(frozen=True)
class Corpus:
    """What made-up pairs take from a real one."""

    lengths: np.ndarray
    """[d], tokens of documents, end of document included."""
    vocab_size: int
    eod: int


@dataclass(frozen=True)
class Setting:
    """What all measurements share."""

    work_dir: Path
    """For files, some gigabytes."""
    repeats: int
    """Times that each side is measured."""
    megatron: str | None
    """An interpreter with megatron-core."""
    reason: str
    """Why there is none; else empty."""

    def megatron_job(self, name: str, **arguments: Any) -> Callable[[], Any] | None:
        """A job of `peers.py`, to be called; None where there is no interpreter."""
        python = self.megatron
        return None if python is None else lambda: run_peers(python, name, [arguments])[0]


def reason_against(python: str | None) -> str:
    """Why an interpreter cannot run the jobs with Megatron; empty where it can."""
    if python is None:
        return "no --peer_python; name an interpreter that has megatron-core"
    try:
        run_peers(python, "probe", [{}])
    except (RuntimeError, OSError) as error:
        return f"{error}; install megatron-core there"
    return ""


def run_peers(python: str, name: str, jobs: list[dict[str, Any]]) -> list[Any]:
    """Runs a job of `peers.py` with each of the arguments, all at once.

    Raises:
        RuntimeError: If one fails.
    """
    processes = [
        subprocess.Popen(
            [python, str(_PEERS), name, json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in jobs
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{name} in {python} ended with {process.returncode}: {last}")
    # Megatron prints too.
    return [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of this file in a new interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def copy_documents(source: Path, target: Path, num_bytes: int) -> None:
    """Copies the first lines of a JSONL file that hold so much text."""
    with source.open("rb") as lines, target.open("wb") as copy:
        copied = 0
        for line in lines:
            if copied >= num_bytes:
                break
            copy.write(line)
            copied += len(json.loads(line)["text"].encode())
