"""Building the model for a ZeRO stage; under stage 3, values go straight into each rank's shard.

No rank ever holds more than its shard plus one parameter. The only file of this room that imports
DeepSpeed besides the pipeline.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch

from megagpt.config.schema import ModelConfig
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import initialize, local_initial_value
from megagpt.parallel.groups import Group


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    ds_config: dict,
    tp_group: Group = None,
    dp_group: Group = None,
) -> GPTModel:
    """A model with its initial weights, whole under ZeRO 0 to 2 and sharded under ZeRO-3.

    Args:
        config: Shape; vocab_size must be set.
        seed: Of the initial weights.
        dtype: Of the weights.
        ds_config: Resolved DeepSpeed configuration, which names the stage.
        tp_group: Group that splits each layer; None for one rank.
        dp_group: Group over which ZeRO-3 shards; None for the world.

    Returns:
        The model; its weights are the same for every stage and number of ranks.
    """
    if ds_config.get("zero_optimization", {}).get("stage", 0) < 3:
        model = GPTModel(config, tp_group=tp_group).to(dtype)
        initialize(model, config, seed=seed, tp_group=tp_group)
        return model
    with deepspeed.zero.Init(
        data_parallel_group=dp_group, config_dict_or_path=ds_config, dtype=dtype
    ):
        model = GPTModel(config, tp_group=tp_group)
    _fill_shards(model, config, seed=seed, tp_group=tp_group)
    return model


@torch.no_grad()
def _fill_shards(model: GPTModel, config: ModelConfig, *, seed: int, tp_group: Group) -> None:
    """Writes each parameter's initial value into this rank's ZeRO-3 shard, one at a time.

    `GatheredParameters(modifier_rank=None)` would throw the writes away; the shard itself is
    `ds_tensor`: the flat parameter, padded, cut into one piece for each rank (DeepSpeed 0.19.8,
    `partition_parameters.py`, `_partition_param`).
    """
    parameter: Any  # carries DeepSpeed's ds_* attributes
    for name, parameter in model.named_parameters():
        value = local_initial_value(
            name, parameter, parameter.ds_shape, config, seed=seed, tp_group=tp_group
        )
        shard = parameter.ds_tensor
        size = shard.ds_numel
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        mine = value.reshape(-1)[start : start + size]
        # The padding of the last shards is never read as a weight, but it is summed in norms.
        shard.zero_()
        shard[: mine.numel()].copy_(mine)
