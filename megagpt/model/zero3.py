"""Building a model under ZeRO-3: values go straight into each rank's shard.

No rank ever holds more than its shard. Next file: `build.py`, its caller.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

from megagpt.config.schema import ModelConfig, Recompute
from megagpt.kernels.registry import Kernels
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import fill_range
from megagpt.model.layers import TensorParallel
from megagpt.parallel.groups import Group, ProcessGroups


def build_sharded_model(
    config: ModelConfig,
    *,
    seed: int | None,
    ds_config: dict,
    groups: ProcessGroups,
    tp: TensorParallel,
    recompute: Recompute,
    kernels: Kernels,
) -> GPTModel:
    """A model whose parameters are sharded over dp, with their initial weights.

    Args:
        config: Shape; vocab_size must be set.
        seed: Of the initial weights; None leaves zeros, for a checkpoint to fill.
        ds_config: Resolved DeepSpeed configuration of stage 3; it decides for the weights' type,
            because `zero.Init(dtype=...)` is ignored on a CPU without fp16 (0.19.8,
            `partition_parameters.py`, `_set_dtype`).
        groups: Of the layout.
        tp: As in `GPTModel`.
        recompute: As in `GPTModel`.
        kernels: As in `GPTModel`.
    """
    deepspeed.init_distributed(auto_mpi_discovery=False)  # takes the group that exists
    # The groups of zero_hpz_partition_size; an earlier model's are refused, not taken.
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    with deepspeed.zero.Init(
        data_parallel_group=groups.get_data_parallel_group(),
        config_dict_or_path=ds_config,
        mpu=groups,
    ):
        model = GPTModel(config, tp, recompute=recompute, kernels=kernels)
    _mend_swapper(model)
    _fill_shards(model, config, seed=seed, tp_group=tp.group)
    return model


def _mend_swapper(model: GPTModel) -> None:
    """Mends two faults of parameters on NVMe (0.19.8, `partitioned_param_swapper.py`).

    What stands in for a shard that is in its file is float16, and whoever asks the shard for its
    type gets that one. The prefetch asks for a parameter twice where its window holds the end of
    the forward pass and the beginning of the backward pass, and the second time is an assertion.
    """
    parameter: Any = next(model.parameters())
    swapper = parameter.nvme_swapper
    if swapper is None:
        return
    swapper.invalid_buffer = torch.ones((), dtype=parameter.dtype)
    swap_in = swapper.swap_in
    swapper.swap_in = lambda params, *arguments, **options: swap_in(
        list(dict.fromkeys(params)), *arguments, **options
    )


@torch.no_grad()
def _fill_shards(
    model: GPTModel, config: ModelConfig, *, seed: int | None, tp_group: Group
) -> None:
    """Writes each parameter's initial value into this rank's ZeRO-3 shard, one at a time.

    `GatheredParameters(modifier_rank=None)` would throw the writes away; the shard itself is
    `ds_tensor`: the flat parameter, padded, cut into one piece for each rank (DeepSpeed 0.19.8,
    `partition_parameters.py`, `_partition_param`). The padding of the last shards is never read as
    a weight, but it is summed in norms.

    Under `zero_hpz_partition_size` a second copy was cut out of memory that nobody had filled, and
    the forward pass gathers that one (`_partition_param_sec`). Without it the first forward pass
    gathers from the shards and cuts it anew.
    """
    parameter: Any  # carries DeepSpeed's ds_* attributes
    for name, parameter in model.canonical_parameters():
        is_on_nvme = parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme
        if is_on_nvme:
            parameter.nvme_swapper.swap_in([parameter], async_op=False)
        shard = parameter.ds_tensor
        start = shard.ds_numel * torch.distributed.get_rank(parameter.ds_process_group)
        fill_range(
            shard.view(-1), name, parameter, start, config=config, seed=seed, tp_group=tp_group
        )
        if is_on_nvme:
            parameter.nvme_swapper.swap_out_and_release([parameter])
        parameter.ds_secondary_tensor = None
