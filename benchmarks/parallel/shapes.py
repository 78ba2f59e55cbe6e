"""The parameters that a rank should hold, from the model's configuration alone.

Written from the papers' account of the model, not from megagpt's modules, so that a formula built
on it can disagree with them.
"""

# h hidden, f inner width of the MLP, d head size, v padded vocabulary; "/tp" marks a local shard

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megagpt.config.schema import Config
from megagpt.parallel.partition import PipelineStage, pipeline_stages


@dataclass(frozen=True)
class Shape:
    """One parameter on one rank, before ZeRO."""

    name: str
    dims: tuple[int, ...]
    is_split: bool = False
    """Whether tp splits it; otherwise every tensor-parallel rank holds the whole."""
    is_summed: bool = False
    """Whether each tensor-parallel rank sees a part of its gradient, and the parts are summed."""

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.dims)


def local_shapes(config: Config, pp_rank: int = 0) -> list[Shape]:
    """The parameters of one pipeline stage on any of its tensor-parallel ranks."""
    return list(_shapes(config, stage_of(config, pp_rank)))


def stage_of(config: Config, pp_rank: int) -> PipelineStage:
    """The blocks of a pipeline rank."""
    parallel = config.parallel
    return pipeline_stages(
        config.model, parallel.pipeline_parallel_size, parallel.pipeline_partition
    )[pp_rank]


def _shapes(config: Config, stage: PipelineStage) -> Iterator[Shape]:
    model, tp = config.model, config.parallel.tensor_parallel_size
    sp = config.parallel.sequence_parallel
    h = model.hidden_size
    vocabulary = Shape("vocabulary", (model.padded_vocab_size(tp) // tp, h), is_split=True)
    if stage.is_first:
        yield vocabulary
        if model.position_embedding == "learned":
            yield Shape("positions", (model.seq_length, h), is_summed=sp)
    for _ in range(stage.first_layer, stage.end_layer):
        yield from _block(config)
    if stage.is_last:
        yield from _norm("final norm", config, h, is_summed=sp)
        if not model.tie_embeddings or not stage.is_first:
            yield vocabulary


def _block(config: Config) -> Iterator[Shape]:
    model, tp = config.model, config.parallel.tensor_parallel_size
    sp = config.parallel.sequence_parallel
    h, f, d = model.hidden_size, model.ffn_size, model.head_size
    yield from _norm("attention norm", config, h, is_summed=sp)
    yield from _column("query", config, h // tp)
    is_shared = model.kv_heads < tp
    for name in ("key", "value"):
        kv_width = model.kv_heads * d
        yield from _column(name, config, kv_width if is_shared else kv_width // tp, is_shared)
    yield Shape("attention output", (h, h // tp), is_split=True)
    if model.qk_norm:
        for name in ("query norm", "key norm"):
            yield from _norm(name, config, d, is_summed=True)
    yield from _norm("MLP norm", config, h, is_summed=sp)
    for name in ("up", "gate") if model.activation == "swiglu" else ("up",):
        yield from _column(name, config, f // tp)
    yield Shape("down", (h, f // tp), is_split=True)
    if model.bias:
        for name in ("attention output bias", "down bias"):
            yield Shape(name, (h,), is_summed=sp)


def _column(name: str, config: Config, rows: int, is_shared: bool = False) -> Iterator[Shape]:
    """A column-parallel layer; one with fewer heads than ranks is whole on each of them."""
    split = {"is_split": not is_shared, "is_summed": is_shared}
    yield Shape(name, (rows, config.model.hidden_size), **split)
    if config.model.bias:
        yield Shape(f"{name} bias", (rows,), **split)


def _norm(name: str, config: Config, size: int, *, is_summed: bool) -> Iterator[Shape]:
    yield Shape(name, (size,), is_summed=is_summed)
    if config.model.normalization == "layernorm" and config.model.bias:
        yield Shape(f"{name} bias", (size,), is_summed=is_summed)
