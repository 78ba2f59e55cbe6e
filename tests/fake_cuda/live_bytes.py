"""Bytes alive on a fake CUDA device while one micro-batch is trained, by what they are for.

Counted is what torch's operations hand out; not the workspaces of kernels, nor what the allocator
loses between blocks, nor the states of the optimizer. Next file: `terms.py`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fake_device import fake_cuda
from fake_model import batch, build, tensor_parallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megagpt.config.schema import ModelConfig, Recompute
from megagpt.model.gpt import GPTModel

KINDS = ("weights", "gradients", "shared", "layers", "loss", "temporary")
"""`layers` and `shared`: kept for backward, made inside of blocks and outside; `loss`: all that the
output layer makes, forward and backward; `temporary`: the rest."""


@dataclass(frozen=True)
class Job:
    """What is trained, or only evaluated."""

    config: ModelConfig
    dtype: torch.dtype = torch.bfloat16
    recompute: Recompute = "none"
    masked: bool = False
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    backward: bool = True


@dataclass(eq=False)
class _Allocation:
    num_bytes: int
    kind: str


class LiveBytes(TorchDispatchMode):
    """Follows each storage of a model's pass from the operation that makes it to its end."""

    def __init__(self, model: GPTModel) -> None:
        super().__init__()
        self._kind, self._in_forward = "weights", True
        self._live: dict[int, _Allocation] = {}
        self._events: list[tuple[int, _Allocation]] = []
        for parameter in model.parameters():
            self._add(parameter)
        self._kind = "shared"
        for block in model.layers.values():
            block.register_forward_pre_hook(lambda *_: self._turn_to("layers"))
            block.register_forward_hook(lambda *_: self._turn_to("shared"))
        model.lm_head.register_forward_pre_hook(self._enter_head)

    def _turn_to(self, kind: str) -> None:
        self._kind = kind

    def _enter_head(self, head: torch.nn.Module, inputs: tuple) -> None:
        self._kind = "loss"
        if inputs[0].requires_grad:  # its gradient is the last thing that the head's backward makes
            inputs[0].register_hook(lambda grad: self._turn_to("temporary"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            allocation = self._live[key] = _Allocation(storage.nbytes(), self._kind)
            self._events.append((1, allocation))
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        allocation = self._live.pop(key)
        if self._in_forward and allocation.kind in ("shared", "layers"):
            allocation.kind = "temporary"  # it was not kept for backward
        self._events.append((-1, allocation))

    def end_forward(self) -> None:
        """What lives now is kept for backward."""
        self._in_forward = False

    def largest(self, model: GPTModel) -> dict[str, int]:
        """The most bytes of each kind at any time, and of all together as `peak`."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._live[parameter.grad.untyped_storage()._cdata].kind = "gradients"
        now: Counter[str] = Counter()
        largest: Counter[str] = Counter()
        for sign, allocation in self._events:
            for kind in (allocation.kind, "peak"):
                now[kind] += sign * allocation.num_bytes
                largest[kind] = max(largest[kind], now[kind])
        return dict(largest)


def count(job: Job, damage: Callable[[GPTModel], None] = lambda model: None) -> dict[str, float]:
    """MiB of each kind at its largest, and `peak`; of `layers`, one layer's share.

    Rank 0's, where the job is split. `damage` does something to the model first.
    """
    config = job.config
    tp = tensor_parallel(job.tensor_parallel_size, sequence_parallel=job.sequence_parallel)
    with fake_cuda(), torch.set_grad_enabled(job.backward):
        model = build(config, job.dtype, tp, job.recompute).train(job.backward)
        damage(model)
        arguments = batch(config, 1, masked=job.masked)
        with LiveBytes(model) as live:
            loss = model(*arguments).sum()
            live.end_forward()
            if job.backward:
                loss.backward()
    mib = {kind: num_bytes / 2**20 for kind, num_bytes in live.largest(model).items()}
    mib["layers"] = mib.get("layers", 0.0) / config.num_layers
    return {kind: mib.get(kind, 0.0) for kind in (*KINDS, "peak")}
