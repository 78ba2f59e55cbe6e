"""Activation checkpointing: what is computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def call(
    function: Callable[..., torch.Tensor], *arguments: object, recompute: bool
) -> torch.Tensor:
    """Calls a function; recompute: backward calls it again instead of keeping what it computed."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)
