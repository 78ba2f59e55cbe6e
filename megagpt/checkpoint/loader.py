"""Which checkpoint all ranks load, and the reading of what one of them holds.

Next file: `format/reader.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from megagpt.checkpoint.agreement import Agreement, in_words
from megagpt.checkpoint.directory import find_checkpoints
from megagpt.checkpoint.format.manifest import KINDS, read_links
from megagpt.checkpoint.format.reader import CheckpointReader, stray_files
from megagpt.checkpoint.format.shard_file import DamagedCheckpoint
from megagpt.checkpoint.state.optimizer_state import OptimizerState
from megagpt.checkpoint.state.parts import Part, Units

logger = logging.getLogger("megagpt")

_ELEMENT_BYTES = 4
_CHUNK_ELEMENTS = 16 << 20
"""On their way through the host's memory to a device."""


class CheckpointRefused(ValueError):
    """What every rank was told of and raises alike, so that one of them need print it."""


def load_checkpoint(
    path: Path,
    state: OptimizerState,
    units: Units,
    *,
    agreement: Agreement,
    restore: Callable[[CheckpointReader], None],
) -> CheckpointReader:
    """Loads weights and moments from the newest checkpoint that is whole; a collective.

    What the state holds is overwritten; `restore` takes the rest from the same checkpoint.

    Returns:
        Of what was loaded; closed, but for its folder and manifest.

    Raises:
        CheckpointRefused: On every rank, if nothing could be loaded.
    """
    problem = ""
    for directory, sha256 in _candidates(path, agreement):
        if problem:
            logger.info(f"warning: {problem}; the checkpoint before it is taken")
        reader: CheckpointReader | None = None
        error: Exception | None = None
        strays: list[str] = []
        with state.loading():
            try:
                with CheckpointReader(directory, held_bytes=_held_bytes(units)) as reader:
                    if sha256 not in ("", reader.manifest.sha256):
                        raise ValueError(f"{directory} is not the one that rank 0 finds there")
                    _fill(reader, state, units)
                    restore(reader)
                strays = stray_files(directory, reader.manifest)
            except Exception as caught:  # none may go on alone, whatever has happened to it
                error = caught
            problem = _agree(error, agreement)
        if not problem:
            assert reader is not None
            if strays:
                logger.info(f"warning: not of {directory} and not read: {', '.join(strays)}")
            return reader
    raise CheckpointRefused(f"{problem}; resume from another step_* folder")


def _candidates(path: Path, agreement: Agreement) -> Iterator[tuple[Path, str]]:
    """(folder, hash of its manifest) of each to try; as rank 0 finds them, on every rank."""
    found: Iterator[Path] = iter(())
    problem = ""
    if agreement.rank == 0:
        try:
            found = find_checkpoints(path)
        except (ValueError, OSError) as error:
            problem = in_words(error)
    if problem := agreement.first(problem):
        raise CheckpointRefused(problem)
    while True:
        directory = next(found, None)
        links = read_links(directory) if directory else None
        mine = None if directory is None else (directory, links.sha256 if links else "")
        candidate = agreement.of_rank_0(mine)
        if candidate is None:
            return
        yield candidate


def _agree(error: Exception | None, agreement: Agreement) -> str:
    """What is damaged, the same on every rank; empty if nothing is.

    Raises:
        CheckpointRefused: On every rank, if one of them could not read for another reason: what
            storage refuses today may be there tomorrow, and no older step is better.
    """
    mine = None
    if error is not None:
        mine = (in_words(error), isinstance(error, DamagedCheckpoint))
    outcomes = agreement.failures(mine)
    if error is not None and not isinstance(error, (ValueError, OSError)):
        raise error  # a fault of ours, with its traceback
    failed = [(f"rank {rank}: {p}", damage) for rank, (p, damage) in outcomes.items()]
    for problem, is_damage in failed:
        if not is_damage:
            raise CheckpointRefused(f"{problem}; mend that, or resume from another step_* folder")
    return failed[0][0] if failed else ""


def _held_bytes(units: Units) -> int:
    parts = (part for unit in units for part in unit if part is not None)
    return sum(part.slice.size for part in parts) * len(KINDS) * _ELEMENT_BYTES


def _fill(reader: CheckpointReader, state: OptimizerState, units: Units) -> None:
    """Reads all that this rank holds."""
    for number, parts in enumerate(units):
        with state.unit(number, writes=True) as ranges:
            for part, tensors in zip(parts, ranges, strict=True):
                if part is not None:
                    held = {kind: tensors[kind][: part.slice.size] for kind in KINDS}
                    _read_part(reader, part, held)


def _read_part(reader: CheckpointReader, part: Part, tensors: dict[str, torch.Tensor]) -> None:
    """Reads all kinds of one part, straight into its memory where that is the host's."""
    record = reader.manifest.tensors.get(part.name)
    if record is not None and record.shape != part.shape:
        raise ValueError(
            f"{reader.directory} has {part.name} of shape {record.shape}, this model of "
            f"{part.shape}; it is of another model"
        )
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        targets = {kind: tensor.detach().numpy() for kind, tensor in tensors.items()}
        reader.read_into(part.name, part.slice, targets)
        return
    for begin in range(0, part.slice.size, _CHUNK_ELEMENTS):
        end = min(begin + _CHUNK_ELEMENTS, part.slice.size)
        first = part.slice.start
        chunk = dataclasses.replace(part.slice, start=first + begin, end=first + end)
        values = {kind: np.empty(chunk.size, np.float32) for kind in tensors}
        reader.read_into(part.name, chunk, values)
        for kind, tensor in tensors.items():
            tensor[begin:end].copy_(torch.from_numpy(values[kind]))
