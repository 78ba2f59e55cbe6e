"""What every back end of SwiGLU does.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from typing import Protocol

import torch


class SwiGLU(Protocol):
    """silu(gate) * up; backward keeps gate and up only."""

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The product of each element, computed in at least float32 and rounded once.

        Args:
            gate: [.., f], any float type. Not modified.
            up: As gate.

        Returns:
            As gate.
        """
        ...
