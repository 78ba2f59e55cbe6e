"""Building this rank's part of the model for a layout: whole, sharded by ZeRO-3, or one stage.

Next files: `gpt.py`, `zero3.py`, `pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from megagpt.config.schema import ModelConfig, ParallelConfig, Recompute
from megagpt.kernels.registry import REFERENCE, Kernels
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import initialize
from megagpt.model.layers import TensorParallel
from megagpt.parallel.groups import ProcessGroups
from megagpt.parallel.partition import pipeline_stages

if TYPE_CHECKING:
    from megagpt.model.pipeline import GPTPipeline

_CPU = torch.device("cpu")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What new tensors of floats are, where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_model(
    config: ModelConfig,
    *,
    seed: int | None,
    dtype: torch.dtype,
    ds_config: dict,
    parallel: ParallelConfig,
    groups: ProcessGroups,
    recompute: Recompute = "none",
    has_position_ids: bool = False,
    kernels: Kernels = REFERENCE,
    device: torch.device = _CPU,
) -> GPTModel | GPTPipeline:
    """A model with its initial weights, which are the same for every layout.

    Args:
        config: Shape; vocab_size must be set.
        seed: Of the initial weights; None leaves zeros, for a checkpoint to fill.
        dtype: Of the weights.
        ds_config: Resolved DeepSpeed configuration, which names the ZeRO stage.
        parallel: Degrees of the axes.
        groups: Of those degrees.
        recompute: What backward computes again, see `Block`.
        has_position_ids: Whether batches carry document positions.
        kernels: As in `GPTModel`.
        device: Where the model is made, so that the ranks of a node do not each hold a whole one in
            host memory; under ZeRO-3 DeepSpeed decides.

    Returns:
        The whole model of this tensor-parallel rank, or its pipeline stage.
    """
    tp = TensorParallel(groups.tp_group, parallel.sequence_parallel)
    if ds_config.get("zero_optimization", {}).get("stage", 0) == 3:
        # Imported here, as the pipeline is: inference must not need DeepSpeed.
        from megagpt.model.zero3 import build_sharded_model

        return build_sharded_model(
            config,
            seed=seed,
            ds_config=ds_config,
            groups=groups,
            tp=tp,
            recompute=recompute,
            kernels=kernels,
        )
    model: GPTModel | GPTPipeline
    # Of the weights' type from the first: on the device no larger copy stands beside them.
    with device, _default_dtype(dtype):
        if parallel.pipeline_parallel_size > 1:
            from megagpt.model.pipeline import GPTPipeline

            model = GPTPipeline(
                config,
                topology=groups.topology,
                stages=pipeline_stages(
                    config, parallel.pipeline_parallel_size, parallel.pipeline_partition
                ),
                has_position_ids=has_position_ids,
                tp=tp,
                recompute=recompute,
                kernels=kernels,
            )
        else:
            model = GPTModel(config, tp, recompute=recompute, kernels=kernels)
    initialize(model, config, seed=seed, tp_group=tp.group)
    return model
