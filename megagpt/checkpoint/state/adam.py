"""Adam's count of updates, which decides its bias correction.

DeepSpeed's CPU kernels keep beta^t themselves, in float32, and multiply it step by step; told of a
step that does not follow, they take `pow` instead, which differs in the last bit for most steps
(0.19.8, `csrc/includes/cpu_adam.h`, `IncrementStep`). So the steps are told again, one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

_NEGLIGIBLE = 2.0**-30
"""Where beta^t is below this, 1 - beta^t is 1 in float32, whatever the last bits of beta^t."""


def adam_step(optimizer: torch.optim.Optimizer) -> int:
    """Updates that were made.

    DeepSpeed's fused Adam counts on the last parameter of each call only.
    """
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def count_of_steps(
    optimizer: torch.optim.Optimizer, master: torch.Tensor, step: int = 0
) -> int | torch.Tensor:
    """A count as the optimizer keeps it beside a weight's moments: torch's is a tensor."""
    if isinstance(optimizer, torch.optim.AdamW):
        return torch.tensor(float(step), device=master.device)
    return step


def set_adam_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Sets the count of every parameter that has state, and what the kernels keep."""
    for master, state in optimizer.state.items():
        state["step"] = count_of_steps(optimizer, master, step)
    if isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        group["step"] = step
    for betas in {tuple(group["betas"]) for group in optimizer.param_groups}:
        if (tell := _kernel(optimizer, betas)) is None:
            continue
        # Far in, a jump is as good, for nothing is left of beta^t.
        first = step if max(betas) ** step < _NEGLIGIBLE else 1
        for number in range(first, step + 1):
            tell(number)


def _kernel(optimizer: Any, betas: tuple[float, float]) -> Callable[[int], None] | None:
    """Tells the CPU kernel of a step, on a tensor of one element; None where it keeps nothing."""
    scratch = [torch.zeros(1) for _ in range(4)]  # parameter, gradient, moments
    if isinstance(optimizer, DeepSpeedCPUAdam):
        return lambda step: optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *betas, 1.0, 0.0, True, *scratch
        )
    on_cpu = {tensor.device.type for tensor in optimizer.state} == {"cpu"}
    if isinstance(optimizer, FusedAdam) and on_cpu:
        parameter, gradient, *moments = ([tensor] for tensor in scratch)
        return lambda step: optimizer.multi_tensor_adam(
            65536,
            optimizer._dummy_overflow_buf,
            [gradient, parameter, *moments],
            *(0.0, *betas, 1.0, step, optimizer.adam_w_mode, 1, 0.0),
        )
    return None
