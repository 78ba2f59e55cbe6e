"""Dropout whose mask is a function of (seed, step, sample, layer, site, element) and nothing else.

So no layout, no accumulation and no recomputation changes or repeats a mask, and no generator has
state to save. Each sample has a SplitMix64 stream, of which an element takes its own number.
Next files: `megagpt/kernels/dropout/`.
"""

# b micro-batch, s sequence, h hidden; s/tp only under sequence parallelism

from __future__ import annotations

from enum import IntEnum

import torch

from megagpt.kernels.dropout.contract import Dropout
from megagpt.kernels.splitmix import GOLDEN, mix_


class Site(IntEnum):
    """Where in a layer an element is dropped."""

    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2


def dropout_keys(sample_indices: torch.Tensor, *, seed: int, step: int) -> torch.Tensor:
    """The key of each sample in one step.

    Args:
        sample_indices: [b], int64, global indices of samples.
        seed: Of the run.
        step: Optimizer step, from 1.

    Returns:
        [b], int64.
    """
    state = mix_(torch.tensor(seed, dtype=torch.int64) + GOLDEN)
    state = mix_(state ^ mix_(torch.tensor(step, dtype=torch.int64) + GOLDEN))
    return mix_(state ^ mix_(sample_indices + GOLDEN))


def keyed_dropout(
    x: torch.Tensor,
    keys: torch.Tensor | None,
    *,
    probability: float,
    layer: int,
    site: Site,
    dropout: Dropout,
    sequence_start: int = 0,
) -> torch.Tensor:
    """Zeroes elements and scales the others by 1 / (1 - probability).

    Args:
        x: [b, s, h], or a slice [b, s/tp, h] of the sequence.
        keys: [b], from `dropout_keys`; None drops nothing.
        probability: Of dropping an element, to 24 bits.
        layer: Index of the block.
        site: Where in the block.
        dropout: The back end.
        sequence_start: Position of x's first token in the sequence.

    Returns:
        As x.
    """
    if keys is None or probability == 0:
        return x
    stream = mix_(keys ^ mix_(torch.full_like(keys, layer * len(Site) + site) + GOLDEN))  # [b]
    return dropout(x, stream, first=sequence_start * x.shape[-1], probability=probability)
