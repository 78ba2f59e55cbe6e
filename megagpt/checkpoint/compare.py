"""What differs between two checkpoints of any layouts; one tensor in memory at a time.

Knows no torch. Next file: `format/reader.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megagpt.checkpoint.format.manifest import CheckpointManifest
from megagpt.checkpoint.format.reader import CheckpointReader
from megagpt.config.command_line import config_to_dict
from megagpt.config.dotted_keys import leaves

_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TensorDifference:
    """How one kind of one parameter differs."""

    kind: str
    name: str
    problem: str = ""
    """Why the values cannot be compared: only one has it, or the shapes differ."""
    num_elements: int = 0
    num_different: int = 0
    """Elements that are not the same bits."""
    largest: float = 0.0
    """Largest absolute difference; infinite where only one of two is a number."""
    relative: float = 0.0
    """Norm of the difference over the norm of the first."""

    @property
    def is_bit_equal(self) -> bool:
        """Whether every bit is the same."""
        return not self.problem and self.num_different == 0

    def is_within(self, tolerance: float) -> bool:
        """Whether no element differs by more; 0 asks for the same bits."""
        if not tolerance:
            return self.is_bit_equal
        return not self.problem and self.largest <= tolerance


def compare_tensors(
    first: CheckpointReader, second: CheckpointReader, *, kinds: Sequence[str]
) -> Iterator[TensorDifference]:
    """Compares every parameter of either.

    Raises:
        DamagedCheckpoint: If what is read is not what was written.
    """
    ours, theirs = first.manifest.tensors, second.manifest.tensors
    for name in {**ours, **theirs}:
        problem = ""
        if name not in theirs:
            problem = "only in the first"
        elif name not in ours:
            problem = "only in the second"
        elif ours[name].shape != theirs[name].shape:
            problem = f"shape {list(ours[name].shape)} against {list(theirs[name].shape)}"
        for kind in kinds:
            if problem:
                yield TensorDifference(kind, name, problem)
            else:
                yield _compare(kind, name, first.tensor(name, kind), second.tensor(name, kind))


def _compare(kind: str, name: str, first: np.ndarray, second: np.ndarray) -> TensorDifference:
    first, second = first.reshape(-1), second.reshape(-1)
    num_different, largest, squares, reference = 0, 0.0, 0.0, 0.0
    for begin in range(0, first.size, _CHUNK_ELEMENTS):
        a, b = (each[begin : begin + _CHUNK_ELEMENTS] for each in (first, second))
        reference += float(np.square(a, dtype=np.float64).sum())
        different = a.view(np.uint32) != b.view(np.uint32)
        if not different.any():
            continue
        with np.errstate(invalid="ignore"):  # a difference of infinities
            gap = np.abs(a[different].astype(np.float64) - b[different])
        gap[np.isnan(gap)] = math.inf
        num_different += gap.size
        largest = max(largest, float(gap.max()))
        squares += float(np.square(gap).sum())
    relative = math.sqrt(squares / reference) if reference else math.inf if squares else 0.0
    return TensorDifference(
        kind,
        name,
        num_elements=first.size,
        num_different=num_different,
        largest=largest,
        relative=relative,
    )


def compare_states(first: CheckpointManifest, second: CheckpointManifest) -> list[str]:
    """What differs beside the tensors, as `name: first, second`."""
    a, b = _flat_values(first), _flat_values(second)
    absent = "nothing"
    return [
        f"{name}: {a.get(name, absent)}, {b.get(name, absent)}"
        for name in {**a, **b}
        if a.get(name, absent) != b.get(name, absent)
    ]


def _flat_values(manifest: CheckpointManifest) -> dict[str, Any]:
    state = dataclasses.asdict(manifest.state)
    del state["config"]
    tree = {
        "state": state,
        "layout": dataclasses.asdict(manifest.layout),
        "config": config_to_dict(manifest.state.config),
        "versions": manifest.versions,
    }
    return leaves(tree)
