"""The only call of `deepspeed.initialize`, and what differs between ZeRO stages behind one face.

Next file: `train_step.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import deepspeed
import torch
import torch.distributed as dist

from megagpt.config.schema import OptimizerConfig
from megagpt.training.optimizer import build_optimizer


def build_engine(
    model: torch.nn.Module, config: OptimizerConfig, ds_config: dict
) -> deepspeed.DeepSpeedEngine:
    """Wraps the model for training under the resolved DeepSpeed configuration.

    Args:
        model: Built by `megagpt.model.zero3.build_model` under the same ZeRO stage.
        config: AdamW's settings.
        ds_config: Resolved: no "auto", no optimizer or scheduler section.

    Returns:
        The engine; its optimizer steps are taken by `optimizer_step`.
    """
    zero = ds_config.get("zero_optimization", {})
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    values = dict(ds_config)
    if zero.get("stage", 0) == 0:
        # Ours under ZeRO-0: see clip_zero0_gradients.
        values["gradient_clipping"] = 0.0
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config, offloaded=offloaded),
        config=values,
        dist_init_required=False,
    )
    return engine


def clip_zero0_gradients(parameters: Iterable[torch.Tensor], max_norm: float) -> float:
    """Clips the reduced gradients of fp32 ZeRO-0 in place and returns their global norm.

    DeepSpeed clips there too, but its `get_global_grad_norm()` stays None (0.19.8); so norm and
    clipping are both done here, with DeepSpeed's own clipping switched off.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        # DeepSpeed's own form (max_norm / (norm + 1e-6)), so that all stages agree.
        scale = max_norm / (norm + 1e-6)
        if scale < 1:
            torch._foreach_mul_(gradients, scale)
    return norm.item()


def optimizer_step(engine: deepspeed.DeepSpeedEngine, *, lr: float, clip_grad: float) -> float:
    """Takes the optimizer step at the accumulation boundary.

    Args:
        engine: After the last backward of the step.
        lr: Learning rate of this step.
        clip_grad: Largest global gradient norm; 0 is off.

    Returns:
        The global norm of the gradients before clipping.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    if engine.zero_optimization_stage() == 0:
        norm = clip_zero0_gradients(engine.module.parameters(), clip_grad)
        engine.step()
        return norm
    engine.step()
    return float(engine.get_global_grad_norm())


def parameter_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Euclidean norm of all weights; a collective under ZeRO-3, where each rank holds a shard."""
    sharded = engine.zero_optimization_stage() == 3
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for parameter in engine.module.parameters():
        values = parameter.ds_tensor if sharded else parameter
        total += values.detach().to(engine.device).float().pow(2).sum(dtype=torch.float64)
    if sharded and dist.get_world_size() > 1:
        # all-reduce over dp: squares of shards -> squares of the whole
        dist.all_reduce(total)
    return total.sqrt().item()
