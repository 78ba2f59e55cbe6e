"""Initial weights by global name: the same for every number of ranks, ZeRO stage and device.

A value depends on (seed, canonical name, place in the whole parameter) only, so that each rank
draws its own part, where its part will be. The rows that pad the vocabulary are 0; tensor
parallelism pads more, and changes nothing. Next file: `keyed_numbers.py`.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from megagpt.config.schema import ModelConfig
from megagpt.model.gpt import GPTModel
from megagpt.model.keyed_numbers import key_of, standard_normal
from megagpt.parallel.groups import Group, group_rank, group_size

VOCABULARY_WEIGHTS = ("embedding.word.weight", "lm_head.weight")
"""Parameters with a row for each token of the padded vocabulary."""

_RESIDUAL_OUTPUTS = ("attention.output.weight", "mlp.down.weight")
_ELEMENTS_AT_ONCE = 1 << 22


def initial_range(
    name: str,
    local_shape: tuple[int, ...],
    start: int,
    end: int,
    *,
    config: ModelConfig,
    seed: int,
    device: torch.device,
    tp_dim: int | None = None,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> torch.Tensor:
    """Initial values of a range of a tensor-parallel rank's share of a parameter.

    Norm weights are 1, biases 0, matrices normal with init_std, divided by sqrt(2 * num_layers) for
    what writes to the residual stream (Radford et al. 2019, GPT-2, section 2.3).

    Args:
        name: Canonical name.
        local_shape: Of the share, with the padding of the vocabulary.
        start: First element of the flattened share.
        end: One past the last.
        config: Model shape, for vocabulary and standard deviations.
        seed: Of the run.
        device: Where they are made; the values are the same on all, to the last bit.
        tp_dim: The dim that is split; None where the share is the whole.
        tp_rank: Which share.
        tp_size: How many there are.

    Returns:
        [end - start], float32.
    """
    if name.endswith(".bias"):
        return torch.zeros(end - start, dtype=torch.float32, device=device)
    if len(local_shape) == 1:
        return torch.ones(end - start, dtype=torch.float32, device=device)
    num_rows, num_columns = local_shape
    row = tp_rank * num_rows if tp_dim == 0 else 0
    column = tp_rank * num_columns if tp_dim == 1 else 0
    first, last = start // num_columns, -(-end // num_columns)  # rows that the range meets
    real = last
    if name in VOCABULARY_WEIGHTS and config.vocab_size is not None:
        real = min(last, max(first, config.vocab_size - row))
    std = config.init_std
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.num_layers)
    values = standard_normal(
        key_of(seed, name),
        range(row + first, row + real),
        range(column, column + num_columns),
        width=num_columns * (tp_size if tp_dim == 1 else 1),
        device=device,
    ).mul_(std)
    if real < last:
        values = torch.cat([values, values.new_zeros(last - real, num_columns)])
    return values.flatten()[start - first * num_columns : end - first * num_columns]


@torch.no_grad()
def fill_range(
    target: torch.Tensor,
    name: str,
    parameter: nn.Parameter,
    start: int,
    *,
    config: ModelConfig,
    seed: int | None,
    tp_group: Group,
) -> None:
    """Writes initial values into a range of this tensor-parallel rank's share of a parameter.

    Args:
        target: [elements], any float type, contiguous; what lies beyond the parameter, as ZeRO pads
            it, becomes 0.
        name: Canonical name.
        parameter: For its shape on this rank and its split; under ZeRO-3 its own tensor is empty,
            and `ds_shape` tells the shape.
        start: Element of the flattened share that target begins with.
        config: Model shape.
        seed: Of the run; None leaves zeros, for a checkpoint to fill.
        tp_group: Ranks that share the parameter.
    """
    local_shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    real = max(0, min(len(target), math.prod(local_shape) - start))
    # Of whole rows, for each call draws all of a row that it meets.
    step = max(1, _ELEMENTS_AT_ONCE // local_shape[-1]) * local_shape[-1]
    begin = 0
    while seed is not None and begin < real:
        end = min(real, (start + begin) // step * step + step - start)
        target[begin:end] = initial_range(
            name,
            local_shape,
            start + begin,
            start + end,
            config=config,
            seed=seed,
            device=target.device,
            tp_dim=getattr(parameter, "tp_dim", None),
            tp_rank=group_rank(tp_group),
            tp_size=group_size(tp_group),
        )
        begin = end
    target[begin:] = 0


def initialize(
    model: GPTModel, config: ModelConfig, *, seed: int | None, tp_group: Group = None
) -> None:
    """Fills every parameter of a model or stage that is whole on this rank (ZeRO 0 to 2).

    Args:
        model: With its canonical names.
        config: Model shape.
        seed: As in `fill_range`.
        tp_group: As in `fill_range`.
    """
    for name, parameter in model.canonical_parameters():
        flat = parameter.detach().view(-1)
        fill_range(flat, name, parameter, 0, config=config, seed=seed, tp_group=tp_group)
