"""What every back end of attention does, and what it is told about documents."""

# b micro-batch, s sequence, n query heads, k key/value heads (each serves n/k), d head dim

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Documents:
    """Where documents begin in the samples of a micro-batch."""

    positions: torch.Tensor
    """[b, s], int64, of each token in its document; a sample begins with 0."""
    given_offsets: torch.Tensor | None = None
    """`offsets`, where who made the positions knows them."""

    @cached_property
    def first(self) -> torch.Tensor:
        """[b, s], int64: for each token the place of the first one of its document."""
        places = torch.arange(self.positions.shape[1], device=self.positions.device)
        return (places - self.positions).contiguous()

    @cached_property
    def offsets(self) -> torch.Tensor:
        """[documents + 1], int32: where each begins in the b*s tokens, and b*s at the end.

        Where they are not given, the host waits for the device.
        """
        if self.given_offsets is not None:
            return self.given_offsets
        begins = (self.positions.flatten() == 0).nonzero().flatten()
        return F.pad(begins, (0, 1), value=self.positions.numel()).to(torch.int32)


class Attention(Protocol):
    """softmax(q k^T / sqrt(d)) v, each token seeing itself and earlier ones of its document."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: Documents | None,
    ) -> torch.Tensor:
        """What each query gathers.

        Args:
            query: [b, s, n, d], any float type. Not modified.
            key: [b, s, k, d], as query; k divides n.
            value: As key.
            documents: None: each sample is one.

        Returns:
            As query, contiguous; softmax in at least float32.
        """
        ...
