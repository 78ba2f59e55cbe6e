"""DeepSpeed's configuration keys: those accepted, with their types, and those refused, and why.

Checked against the installed release by the tests. Imports nothing of DeepSpeed. Next file:
`deepspeed_config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megagpt.config.dotted_keys import did_you_mean

AUTO = "auto"

Kind = str | tuple[Any, ...] | dict[str, Any]
"""A type (bool, int, number, str, list), the choices, or the keys of a section."""

_COMM_TYPES = ("fp32", "fp16", "bf16")

ACCEPTED_KEYS: dict[str, Kind] = {
    "train_batch_size": "int",
    "train_micro_batch_size_per_gpu": "int",
    "gradient_accumulation_steps": "int",
    "gradient_clipping": "number",
    "bf16": {"enabled": "bool", "immediate_grad_update": "bool", "check_grad_overflow": "bool"},
    "fp16": {
        "enabled": "bool",
        "auto_cast": "bool",
        "loss_scale": "number",
        "initial_scale_power": "int",
        "loss_scale_window": "int",
        "hysteresis": "int",
        "consecutive_hysteresis": "bool",
        "min_loss_scale": "int",
    },
    "optimizer": {
        "type": "str",
        "params": {"lr": "number", "betas": "list", "eps": "number", "weight_decay": "number"},
    },
    "scheduler": {
        "type": "str",
        "params": {
            "warmup_min_lr": "number",
            "warmup_max_lr": "number",
            "warmup_num_steps": "int",
            "warmup_type": "str",
            "warmup_min_ratio": "number",
            "cos_min_ratio": "number",
            "total_num_steps": "int",
        },
    },
    "zero_optimization": {
        "stage": (0, 1, 2, 3),
        "contiguous_gradients": "bool",
        "reduce_scatter": "bool",
        "reduce_bucket_size": "int",
        "use_multi_rank_bucket_allreduce": "bool",
        "allgather_partitions": "bool",
        "allgather_bucket_size": "int",
        "overlap_comm": "bool",
        "load_from_fp32_weights": "bool",
        "offload_param": {
            "device": ("none", "cpu", "nvme"),
            "nvme_path": "str",
            "buffer_count": "int",
            "buffer_size": "int",
            "max_in_cpu": "int",
            "pin_memory": "bool",
        },
        "offload_optimizer": {
            "device": ("none", "cpu", "nvme"),
            "nvme_path": "str",
            "buffer_count": "int",
            "pin_memory": "bool",
            "pipeline_read": "bool",
            "pipeline_write": "bool",
            "fast_init": "bool",
            "cpuadam_cores_perc": "number",
        },
        "sub_group_size": "int",
        "stage3_prefetch_bucket_size": "int",
        "stage3_param_persistence_threshold": "int",
        "stage3_model_persistence_threshold": "int",
        "stage3_max_live_parameters": "int",
        "stage3_max_reuse_distance": "int",
        "stage3_use_all_reduce_for_fetch_params": "bool",
        "stage3_allgather_sequential": "bool",
        "ignore_unused_parameters": "bool",
        "round_robin_gradients": "bool",
        "parameter_alignment": "bool",
        "zero_hpz_partition_size": "int",
        "memory_efficient_linear": "bool",
        "override_module_apply": "bool",
        "log_trace_cache_warnings": "bool",
        "enable_sanity_checks": "bool",
    },
    "data_types": {"grad_accum_dtype": _COMM_TYPES},
    "communication_data_type": _COMM_TYPES,
    "prescale_gradients": "bool",
    "gradient_predivide_factor": "number",
    "zero_allow_untested_optimizer": "bool",
    "zero_force_ds_cpu_optimizer": "bool",
    "disable_python_gc": "bool",
    "steps_per_print": "int",
    "wall_clock_breakdown": "bool",
    "memory_breakdown": "bool",
    "dump_state": "bool",
    "log_level": "str",
    "timers": {"throughput": {"enabled": "bool", "synchronized": "bool"}},
    "comms_logger": {
        "enabled": "bool",
        "prof_all": "bool",
        "prof_ops": "list",
        "verbose": "bool",
        "debug": "bool",
    },
    "flops_profiler": {
        "enabled": "bool",
        "recompute_fwd_factor": "number",
        "profile_step": "int",
        "module_depth": "int",
        "top_modules": "int",
        "detailed": "bool",
        "output_file": "str",
    },
    "aio": {
        "block_size": "int",
        "queue_depth": "int",
        "intra_op_parallelism": "int",
        "single_submit": "bool",
        "overlap_events": "bool",
        "use_gds": "bool",
    },
}
"""Every key that may stand in the JSON. Of two spellings, the documented one."""

_REMOVED = "DeepSpeed 0.19.8 has removed it; remove the key"
_MONITOR = "monitoring is megagpt's (TensorBoard in the run folder); remove the section"
_NOT_DRIVEN = "megagpt does not use this part of DeepSpeed, so it would have no effect; remove it"
_OWN_PRECISION = "precision is set by --training.precision; remove it"
_OWN_DATA = "the order of the data is megagpt's (data section); remove it"
_OWN_LAYOUT = "parallel layers are megagpt's (parallel section); remove it"
_OFFLOAD = 'it is deprecated; write zero_optimization.{0}: {{"device": "cpu"}}'
_QUANTIZED = (
    "weights or gradients are rounded to 8 or 4 bits by CUDA kernels, and no cell has proved what "
    "that does to a run; remove it"
)
_FP32_STATE = "master weights, gradients and moments are fp32 here; remove it"
_CHECKPOINT = "checkpoints are megagpt's (checkpoint section of the run configuration); remove it"

REFUSED_KEYS: dict[str, str] = {
    "activation_checkpointing": "activation checkpointing is megagpt's own; remove the section",
    "tensorboard": _MONITOR,
    "wandb": _MONITOR,
    "csv_monitor": _MONITOR,
    "comet": _MONITOR,
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "bfloat16": "it is an old spelling; write bf16",
    "torch_autocast": _OWN_PRECISION,
    "data_types.param_dtype": _OWN_PRECISION,
    "data_types.buffer_dtype": _OWN_PRECISION,
    "data_types.keep_in_fp32_modules": _OWN_PRECISION,
    "bf16.bf16_master_weights_and_grads": _FP32_STATE,
    "bf16.bf16_optimizer_states": _FP32_STATE,
    "fp16.fp16_master_weights_and_grads": _FP32_STATE,
    "gradient_allreduce_op": "the loss is a mean over the global batch, which a sum would change; "
    "remove it",
    "managed_gradient_accumulation": "megagpt relies on DeepSpeed's accumulation; remove it",
    "disable_allgather": _NOT_DRIVEN,
    "dataloader_drop_last": _OWN_DATA,
    "data_efficiency": _OWN_DATA,
    "data_sampling": _OWN_DATA,
    "data_routing": _OWN_DATA,
    "dynamic_batching": _OWN_DATA,
    "seq_parallel_communication_data_type": _OWN_LAYOUT,
    "sequence_parallel_size": _OWN_LAYOUT,
    "tensor_parallel": _OWN_LAYOUT,
    "expert_parallel": _OWN_LAYOUT,
    "use_data_before_expert_parallelism": _OWN_LAYOUT,
    "pipeline": _OWN_LAYOUT,
    "vocabulary_size": "the vocabulary is --model.vocab_size; remove it",
    "autotuning": _NOT_DRIVEN,
    "hybrid_engine": _NOT_DRIVEN,
    "weight_quantization": _NOT_DRIVEN,
    "compile": _NOT_DRIVEN,
    "optimizer.legacy_fusion": _NOT_DRIVEN,
    "zero_optimization.elastic_checkpoint": _CHECKPOINT,
    "zero_optimization.legacy_stage1": "it is for DeepSpeed before 0.5.9; remove it",
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINT,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.cpu_offload": _OFFLOAD.format("offload_optimizer"),
    "zero_optimization.cpu_offload_param": _OFFLOAD.format("offload_param"),
    "zero_optimization.cpu_offload_use_pin_memory": "it is deprecated; write pin_memory in "
    "offload_optimizer or offload_param",
    "zero_optimization.compute_grad_norm": "the norm is logged in every mode; remove it",
    "zero_optimization.offload_optimizer.ratio": "the part that stays on the device has an "
    "optimizer of its own, which the learning rate does not reach (0.19.8); remove it",
    "zero_optimization.offload_optimizer.super_offload": "its moments are in another process, out "
    "of a checkpoint's reach; remove it",
    "zero_optimization.stage3_module_granularity_threshold": "the first backward pass of a model "
    "whose modules become leaves of it dies (0.19.8); remove it",
    "zero_optimization.zero_quantized_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_gradients": _QUANTIZED,
    "zero_optimization.zenflow": _NOT_DRIVEN,
    "zero_optimization.save_muon_momentum_buffer_in_memory": _NOT_DRIVEN,
    "zero_optimization.leaf_module": _NOT_DRIVEN,
    **dict.fromkeys(
        (
            "nebula",
            "compression_training",
            "amp",
            "quantize_training",
            "sparse_gradients",
            "eigenvalue",
            "sparse_attention",
            "elasticity",
            "graph_harvesting",
            "curriculum_learning",
            "progressive_layer_drop",
            "zero_optimization.mics_shard_size",
            "zero_optimization.mics_hierarchical_params_gather",
            "zero_optimization.zeropp_loco_param",
        ),
        _REMOVED,
    ),
}
"""Keys that DeepSpeed knows or knew and megagpt refuses, with reason and remedy."""

RENAMED_KEYS: dict[str, str] = {
    "thread_count": "aio.intra_op_parallelism",
    "fp32_allreduce": "communication_data_type",
    "allreduce_always_fp32": "communication_data_type",
    "allreduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "zero_stage": "zero_optimization.stage",
    "gradient_clip": "gradient_clipping",
    "clip_grad": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "global_batch_size": "train_batch_size",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}
"""Names of other releases and of other programs' files, with the key that does the same here."""


def refusal(path: str, value: Any) -> str:
    """Reason and remedy of a refused key, for its value: what only turns it off is removed."""
    text = REFUSED_KEYS[path]
    is_off = value is False or (isinstance(value, Mapping) and value.get("enabled") is False)
    reason, _, remedy = text.rpartition("; ")
    if is_off and not remedy.startswith("remove"):
        return f"{reason}, and off already; remove it"
    return text


def where_it_belongs(name: str, keys: Mapping[str, Kind], prefix: str) -> str:
    """A hint for a key that is not known in a section; empty where there is none.

    First the key of that very name elsewhere or under its new name, then what is spelt like it.

    Args:
        name: The key.
        keys: Those of the section.
        prefix: The section's path with a dot, or empty.
    """
    everywhere = [*_paths(ACCEPTED_KEYS), *REFUSED_KEYS]
    exact = [path for path in everywhere if path.rpartition(".")[2] == name]
    exact += [f"{prefix}{key}" for key in keys if key == f"stage3_{name}"]
    if name in RENAMED_KEYS:
        exact.append(RENAMED_KEYS[name])
    if exact:
        places = " or ".join(f"'{path}'" for path in exact)
        at_top = " at the top level" if exact == [name] else ""
        return f"; did you mean {places}{at_top}?"
    return did_you_mean(name, keys, prefix) or did_you_mean(name, everywhere)


def _paths(keys: Mapping[str, Kind], prefix: str = "") -> Iterator[str]:
    for name, kind in keys.items():
        yield f"{prefix}{name}"
        if isinstance(kind, dict):
            yield from _paths(kind, f"{prefix}{name}.")


_KINDS: dict[str, tuple[Any, str]] = {
    "int": ((int, float), "a whole number"),
    "number": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
    "list": (list, "a list"),
}


def misfit(value: Any, kind: str | tuple[Any, ...]) -> str:
    """What to write instead of a JSON value that does not fit a kind, in words; empty if it does.

    `"auto"` and sections are looked at elsewhere.
    """
    is_bool = isinstance(value, bool)
    if isinstance(kind, tuple):
        return "" if value in kind and not is_bool else "one of " + ", ".join(map(str, kind))
    types, words = _KINDS[kind]
    if not isinstance(value, types) or is_bool != (kind == "bool"):
        return words
    # DeepSpeed reads 5e8 as an integer.
    return words if kind == "int" and not float(value).is_integer() else ""
