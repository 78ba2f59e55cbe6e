"""What every back end of accumulation does."""

from __future__ import annotations

from typing import Protocol

import torch


class Accumulate(Protocol):
    """total += part, in place, without autograd."""

    def __call__(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Adds, with no copy of part in total's type.

        Args:
            total: Contiguous, at least float32 and at least as wide as part. Modified.
            part: Of as many elements, contiguous, any float type.
        """
        ...
