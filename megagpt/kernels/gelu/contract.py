"""What every back end of GELU does.

Source: Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415, in the tanh form of GPT-2.
"""

from __future__ import annotations

from typing import Protocol

import torch


class GELU(Protocol):
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); backward keeps x only."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Of each element, computed in at least float32 and rounded once.

        Args:
            x: Of any shape and float type. Not modified.

        Returns:
            As x.
        """
        ...
