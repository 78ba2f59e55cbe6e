"""Which blocks stand on which pipeline stage: contiguous, balanced by parameters or by FLOPs.

Pure arithmetic over the model's shape. Next file: `megagpt/model/pipeline.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from megagpt.config.schema import ModelConfig


@dataclass(frozen=True)
class PipelineStage:
    """The part of a model that one pipeline rank holds."""

    index: int
    """Stage, from 0."""
    num_stages: int
    """Stages of the pipeline."""
    first_layer: int
    """First block."""
    end_layer: int
    """One past the last block."""

    @property
    def is_first(self) -> bool:
        """Whether the stage embeds tokens."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage has the final norm and the loss."""
        return self.index == self.num_stages - 1


def whole_model(config: ModelConfig) -> PipelineStage:
    """The one stage of a model without pipeline."""
    return PipelineStage(0, 1, 0, config.num_layers)


def pipeline_stages(
    config: ModelConfig, num_stages: int, balance: Literal["parameters", "flops"]
) -> list[PipelineStage]:
    """Divides the blocks so that the heaviest stage is as light as possible.

    The embedding weighs on the first stage, final norm and output layer on the last; tied weights
    weigh on both, for both hold them.

    Args:
        config: Shape; vocab_size must be set.
        num_stages: At most num_layers; every stage gets a block.
        balance: What weighs.
    """
    weigh = _parameters if balance == "parameters" else forward_multiply_adds
    first, block, last = weigh(config)
    weights = [block] * config.num_layers
    weights[0] += first
    weights[-1] += last
    bounds = [0, *_even_cuts(tuple(weights), num_stages), config.num_layers]
    return [
        PipelineStage(index, num_stages, bounds[index], bounds[index + 1])
        for index in range(num_stages)
    ]


def _even_cuts(weights: tuple[int, ...], num_parts: int) -> list[int]:
    """Where to cut weights into contiguous non-empty parts.

    The heaviest part is as light as possible, and then the squares of the parts sum to the least.
    """

    @cache
    def best(end: int, parts: int) -> tuple[int, int, tuple[int, ...]]:
        # (heaviest part, sum of squares, cuts) of weights[:end]; a part above the limit costs most
        if parts == 1:
            return score(0, end) + ((),)
        return min(
            (max(heaviest, own), squares + own_squares, (*cuts, cut))
            for cut in range(parts - 1, end)
            for heaviest, squares, cuts in (best(cut, parts - 1),)
            for own, own_squares in (score(cut, end),)
        )

    def score(begin: int, end: int) -> tuple[int, int]:
        weight = sum(weights[begin:end])
        return max(weight, limit), weight * weight

    limit = 0
    limit = best(len(weights), num_parts)[0]
    # Below the limit all parts are alike now, so that the squares decide.
    best.cache_clear()
    return list(best(len(weights), num_parts)[2])


def _parameters(config: ModelConfig) -> tuple[int, int, int]:
    """Parameters of (embedding, one block, final norm and output layer)."""
    h = config.hidden_size
    table = config.padded_vocab_size() * h
    positions = config.seq_length * h if config.position_embedding == "learned" else 0
    return table + positions, matrix_parameters(config) + 2 * h, table + h


def matrix_parameters(config: ModelConfig) -> int:
    """Weights of one block's linear layers."""
    h, kv_width = config.hidden_size, config.kv_heads * config.head_size
    num_mlp_matrices = 3 if config.activation == "swiglu" else 2
    return 2 * h * h + 2 * h * kv_width + num_mlp_matrices * h * config.ffn_size


def forward_multiply_adds(config: ModelConfig) -> tuple[int, int, int]:
    """Forward multiply-adds of (embedding, one block, output layer) for one token.

    Of matrix products only, with attention's scores and values over the whole [s, s] square.
    """
    h = config.hidden_size
    return 0, matrix_parameters(config) + 2 * config.seq_length * h, config.padded_vocab_size() * h
