"""What every back end of linear + cross entropy does, and the two row passes it is made of.

The output layer's logits are by far the largest tensor of a step. They are made for a few chunks
of tokens at a time, each turned into its gradient in place, and gone: so the gradients of hidden
states and weight are ready when the forward pass is.
Next files: `reference.py`, the definition; `chunked.py`, the autograd function.
"""

# t tokens, c tokens of a chunk, h hidden, v padded vocabulary; "/tp" local

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

IGNORE_INDEX = -100
"""Label of a token that does not count."""


@dataclass(frozen=True)
class Vocabulary:
    """This rank's part of the output layer's rows."""

    size: int
    """Real tokens of the whole vocabulary; the padding behind them takes no part."""
    first: int = 0
    """Token of this rank's first row."""
    group: dist.ProcessGroup | None = None
    """Over which the rows are split, in the order of its ranks; None where one rank has all."""

    def num_real(self, rows: int) -> int:
        """How many of this rank's rows are real tokens; the padding is behind them."""
        return min(max(self.size - self.first, 0), rows)


class LinearCrossEntropy(Protocol):
    """Cross entropy of hidden @ weight^T, plus z_loss * logsumexp^2."""

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        *,
        vocabulary: Vocabulary,
        z_loss: float = 0.0,
        gradient: float = 1.0,
    ) -> torch.Tensor:
        """The loss of each token.

        Args:
            hidden: [t, h], any float type, the same on every rank of the group. Not modified; its
                gradient is this rank's part, which the caller sums over the group.
            weight: [v/tp, h], of hidden's type.
            targets: [t], int64, tokens in [0, vocabulary.size), or IGNORE_INDEX.
            vocabulary: Which rows these are.
            z_loss: Weight of the squared logsumexp (Chowdhery et al. 2022,
                https://arxiv.org/abs/2204.02311, section 5).
            gradient: What backward will hand to every token's loss, as far as the caller knows: the
                gradients are made for it. Backward is right for any other too, and slower.

        Returns:
            [t], at least float32, nats; 0 where ignored; equal on every rank of the group.
        """
        ...


class RowPasses(Protocol):
    """What a back end brings: its passes over the rows of a chunk of logits, and over gradients."""

    def statistics(self, logits: torch.Tensor, index: torch.Tensor, num_real: int) -> torch.Tensor:
        """One pass over each row's first num_real logits.

        Args:
            logits: [c, v/tp], contiguous. Not modified; what stands behind num_real is not read.
            index: [c], int64, of the target's logit in this row; negative where it is elsewhere.
            num_real: 0 too.

        Returns:
            [3, c], at least float32: largest logit (-inf without any), sum of exp(logit - largest)
            (0 without any), the target's logit (0 where it is elsewhere).
        """
        ...

    def gradients_(
        self,
        logits: torch.Tensor,
        index: torch.Tensor,
        log_sum_exp: torch.Tensor,
        scale: torch.Tensor,
        target_scale: torch.Tensor,
        num_real: int,
    ) -> None:
        """Overwrites logits by their gradient: scale * softmax - target_scale at the target.

        Args:
            logits: [c, v/tp], contiguous; becomes 0 behind num_real.
            index: As in `statistics`.
            log_sum_exp: [c], at least float32, over the whole vocabulary.
            scale: [c], as log_sum_exp; 0 where the token is ignored.
            target_scale: As scale.
            num_real: As in `statistics`.
        """
        ...

    def accumulate_(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Adds part to total, which is of the same shape and at least float32."""
        ...

    def scale_unless_one_(
        self, tensors: tuple[torch.Tensor, ...], ratio: torch.Tensor, tolerance: float
    ) -> None:
        """Multiplies tensors by a number on the device, if it is further than tolerance from 1.

        The host does not wait for it; where it is 1, hardly any memory is touched.
        """
        ...
