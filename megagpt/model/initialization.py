"""Initial weights by global name: the same for every number of ranks and every ZeRO stage.

A value depends on (seed, canonical name, global shape) only; each rank takes its slice. The rows
that pad the vocabulary are 0 and not part of the global shape, so that tensor parallelism, which
pads more, changes nothing.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from megagpt.config.schema import ModelConfig
from megagpt.model.gpt import GPTModel
from megagpt.parallel.groups import Group, group_rank, group_size

VOCABULARY_WEIGHTS = ("embedding.word.weight", "lm_head.weight")
"""Parameters with a row for each token of the padded vocabulary."""

_RESIDUAL_OUTPUTS = ("attention.output.weight", "mlp.down.weight")


def initial_value(
    name: str, global_shape: torch.Size, config: ModelConfig, *, seed: int
) -> torch.Tensor:
    """The fp32 initial value of a whole parameter.

    Norm weights are 1, biases 0, matrices normal with init_std, divided by sqrt(2 * num_layers) for
    what writes to the residual stream (Radford et al. 2019, GPT-2, section 2.3).

    Args:
        name: Canonical name.
        global_shape: Shape over all tensor-parallel ranks, with the padding of the vocabulary.
        config: Model shape, for vocabulary and standard deviations.
        seed: Of the run.
    """
    if name in VOCABULARY_WEIGHTS:
        padded, width = global_shape
        rows = _normal(name, (config.vocab_size or padded, width), config.init_std, seed=seed)
        return F.pad(rows, (0, 0, 0, padded - len(rows)))
    if name.endswith(".bias"):
        return torch.zeros(global_shape)
    if len(global_shape) == 1:
        return torch.ones(global_shape)
    std = config.init_std
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.num_layers)
    return _normal(name, tuple(global_shape), std, seed=seed)


def _normal(name: str, shape: tuple[int, ...], std: float, *, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def local_shard(value: torch.Tensor, tp_dim: int | None, tp_group: Group) -> torch.Tensor:
    """This rank's slice of a whole parameter; all of it where tp_dim is None."""
    if tp_dim is None or group_size(tp_group) == 1:
        return value
    return value.chunk(group_size(tp_group), dim=tp_dim)[group_rank(tp_group)]


def local_initial_value(
    name: str,
    parameter: nn.Parameter,
    config: ModelConfig,
    *,
    seed: int,
    tp_group: Group,
) -> torch.Tensor:
    """This tensor-parallel rank's slice of the initial value of a parameter.

    A ZeRO-3 parameter has an empty local tensor; its shape on this rank is `ds_shape`.
    """
    tp_dim = getattr(parameter, "tp_dim", None)
    local_shape = getattr(parameter, "ds_shape", parameter.shape)
    global_shape = list(local_shape)
    if tp_dim is not None:
        global_shape[tp_dim] *= group_size(tp_group)
    value = initial_value(name, torch.Size(global_shape), config, seed=seed)
    return local_shard(value, tp_dim, tp_group)


@torch.no_grad()
def initialize(model: GPTModel, config: ModelConfig, *, seed: int, tp_group: Group = None) -> None:
    """Fills every parameter of a model or stage that is whole on this rank (ZeRO 0 to 2)."""
    for name, parameter in model.canonical_parameters():
        parameter.copy_(local_initial_value(name, parameter, config, seed=seed, tp_group=tp_group))
