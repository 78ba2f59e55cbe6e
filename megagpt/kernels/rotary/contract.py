"""What every back end of rotary positions does.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, in Llama's half-split form.
"""

# b micro-batch, s sequence, n query heads, k key heads, d head dim

from __future__ import annotations

from typing import Protocol

import torch


class Rotary(Protocol):
    """Turns the pairs (i, i + d/2) of each head by its position's angles."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, turned; backward turns the gradients back.

        Args:
            query: [b, s, n, d], contiguous, any float type. Not modified.
            key: [b, s, k, d], as query.
            cos: [1 or b, s, d/2], of query's type; no gradient.
            sin: As cos.

        Returns:
            As query and key, contiguous.
        """
        ...
