"""Counts the bytes of every collective of torch.distributed while it is active.

It wraps the methods of `ProcessGroup`, the one door through which torch's own functions,
DeepSpeed's `TorchBackend` and coalesced variants all pass. `count_dispatched` looks from below, at
what torch's dispatcher ran, and must see the same number of calls.
Next file: `communication.py`, its user.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_METHODS = {
    "allreduce": ("all-reduce", 0),
    "allreduce_coalesced": ("all-reduce", 0),
    "allgather": ("all-gather", 0),
    "allgather_coalesced": ("all-gather", 0),
    "allgather_into_tensor_coalesced": ("all-gather", 0),
    "all_gather_single": ("all-gather", 0),
    "all_gather_single_coalesced": ("all-gather", 0),
    "_allgather_base": ("all-gather", 0),
    "reduce_scatter": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1),
    "_reduce_scatter_base": ("reduce-scatter", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "send": ("send", 0),
    "recv": ("receive", 0),
    "recv_anysource": ("receive", 0),
    "gather": ("gather", 1),
    "scatter": ("scatter", 0),
    "alltoall": ("all-to-all", 1),
    "alltoall_base": ("all-to-all", 1),
    "all_to_all_single": ("all-to-all", 1),
}
"""Method of ProcessGroup -> (operation, which argument holds the payload)."""

_OPERATORS = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "allgather": "all-gather",
    "allgather_base": "all-gather",
    "allgather_coalesced": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "send": "send",
    "recv": "receive",
    "recv_any_source": "receive",
    "gather": "gather",
    "scatter": "scatter",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
}
"""Operator of c10d, without underscores at its ends -> operation."""


@dataclass(frozen=True)
class Call:
    """One call on this rank."""

    operation: str
    """As in the second column of the table of methods."""
    axis: str
    """Of its group, as the counter's `axis_of` names it."""
    group_size: int
    """Ranks of its group."""
    dtype: str
    """Of the payload."""
    payload_bytes: int
    """Handed over by this rank: of an all-gather the whole output, of a reduce-scatter the whole
    input, of a send or receive the message, of all others the tensor."""

    @property
    def ring_bytes(self) -> float:
        """What this rank sends under the ring algorithm."""
        return ring_bytes(self.operation, self.payload_bytes, self.group_size)


def ring_bytes(operation: str, payload_bytes: float, group_size: int) -> float:
    """Bytes that a rank of a group sends under the ring algorithm; a receive sends nothing.

    Source: Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054, section 7.1: an all-reduce is
    a reduce-scatter followed by an all-gather, each of which moves the whole once.
    """
    if operation == "send":
        return payload_bytes
    if operation == "receive":
        return 0.0
    rounds = 2 if operation == "all-reduce" else 1
    return rounds * (group_size - 1) / group_size * payload_bytes


class CollectiveCounter:
    """Records calls between `start` and `stop`.

    Args:
        axis_of: Names the parallel axis of a group.
    """

    def __init__(self, axis_of: Callable[[dist.ProcessGroup], str]) -> None:
        self.axis_of = axis_of
        self.calls: list[Call] = []
        self._originals: dict[str, Any] = {}

    def start(self) -> None:
        """Begins to record."""
        assert not self._originals
        self.calls = []
        for name in _METHODS:
            self._originals[name] = vars(dist.ProcessGroup)[name]  # getattr would unwrap it
            setattr(dist.ProcessGroup, name, self._recording(name))

    def stop(self) -> list[Call]:
        """Ends, and returns the calls."""
        for name, original in self._originals.items():
            setattr(dist.ProcessGroup, name, original)
        self._originals = {}
        return self.calls

    def _recording(self, name: str) -> Callable:
        original = self._originals[name]
        operation, position = _METHODS[name]

        @functools.wraps(original)
        def record(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            tensors = list(_tensors(arguments[position]))
            self.calls.append(
                Call(
                    operation,
                    self.axis_of(group),
                    group.size(),
                    str(tensors[0].dtype).removeprefix("torch."),
                    sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                )
            )
            return original.__get__(group)(*arguments, **options)

        return record


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for element in value:
            yield from _tensors(element)


@contextmanager
def count_dispatched() -> Iterator[Counter]:
    """Counts the same calls below Python, by torch's profiler, to show that none was missed.

    Every collective of c10d passes torch's dispatcher as an operator `c10d::*`, from C++ too; the
    only one that does not is DeepSpeed's own over shared memory, an operator of its own.

    Yields:
        Filled at the end: how often each operation ran, DeepSpeed's own under its full name.
    """
    counts: Counter = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield counts
    for event in profile.events():
        name = event.name
        if name.startswith("c10d::") and "barrier" not in name:
            counts[_OPERATORS[name.removeprefix("c10d::").strip("_")]] += 1
        elif name.startswith("deepspeed::"):
            counts[name] += 1
