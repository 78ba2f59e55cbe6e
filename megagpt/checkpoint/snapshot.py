"""What a rank writes, in order: straight from the optimizer's state, or from a copy of it.

Next file: `saver.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing

import numpy as np
import torch

from megagpt.checkpoint.manifest import KINDS
from megagpt.checkpoint.optimizer_state import OptimizerState
from megagpt.checkpoint.parts import Part, Units, owned_tensors

logger = logging.getLogger("megagpt")

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
    """A copy of it in host memory, which is kept from one save to the next.

    Args:
        state: Of the engine.
        units: What this rank holds.
        device: Where the state is.
    """

    def __init__(self, state: OptimizerState, units: Units, device: torch.device) -> None:
        self._state = state
        self._units = units
        self._is_cuda = device.type == "cuda"
        self._buffer: torch.Tensor | None = None

    def fill(self) -> None:
        """Copies the state of now."""
        if self._buffer is None:
            size = sum(part.piece.size for _, part in owned_tensors(self._units))
            self._buffer = torch.empty(size, dtype=torch.float32)
            if self._is_cuda and size:
                self._pin(self._buffer)
        position = 0
        with closing(_live_views(self._state, self._units)) as views:
            for _, _, values in views:
                target = self._buffer[position : position + values.numel()]
                target.copy_(values, non_blocking=True)
                position += values.numel()
        if self._is_cuda:
            torch.cuda.synchronize()

    @staticmethod
    def _pin(buffer: torch.Tensor) -> None:
        # Memory that torch pins itself is rounded up to a power of two.
        status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
        if int(status):
            logger.info(f"warning: memory for async_save is not pinned ({status}), so it is slow")

    def tensors(self) -> Tensors:
        """What was copied."""
        assert self._buffer is not None
        position = 0
        for kind, part in owned_tensors(self._units):
            size = part.piece.size
            yield kind, part, self._buffer[position : position + size].numpy()
            position += size

    def close(self) -> None:
        """Frees the memory."""
        if self._buffer is not None and self._is_cuda:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer = None
