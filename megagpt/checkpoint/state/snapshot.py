"""What a rank writes, in order: straight from the optimizer's state, or from a copy of it.

And torch's generators; training draws nothing from them, what a user adds to it may.

Next file: `megagpt/checkpoint/saver.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import numpy as np
import torch

from megagpt.checkpoint.format.manifest import KINDS
from megagpt.checkpoint.state.optimizer_state import OptimizerState
from megagpt.checkpoint.state.parts import Part, Units, owned_tensors

_CPU, _CUDA = "random.cpu", "random.cuda"
_CHUNK_ELEMENTS = 64 << 20
"""Torch rounds pinned memory up to a power of two, which this is."""

Tensors = Generator[tuple[str, Part, np.ndarray], None, None]
"""(kind, part, values); to be closed when no more is wanted."""


def live_tensors(state: OptimizerState, units: Units) -> Tensors:
    """What this rank owns, straight from the state, one unit in memory at a time."""
    with closing(_live_views(state, units)) as views:
        for kind, part, values in views:
            yield kind, part, values.cpu().numpy()


def _live_views(
    state: OptimizerState, units: Units
) -> Generator[tuple[str, Part, torch.Tensor], None, None]:
    for number, parts in enumerate(units):
        with state.unit(number, writes=False) as ranges:
            for part, tensors in zip(parts, ranges, strict=True):
                if part is not None and part.owned is not None:
                    for kind in KINDS:
                        yield kind, part, tensors[kind][slice(*part.owned)]


class HostCopy:
    """A copy of it in host memory, which is kept from one save to the next."""

    def __init__(self, state: OptimizerState, units: Units, device: torch.device) -> None:
        self._state = state
        self._units = units
        self._is_cuda = device.type == "cuda"
        self._chunks: list[torch.Tensor] = []

    def fill(self) -> None:
        """Copies the state of now."""
        if not self._chunks:
            self._chunks = self._allocate()
        position = 0
        with closing(_live_views(self._state, self._units)) as views:
            for _, _, values in views:
                for target in self._at(position, values.numel()):
                    source, values = values[: target.numel()], values[target.numel() :]
                    target.copy_(source, non_blocking=True)
                    position += target.numel()
        if self._is_cuda:
            torch.cuda.synchronize()

    def tensors(self) -> Tensors:
        """What was copied; a tensor may come in several parts."""
        position = 0
        for kind, part in owned_tensors(self._units):
            for values in self._at(position, part.piece.size):
                yield kind, part, values.numpy()
            position += part.piece.size

    def _allocate(self) -> list[torch.Tensor]:
        """Pinned, where a device copies to it by itself."""
        total = sum(part.piece.size for _, part in owned_tensors(self._units))
        sizes = (min(_CHUNK_ELEMENTS, total - at) for at in range(0, total, _CHUNK_ELEMENTS))
        return [torch.empty(s, dtype=torch.float32, pin_memory=self._is_cuda) for s in sizes]

    def _at(self, position: int, size: int) -> Iterator[torch.Tensor]:
        """The memory of so many elements, in one part for each chunk that they lie in."""
        while size:
            number, offset = divmod(position, _CHUNK_ELEMENTS)
            found = self._chunks[number][offset : offset + size]
            yield found
            position, size = position + found.numel(), size - found.numel()


def random_states(device: torch.device) -> dict[str, np.ndarray]:
    """The states of the CPU's and the device's generators, by the names of their records."""
    states = {_CPU: torch.get_rng_state().numpy()}
    if device.type == "cuda":
        states[_CUDA] = torch.cuda.get_rng_state(device).numpy()
    return states


def restore_random_states(device: torch.device, read: Callable[[str], np.ndarray | None]) -> None:
    """Sets those that are kept; `read` gives what is kept under a name, None if nothing is."""
    cpu, cuda = read(_CPU), read(_CUDA)
    if cpu is not None:
        torch.set_rng_state(torch.from_numpy(cpu))
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(torch.from_numpy(cuda), device)
