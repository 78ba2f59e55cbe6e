"""The only call of `deepspeed.initialize`, and what differs between its engines behind one face.

What DeepSpeed 0.19.8 gets wrong is mended in one place each: here, or where the model is built
(`megagpt/model/zero3.py`, `pipeline.py`); docs/deepspeed.md lists it.
Next file: `train_step.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

from megagpt.config.schema import OptimizerConfig
from megagpt.kernels.registry import REFERENCE, Kernels
from megagpt.operations.prebuild import fused_adam_problem
from megagpt.parallel.groups import ProcessGroups
from megagpt.training.optimizer import build_optimizer

logger = logging.getLogger("megagpt")


def build_engine(
    model: torch.nn.Module,
    config: OptimizerConfig,
    ds_config: dict,
    groups: ProcessGroups,
    *,
    kernels: Kernels = REFERENCE,
) -> deepspeed.DeepSpeedEngine:
    """Wraps the model for training under the resolved DeepSpeed configuration.

    Args:
        model: Built by `megagpt.model.build.build_model` for the same layout.
        config: AdamW's settings.
        ds_config: Resolved: no "auto", no optimizer or scheduler section.
        groups: Of the layout.
        kernels: Chooses the one that sums gradients.

    Returns:
        The engine; its `get_global_grad_norm()` holds after each step, in every mode.
    """
    zero = ds_config.get("zero_optimization", {})
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    compiles = offloaded or _compiles_fused_adam()
    optimizer = build_optimizer(model, config, offloaded=offloaded, compiles=compiles)
    values = dict(ds_config)
    if zero.get("stage", 0) == 0:
        values["gradient_clipping"] = 0.0  # done by the hook
        optimizer.register_step_pre_hook(
            lambda *_: clip_zero0_gradients(optimizer, groups, config.clip_grad)
        )
    is_pipeline = groups.topology.pipeline_parallel_size > 1
    if is_pipeline:
        # On by default, they would send a tp-th of each activation and gather it again; under
        # sequence parallelism a rank's activation is a tp-th already, and another one.
        values["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=values,
        mpu=None if is_pipeline else groups,  # a pipeline brings its own
        dist_init_required=False,
    )
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        # An exception at the first overflow there; `training.max_nonfinite_steps` decides.
        scaler.raise_error_at_min_scale = False
    if isinstance(engine.optimizer, BF16_Optimizer):
        _spare_copies(engine, kernels)
    if is_pipeline:
        engine._INSTRUCTION_MAP = {
            **PipelineEngine._INSTRUCTION_MAP,
            schedule.ReduceTiedGrads: reduce_tied_gradients,
        }
    return engine


def _spare_copies(engine: deepspeed.DeepSpeedEngine, kernels: Kernels) -> None:
    """Sums bf16 gradients where the sums are, without copies of them (ZeRO-1).

    DeepSpeed converts each gradient whole before it adds it (0.19.8, `bf16_optimizer.py`,
    `_update_hp_grad`), and copies the flat sums of all parameter groups together to reduce them,
    though each is one tensor (`engine.py`, `allreduce_bucket`). The values are the same.
    """
    optimizer = engine.optimizer
    accumulate = kernels.choose("accumulate")

    @torch.no_grad()
    def update(weight: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        if weight.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group][index]
        accumulate(total, weight.grad.contiguous())
        weight._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            weight.grad.zero_()

    optimizer._update_hp_grad = update
    reduce = engine.buffered_allreduce_fallback
    engine.buffered_allreduce_fallback = lambda grads=None, elements_per_buffer=0: reduce(
        grads=grads, elements_per_buffer=0
    )


def _compiles_fused_adam() -> bool:
    """Whether every rank has DeepSpeed's fused Adam, or can compile it; a collective."""
    problem = fused_adam_problem()
    flag = torch.tensor(bool(problem), dtype=torch.int32, device=get_accelerator().device_name())
    # all-reduce over the world: whether this rank cannot -> whether any cannot
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if flag:
        words = problem or "another host of the run cannot compile it"
        logger.info(f"warning: torch's fused AdamW is used instead of DeepSpeed's: {words}")
    return not flag


def _is_counted(parameter: torch.Tensor, groups: ProcessGroups) -> bool:
    """Whether this rank's copy of a parameter counts in a norm over the replica group."""
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return groups.tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False)


def _sum_of_squares(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """In float64, of float32 squares."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        total += tensor.to(device).float().pow(2).sum(dtype=torch.float64)
    return total


@torch.no_grad()
def clip_zero0_gradients(
    optimizer: torch.optim.Optimizer, groups: ProcessGroups, max_norm: float
) -> None:
    """Clips the reduced gradients of fp32 ZeRO-0 in place and leaves their global norm.

    Gradients that are not finite are dropped, so that the step changes nothing, as under ZeRO.

    DeepSpeed clips there too, but its `get_global_grad_norm()` stays None, and under a pipeline its
    clipping drops parameters of later stages and counts tied weights twice (0.19.8,
    `runtime/utils.py`, `clip_grad_norm_`); so norm and clipping are both done here, before the
    optimizer's step, with DeepSpeed's own switched off. The engine reads `_global_grad_norm`.

    Args:
        optimizer: Whose parameters have their gradients reduced over dp.
        groups: Of the layout.
        max_norm: Largest global norm; 0 is off.
    """
    parameters = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    counted = (p.grad for p in parameters if _is_counted(p, groups))
    squares = _sum_of_squares(counted, parameters[0].device)
    if dist.get_world_size(groups.replica_group) > 1:
        # all-reduce over pp and tp: squares of each rank's part -> of the whole model
        dist.all_reduce(squares, group=groups.replica_group)
    norm = squares.sqrt().float()
    optimizer._global_grad_norm = norm  # type: ignore[attr-defined]
    # The engine takes this for a step that was not made, as ZeRO's optimizers tell it.
    is_finite = math.isfinite(norm)
    optimizer.overflow = not is_finite  # type: ignore[attr-defined]
    if not is_finite:
        for parameter in parameters:
            parameter.grad = None
    elif max_norm > 0:
        # DeepSpeed's own form (max_norm / (norm + 1e-6)), so that all stages agree.
        scale = max_norm / (norm + 1e-6)
        if scale < 1:
            torch._foreach_mul_([parameter.grad for parameter in parameters], scale)


def reduce_tied_gradients(engine: PipelineEngine) -> None:
    """Sums the gradient of tied weights over the stages that hold a copy.

    DeepSpeed's own reads `.grad`; under ZeRO-1 with CPU offload and fp32 accumulation the gradient
    has moved to `.grad_accum` by then and the sum is silently left out (0.19.8,
    `runtime/pipe/engine.py`, `_exec_reduce_tied_grads`).
    """
    for weight, group in engine.module.get_tied_weights_and_groups():
        if engine.using_bf16_optimizer:
            gradient = weight._hp_grad
        elif getattr(engine.optimizer, "use_grad_accum_attribute", False):
            gradient = weight.grad_accum
        else:
            gradient = weight.grad
        # all-reduce over the first and last stage: each use's gradient -> the weight's
        dist.all_reduce(gradient, group=group)


def is_at_least_loss_scale(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether no smaller loss scale could save a step: always, but under fp16's dynamic scale."""
    if not engine.fp16_enabled():
        return True
    scaler = engine.optimizer.loss_scaler
    return scaler.cur_scale <= getattr(scaler, "min_scale", scaler.cur_scale)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Sets the rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def expect_gradient(engine: deepspeed.DeepSpeedEngine, gradient: float) -> None:
    """Tells the model what the next backward passes hand to each token's loss, but fp16's scale."""
    model = engine.module.stage_model if engine.pipeline_parallelism else engine.module
    scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
    model.loss_gradient = gradient * scale


@torch.no_grad()
def parameter_norm(engine: deepspeed.DeepSpeedEngine, groups: ProcessGroups) -> float:
    """Euclidean norm of all weights of the model, each counted once; a collective."""
    squares = torch.zeros((), dtype=torch.float64, device=engine.device)
    for parameter in engine.module.parameters():
        if _is_counted(parameter, groups):
            # Where the values are: no copy of them is made, neither in float32 nor on the device.
            norm = torch.linalg.vector_norm(_local_values(parameter), dtype=torch.float32)
            squares += norm.to(engine.device, non_blocking=True).double().square()
    # all-reduce over pp and tp, under ZeRO-3 also over dp: squares of parts -> of the whole
    is_sharded = engine.zero_optimization_stage() == 3
    dist.all_reduce(squares, group=None if is_sharded else groups.replica_group)
    return squares.sqrt().item()


def _local_values(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter: all of it, or its ZeRO-3 shard, read back from NVMe."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    if parameter.ds_tensor.final_location != OffloadDeviceEnum.nvme:
        return parameter.ds_tensor
    swapper = parameter.nvme_swapper
    # What a forward pass has read ahead, and not used, stands there still.
    swapper.synchronize_reads()
    if parameter.ds_tensor.status == PartitionedParamStatus.AVAILABLE:
        return parameter.ds_tensor
    swapper.swap_in([parameter], async_op=False)
    values = parameter.ds_tensor.clone()
    swapper.remove_partition_and_release_buffers([parameter])
    return values
