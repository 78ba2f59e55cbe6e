"""What all ranks of a save or a load learn alike, so that none goes on or waits alone."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")


class Agreement:
    """Messages among all ranks; every method is a collective, but for `close`.

    They go through a group of its own and the CPU, so that a save in the background meets no
    message of training.

    Args:
        timeout: For one rank to wait for another's files: storage may be slow, which is no hang.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def close(self) -> None:
        """Ends the group."""
        dist.destroy_process_group(self.group)

    def failures(self, value: _T | None) -> dict[int, _T]:
        """The values of the ranks that have one, by rank.

        Where none has, which is the rule, that takes one number of each rank and no more.
        """
        any_value = torch.tensor(int(value is not None))
        # all-reduce over the world: whether this rank has a value -> whether any has
        dist.all_reduce(any_value, op=dist.ReduceOp.MAX, group=self.group)
        if not any_value:
            return {}
        values: list[_T | None] = [None] * self.world_size
        # all-gather over the world: each rank's value
        dist.all_gather_object(values, value, group=self.group)
        return {rank: each for rank, each in enumerate(values) if each is not None}

    def gather(self, value: _T) -> list[_T] | None:
        """Every rank's value, by rank, on rank 0; None on the others."""
        values = [value] * self.world_size if self.rank == 0 else None
        # gather to rank 0: each rank's value
        dist.gather_object(value, values, dst=0, group=self.group)
        return values

    def of_rank_0(self, value: _T) -> _T:
        """Rank 0's value."""
        box = [value]
        # broadcast from rank 0
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def first(self, problem: str) -> str:
        """The first rank's problem, with its rank; empty if none has one."""
        problems = self.failures(problem or None)
        return next((f"rank {rank}: {words}" for rank, words in problems.items()), "")


def in_words(error: Exception | None) -> str:
    """An error in one line, empty if there is none; of what no user can mend, its class too."""
    if error is None:
        return ""
    message = " ".join(str(error).split()) or type(error).__name__
    is_known = isinstance(error, (OSError, ValueError))
    return message if is_known else f"{type(error).__name__}: {message}"
