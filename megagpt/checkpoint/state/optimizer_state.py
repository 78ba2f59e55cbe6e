"""Master weights and Adam's moments where each of DeepSpeed's optimizers keeps them.

One class for each way of keeping, behind one face: `units` that can be brought into memory one at
a time, each with the ranges of parameters that this rank holds. DeepSpeed's own accessors will not
do: `safe_get_full_*` sums whole tensors over dp, `safe_get_local_*` is ZeRO-3's, `safe_set_*`
leaves the low-precision weights stale, and none reaches Adam's step, or state that no step has made
(0.19.8).
Next file: `parts.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megagpt.checkpoint.format.manifest import KINDS
from megagpt.checkpoint.state.adam import adam_step, count_of_steps, set_adam_step

_MOMENTS = KINDS[1:]
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Held:
    """A range of a parameter whose state this rank holds."""

    parameter: torch.nn.Parameter
    """The model's own."""
    start: int
    """First element, in the flattened parameter of this tensor-parallel rank."""
    end: int
    """One past the last."""


class OptimizerState(ABC):
    """The state that this rank holds, in units; the optimizer may not have made a step yet."""

    is_replicated = False
    """Whether every data-parallel rank holds the same."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self.optimizer: Any = engine.optimizer

    @property
    @abstractmethod
    def units(self) -> list[list[Held]]:
        """What is held, by unit; the same at every call."""

    @abstractmethod
    @contextmanager
    def unit(self, number: int, *, writes: bool) -> Iterator[list[dict[str, torch.Tensor]]]:
        """Brings a unit into memory; its tensors are views of the state, to be changed if `writes`.

        Yields:
            For each of the unit's ranges, [elements] in float32 by kind.
        """

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the writing of all units; the weights of the model follow. A collective."""
        yield

    @property
    def adam_step(self) -> int:
        """Updates that Adam has made."""
        return adam_step(self._adam)

    @adam_step.setter
    def adam_step(self, step: int) -> None:
        set_adam_step(self._adam, step)

    @property
    def loss_scaler(self) -> dict[str, float]:
        """What fp16's dynamic loss scaler has come to; empty where the scale is fixed."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        if scaler is None or not scaler.dynamic:
            return {}
        return {name: getattr(scaler, name) for name in _SCALER}

    @loss_scaler.setter
    def loss_scaler(self, values: dict[str, float]) -> None:
        # Settings stay those of this run; with another precision before, there is nothing to take.
        for name in self.loss_scaler.keys() & values.keys():
            setattr(self.optimizer.loss_scaler, name, values[name])

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The one that holds the moments."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _views(
        self, master: torch.Tensor, ranges: Iterable[tuple[int, int]]
    ) -> list[dict[str, torch.Tensor]]:
        """Ranges (first element, size) of a master and its moments, made where no step has."""
        state = self._adam.state[master]
        for kind in _MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(master.data, dtype=torch.float32)
        state.setdefault("step", count_of_steps(self._adam, master))
        tensors = {"weight": master.data, **{kind: state[kind] for kind in _MOMENTS}}
        return [
            {kind: tensor.view(-1)[at : at + size] for kind, tensor in tensors.items()}
            for at, size in ranges
        ]


def optimizer_state(engine: deepspeed.DeepSpeedEngine) -> OptimizerState:
    """The one for the engine's optimizer."""
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _Zero3State(engine)
    if isinstance(engine.optimizer, (BF16_Optimizer, DeepSpeedZeroOptimizer)):
        return _PartitionedState(engine)
    assert isinstance(engine.optimizer, torch.optim.Optimizer), type(engine.optimizer)
    return _PlainState(engine)


class _PlainState(OptimizerState):
    """ZeRO-0: the parameters are their own masters, and every rank holds all of them."""

    is_replicated = True

    @property
    def units(self) -> list[list[Held]]:
        return [[Held(p, 0, p.numel()) for p in self._parameters()]]

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @contextmanager
    def unit(self, number: int, *, writes: bool) -> Iterator[list[dict[str, torch.Tensor]]]:
        yield [self._views(p, [(0, p.numel())])[0] for p in self._parameters()]


class _PartitionedState(OptimizerState):
    """ZeRO-1 and 2, and the bf16 optimizer: a range of each group's flattened parameters.

    `_hp_mapping` would say the same, but not where `round_robin_gradients` has reordered a group.
    """

    @property
    def units(self) -> list[list[Held]]:
        return [[held for held, _ in self._ranges(number)] for number in range(len(self._masters))]

    @property
    def _masters(self) -> list[torch.Tensor]:
        if isinstance(self.optimizer, BF16_Optimizer):
            return self.optimizer.fp32_groups_flat_partition
        return self.optimizer.single_partition_of_fp32_groups

    def _ranges(self, number: int) -> list[tuple[Held, int]]:
        """What of each parameter lies in this rank's partition, and where in it."""
        if isinstance(self.optimizer, BF16_Optimizer):
            parameters = self.optimizer.bf16_groups[number]
            offsets = accumulate((p.numel() for p in parameters), initial=0)
        else:
            parameters = self.optimizer.round_robin_bit16_groups[number]
            offsets = self.optimizer.round_robin_bit16_offsets[number]
        size = self._masters[number].numel()
        begin = size * dist.get_rank(self.optimizer.real_dp_process_group[number])
        ranges = []
        for parameter, offset in zip(parameters, offsets, strict=False):
            start = max(0, begin - offset)
            end = min(parameter.numel(), begin + size - offset)
            if start < end:
                ranges.append((Held(parameter, start, end), offset + start - begin))
        return ranges

    @contextmanager
    def unit(self, number: int, *, writes: bool) -> Iterator[list[dict[str, torch.Tensor]]]:
        ranges = [(at, held.end - held.start) for held, at in self._ranges(number)]
        yield self._views(self._masters[number], ranges)

    @contextmanager
    def loading(self) -> Iterator[None]:
        yield
        # all-gather over dp: each rank's partition, rounded -> the weights that the model uses
        self.optimizer.update_lp_params()


class _Zero3State(OptimizerState):
    """ZeRO-3: this rank's shard of each parameter, in sub-groups that may be on NVMe."""

    @property
    def units(self) -> list[list[Held]]:
        return [
            [Held(p, *self._range(p)) for p in group if self._range(p)[0] < self._range(p)[1]]
            for group in self.optimizer.fp16_groups
        ]

    @staticmethod
    def _range(parameter: Any) -> tuple[int, int]:
        """The shard without its padding."""
        size = parameter.ds_tensor.ds_numel
        start = size * dist.get_rank(parameter.ds_process_group)
        return start, min(start + size, parameter.ds_numel)

    @contextmanager
    def unit(self, number: int, *, writes: bool) -> Iterator[list[dict[str, torch.Tensor]]]:
        optimizer = self.optimizer
        is_swapped = optimizer._swappable_optimizer_subgroup(number)
        if is_swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        ranges, offset = [], 0
        for parameter in optimizer.fp16_groups[number]:
            start, end = self._range(parameter)
            if start < end:
                ranges.append((offset, end - start))
            offset += parameter.ds_tensor.ds_numel
        views = self._views(optimizer.fp32_partitioned_groups_flat[number], ranges)
        try:
            yield views
        finally:  # after a damaged checkpoint too, for an older one may be loaded next
            if writes:
                # The shards that the model gathers: rounded, in memory or in their files.
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            if is_swapped and writes:
                optimizer._optimizer_states_and_gradient_swap_out(number)
            elif is_swapped:
                optimizer._release_swap_buffers(number)

    @contextmanager
    def loading(self) -> Iterator[None]:
        self.optimizer.checkpoint_event_prologue()  # whole small parameters go back to shards
        yield
        # all-gather over dp: shards of the small parameters that stay whole
        self.optimizer.checkpoint_event_epilogue()
