"""Which part of each whole tensor a rank holds, and which part it writes.

Between DeepSpeed's flat ranges (`optimizer_state.py`) and the slices of the manifest.
Next file: `snapshot.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megagpt.checkpoint.format.manifest import KINDS
from megagpt.checkpoint.format.slices import Slice, local_slice
from megagpt.checkpoint.state.optimizer_state import Held, OptimizerState
from megagpt.model.initialization import VOCABULARY_WEIGHTS
from megagpt.parallel.groups import ProcessGroups


@dataclasses.dataclass(frozen=True)
class Part:
    """A range that this rank holds."""

    name: str
    """Canonical name of the parameter."""
    shape: tuple[int, ...]
    """Of the whole tensor, without the padding of the vocabulary."""
    slice: Slice
    """What of it is held."""
    owned: tuple[int, int] | None
    """Which of the held elements this rank writes; where None, another rank writes them."""

    @property
    def piece(self) -> Slice:
        """What is written."""
        assert self.owned is not None
        begin, end = (self.slice.start + at for at in self.owned)
        return dataclasses.replace(self.slice, start=begin, end=end)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of what is written: its box where it is all of one, else flat."""
        piece = self.piece
        if len(self.shape) == 2 and piece.is_whole_box:
            return piece.rows[1] - piece.rows[0], piece.width
        return (piece.size,)


Units = list[list[Part | None]]
"""Parts in the order of the state's units and ranges; None where a range is all padding."""


def held_parts(
    state: OptimizerState, names: dict[int, str], groups: ProcessGroups, *, vocab_size: int
) -> Units:
    """What this rank holds of every parameter; `names` are canonical, by the parameter's id().

    Of embedding and output layer, rows beyond `vocab_size` are padding.
    """

    def part(held: Held) -> Part | None:
        parameter: Any = held.parameter
        name = names[id(parameter)]
        local_shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        tp_dim = getattr(parameter, "tp_dim", None)
        shape = list(local_shape)
        if tp_dim is not None:
            shape[tp_dim] *= groups.topology.tensor_parallel_size
        if name in VOCABULARY_WEIGHTS:
            shape[0] = vocab_size
        found = local_slice(
            tuple(shape),
            local_shape,
            tp_dim=tp_dim,
            tp_rank=groups.tp_rank,
            start=held.start,
            end=held.end,
        )
        if found is None:
            return None
        owned = _owned(parameter, found.size, groups, is_replicated=state.is_replicated)
        return Part(name, tuple(shape), found, owned)

    return [[part(held) for held in unit] for unit in state.units]


def _owned(
    parameter: Any, size: int, groups: ProcessGroups, *, is_replicated: bool
) -> tuple[int, int] | None:
    """Of what several ranks hold alike, the range that this one writes."""
    if getattr(parameter, "tp_dim", None) is None and groups.tp_rank > 0:
        return None
    if getattr(parameter, "ds_pipe_replicated", False):
        return None  # the first stage has the tied weight too
    if not is_replicated:
        return 0, size
    dp_size, dp_rank = groups.topology.data_parallel_size, groups.dp_rank
    begin, end = size * dp_rank // dp_size, size * (dp_rank + 1) // dp_size
    return (begin, end) if begin < end else None


def owned_parts(units: Units) -> Iterator[Part]:
    """What this rank writes, in order."""
    for unit in units:
        for part in unit:
            if part is not None and part.owned is not None:
                yield part


def owned_tensors(units: Units) -> Iterator[tuple[str, Part]]:
    """(kind, part) of what this rank writes, in order."""
    for part in owned_parts(units):
        for kind in KINDS:
            yield kind, part
