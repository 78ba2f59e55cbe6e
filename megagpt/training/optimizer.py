"""AdamW over decay and no-decay groups, by DeepSpeed's fused kernels or torch's.

Next file: `engine.py`, which hands the optimizer to DeepSpeed.
"""

from __future__ import annotations

import torch

from megagpt.config.schema import OptimizerConfig


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay, vectors (norms, biases) without, in the order of the model.

    A ZeRO-3 parameter has an empty local tensor; its global shape is `ds_shape`.
    """
    decay: list[torch.Tensor] = []
    no_decay: list[torch.Tensor] = []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decay if len(shape) >= 2 else no_decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def build_optimizer(
    model: torch.nn.Module, config: OptimizerConfig, *, offloaded: bool, compiles: bool = True
) -> torch.optim.Optimizer:
    """Makes DeepSpeed's CPU Adam if the optimizer state is offloaded, else its fused Adam.

    All are AdamW with fp32 moments; the learning rate is set at every step by the trainer.

    Args:
        model: Whose parameters are optimized.
        config: AdamW's settings.
        offloaded: Whether master weights and moments are in host memory.
        compiles: Whether DeepSpeed's fused Adam can be had; else torch's takes its place.
    """
    # Imported here: importing an op loads DeepSpeed's accelerator, which a --help must not do.
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    groups = parameter_groups(model, config.weight_decay)
    if not offloaded and not compiles:
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
    if offloaded:
        return DeepSpeedCPUAdam(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, adamw_mode=True
        )
    return FusedAdam(groups, lr=config.lr, betas=config.betas, eps=config.eps, adam_w_mode=True)
