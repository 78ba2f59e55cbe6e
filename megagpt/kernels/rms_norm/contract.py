"""What every back end of RMSNorm does.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

# r rows (all dims but the last), h the size that is normalised

from __future__ import annotations

from typing import Protocol

import torch


class RMSNorm(Protocol):
    """y = z / sqrt(mean(z^2) + eps) * weight, where z is x, or x + residual."""

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        residual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalises the last dim; statistics in at least float32.

        Args:
            x: [.., h], any float type. Not modified.
            weight: [h], of x's type.
            eps: Inside the root.
            residual: [.., h] of x's type; None adds nothing.

        Returns:
            y and z, [.., h], of x's type. z is x itself without a residual; its gradient and that
            of y both go to x and to residual.
        """
        ...
