"""Torch's generators; training draws nothing from them, what a user adds to it may.

Next file: `megagpt/checkpoint/saver.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

_CPU, _CUDA = "random.cpu", "random.cuda"


def random_states() -> dict[str, np.ndarray]:
    """The states of now, by the names under which they are kept."""
    states = {_CPU: torch.get_rng_state().numpy()}
    if torch.cuda.is_available():
        states[_CUDA] = torch.cuda.get_rng_state().numpy()
    return states


def restore_random_states(read: Callable[[str], np.ndarray | None]) -> None:
    """Sets those that are kept; `read` gives what is kept under a name, None if nothing is."""
    cpu, cuda = read(_CPU), read(_CUDA)
    if cpu is not None:
        torch.set_rng_state(torch.from_numpy(cpu))
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(cuda))
