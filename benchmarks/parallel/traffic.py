"""The formulae: what a rank hands to each collective in one optimizer step, and what papers say.

Sources: Rajbhandari et al. 2019 (ZeRO), https://arxiv.org/abs/1910.02054, section 7; Shoeybi et al.
2019 (Megatron), https://arxiv.org/abs/1909.08053, section 3; Korthikanti et al. 2022 (sequence
parallelism), https://arxiv.org/abs/2205.05198, section 4; Narayanan et al. 2021 (pipeline),
https://arxiv.org/abs/2104.04473, section 2. DeepSpeed's files are those of 0.19.8.
Next file: `communication.py`, which counts.
"""

# b micro-batch, s sequence, h hidden; "psi" is the number of parameters of this rank before ZeRO

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from collective_counter import ring_bytes
from shapes import Shape, local_shapes, stage_of
from training_runs import Case

from megagpt.config.layout import Layout
from megagpt.config.schema import Config

SCALAR_BYTES = 40
"""Calls with no more than this are counted together, as scalars."""

_FP32_BYTES, _INT64_BYTES = 4, 8


CAUSES = {
    "all-reduce": "DeepSpeed all-reduces gradients where a reduce-scatter would do, and each rank "
    "keeps its slices: runtime/zero/stage_1_and_2.py, average_tensor and allreduce_and_scatter; "
    "with BF16_Optimizer runtime/engine.py, buffered_allreduce_fallback.",
    "micro-batches": "ZeRO 2 reduces gradients, and ZeRO 3 gathers weights and scatters gradients, "
    "for each micro-batch; the paper counts one: runtime/engine.py, allreduce_gradients; "
    "runtime/zero/stage3.py, __reduce_and_partition_ipg_grads.",
    "kept weights": "Weights that are used again within stage3_max_reuse_distance (default 1e9) "
    "stay from forward to backward, so they are gathered once where the paper gathers twice: "
    "runtime/zero/partitioned_param_coordinator.py, __params_to_release.",
    "persistent weights": "Parameters up to stage3_param_persistence_threshold are gathered once a "
    "step, after the update: runtime/zero/stage3.py, _post_step.",
    "tied weight": "The embedding is released between its two uses and gathered for each.",
    "embedding": "The sum of the vocabulary-parallel embedding leaves a parallel region.",
    "output layer": "The output layer enters a parallel region.",
    "cross entropy": "Maximum, sum of exp and target score of each row, fp32, of each rank: "
    "megagpt/kernels/linear_cross_entropy/chunked.py.",
    "recomputation": "The all-reduce after attention runs again; recomputation ends before the "
    "MLP's, whose result backward does not need.",
    "partial gradients": "Whole weights that see a part of the tokens or heads: their gradients "
    "are summed inside autograd for each micro-batch (norms, row-parallel biases and positions "
    "under sequence parallelism; QK-norms; key/value heads shared by ranks).",
    "labels": "Labels travel along as int64: megagpt/model/pipeline.py.",
    "tied embedding": "The gradient of the tied weight is summed over the first and the last "
    "stage, fp32: megagpt/training/engine.py, reduce_tied_gradients.",
}
"""Why a rank sends more, or less, than the papers say, by a short name."""


@dataclass(frozen=True)
class Term:
    """One part of a formula."""

    what: str
    operation: str
    axis: str
    payload_bytes: float
    """In one optimizer step, as `collective_counter.Call` has it."""
    group_size: int
    excess: dict[str, float] = field(default_factory=dict)
    """By name of the cause, the share of it that the papers do not have; below 0 where they have
    more."""

    def __post_init__(self) -> None:
        assert self.excess.keys() <= CAUSES.keys()

    @property
    def ring_bytes(self) -> float:
        """Sent by this rank under the ring algorithm."""
        return ring_bytes(self.operation, self.payload_bytes, self.group_size)

    @property
    def paper_bytes(self) -> float:
        """Of these, what the papers count."""
        return self.ring_bytes * (1 - sum(self.excess.values()))


@dataclass(frozen=True)
class Setting:
    """What all formulae need."""

    case: Case
    config: Config
    pp_rank: int

    @property
    def layout(self) -> Layout:
        """Degrees and stage."""
        return Layout.parse(self.case.layout)

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of a step."""
        return self.config.batch.gradient_accumulation_steps(self.layout.data_parallel_size)

    @property
    def weight_bytes(self) -> int:
        """Of one weight or activation."""
        return 2 if self.case.precision == "bf16" else 4

    @property
    def num_tokens(self) -> int:
        """Of a micro-batch, b * s."""
        return self.config.batch.micro_batch_size * self.config.model.seq_length

    @property
    def activation_bytes(self) -> int:
        """[b, s, h]."""
        return self.num_tokens * self.config.model.hidden_size * self.weight_bytes

    @property
    def is_bf16_optimizer(self) -> bool:
        """Whether DeepSpeed takes its BF16_Optimizer (runtime/engine.py, _configure_optimizer)."""
        return self.case.precision == "bf16" and self.layout.zero_stage == 1


def predict(case: Case, config: Config, *, pp_rank: int) -> list[Term]:
    """The collectives of a rank in one optimizer step of the trainer; groups of one left out."""
    setting = Setting(case, config, pp_rank)
    shapes = local_shapes(config, pp_rank)
    terms = [
        *_tensor_parallel(setting, shapes),
        *_data_parallel(setting, shapes),
        *_pipeline(setting),
        *_scalars(setting),
    ]
    return [term for term in terms if term.group_size > 1]


def _tensor_parallel(setting: Setting, shapes: list[Shape]) -> Iterator[Term]:
    """Megatron's f and g, or their forms under sequence parallelism, and what stands around."""
    config, size = setting.config, setting.layout.tensor_parallel_size
    stage = stage_of(config, setting.pp_rank)
    num_layers = stage.end_layer - stage.first_layer
    k, activation = setting.num_micro_batches, setting.activation_bytes

    def region_ends(what: str, times: int, **excess: dict) -> list[Term]:
        # One end of a parallel region, forward and backward together.
        operations = ("all-reduce",)
        if config.parallel.sequence_parallel:
            operations = ("reduce-scatter", "all-gather")
        return [Term(what, o, "tp", k * times * activation, size, **excess) for o in operations]

    def ours(what: str, payload_bytes: float) -> Term:
        return Term(what, "all-reduce", "tp", k * payload_bytes, size, {what: 1})

    # Two regions a layer with two ends each: 2 all-reduces forward and 2 backward.
    yield from region_ends("layers", 4 * num_layers)
    if stage.is_first:
        yield from region_ends("embedding", 1, excess={"embedding": 1})
    if stage.is_last:
        yield from region_ends("output layer", 1, excess={"output layer": 1})
        gathered = size * 3 * setting.num_tokens * _FP32_BYTES
        yield Term("cross entropy", "all-gather", "tp", k * gathered, size, {"cross entropy": 1})
    if setting.layout.recompute == "full":
        assert not config.parallel.sequence_parallel, "not measured"
        yield ours("recomputation", num_layers * activation)
    summed = sum(shape.numel for shape in shapes if shape.is_summed)
    yield ours("partial gradients", summed * setting.weight_bytes)


def _data_parallel(setting: Setting, shapes: list[Shape]) -> Iterator[Term]:
    """Gradients in fp32, and under ZeRO the weights in their own type."""
    size, stage = setting.layout.data_parallel_size, setting.layout.zero_stage
    psi, k = sum(shape.numel for shape in shapes), setting.num_micro_batches
    padded = padded_numel(shapes, size)
    if stage == 0:
        yield Term("gradients", "all-reduce", "dp", psi * _FP32_BYTES, size)
        return
    if stage == 3:
        yield from _stage3(setting, shapes)
        return
    if setting.is_bf16_optimizer:
        gradients, times = padded * _FP32_BYTES, 1  # of the flat buffer
    else:
        times = k if stage == 2 else 1
        gradients = times * psi * _FP32_BYTES
    repeated = (times - 1) / times
    if dict(setting.case.zero).get("use_multi_rank_bucket_allreduce") is False:
        yield Term("gradients", "reduce", "dp", gradients, size, {"micro-batches": repeated})
    else:
        excess = {"all-reduce": 1 / 2, "micro-batches": repeated / 2}
        yield Term("gradients", "all-reduce", "dp", gradients, size, excess)
    yield Term("weights", "all-gather", "dp", padded * setting.weight_bytes, size)


def _stage3(setting: Setting, shapes: list[Shape]) -> Iterator[Term]:
    """Reduce-scatter of gradients, all-gather of weights for forward and for backward."""
    size, k = setting.layout.data_parallel_size, setting.num_micro_batches
    persistent, others = persistent_numel(setting.config, shapes, size)
    repeated = (k - 1) / k
    gradients = k * (persistent + others) * _FP32_BYTES
    yield Term("gradients", "reduce-scatter", "dp", gradients, size, {"micro-batches": repeated})
    weights = k * others * setting.weight_bytes
    if dict(setting.case.zero).get("stage3_max_reuse_distance") == 0:
        excess = {"micro-batches": repeated}
        yield Term("weights", "all-gather", "dp", 2 * weights, size, excess)
        if setting.config.model.tie_embeddings:
            (table,) = (shape.numel for shape in shapes if shape.name == "vocabulary")
            weights = 2 * k * table * setting.weight_bytes
            yield Term("tied weight", "all-gather", "dp", weights, size, {"tied weight": 1})
    else:
        excess = {"micro-batches": 2 * repeated, "kept weights": -1}
        yield Term("weights", "all-gather", "dp", weights, size, excess)
    weights = persistent * setting.weight_bytes
    excess = {"persistent weights": -1}
    yield Term("persistent weights", "all-gather", "dp", weights, size, excess)


def padded_numel(shapes: list[Shape], size: int) -> int:
    """Elements of ZeRO's flat buffers, one for matrices and one for vectors, each padded.

    Both stage_1_and_2.py (`__init__`) and bf16_optimizer.py (`_setup_for_real_optimizer`) pad to a
    multiple of nccl_start_alignment_factor = 2 times the ranks.
    """
    vectors = sum(shape.numel for shape in shapes if len(shape.dims) == 1)
    matrices = sum(shape.numel for shape in shapes if len(shape.dims) > 1)
    alignment = 2 * size
    return sum(-(-numel // alignment) * alignment for numel in (vectors, matrices))


def persistent_numel(config: Config, shapes: list[Shape], size: int) -> tuple[int, int]:
    """Elements of ZeRO-3's persistent parameters and of all others, each padded to the ranks.

    The threshold is `"auto"`: 10 * hidden_size (megagpt/config/deepspeed_config.py, _fill_zero).
    """
    persistent = others = 0
    for shape in shapes:
        padded = -(-shape.numel // size) * size
        if shape.numel <= 10 * config.model.hidden_size:
            persistent += padded
        else:
            others += padded
    return persistent, others


def _pipeline(setting: Setting) -> Iterator[Term]:
    """Activations forward, their gradients backward, for each micro-batch and each border."""
    layout, k = setting.layout, setting.num_micro_batches
    size = layout.pipeline_parallel_size
    stage = stage_of(setting.config, setting.pp_rank)
    split = layout.tensor_parallel_size if layout.sequence_parallel else 1
    activations = k * setting.activation_bytes / split
    labels = k * setting.num_tokens * _INT64_BYTES
    for operation, is_end in (("send", stage.is_last), ("receive", stage.is_first)):
        if not is_end:
            yield Term("activations", operation, "pp", activations, size)
            yield Term("labels", operation, "pp", labels, size, {"labels": 1})
    for operation, is_end in (("send", stage.is_first), ("receive", stage.is_last)):
        if not is_end:
            yield Term("activations' gradients", operation, "pp", activations, size)
    if size > 1 and setting.config.model.tie_embeddings and (stage.is_first or stage.is_last):
        tp = layout.tensor_parallel_size
        rows = setting.config.model.padded_vocab_size(tp) // tp
        table = rows * setting.config.model.hidden_size * _FP32_BYTES
        yield Term("tied embedding", "all-reduce", "pp", table, 2, {"tied embedding": 1})


def _scalars(setting: Setting) -> Iterator[Term]:
    """Norms, and the sum that ends a step; together, for their axes tell nothing."""
    layout = setting.layout
    dp, tp, pp = (
        layout.data_parallel_size,
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
    )
    stage, world, replica = layout.zero_stage, layout.world_size, tp * pp

    def scalar(what: str, num_bytes: int, group_size: int) -> Term:
        return Term(what, "scalars", "any", num_bytes, group_size)

    yield scalar("trainer: loss, next tokens and three notices in float64", 40, world)
    if stage == 0:
        yield scalar("trainer: norm of the gradients", 8, replica)
    elif setting.is_bf16_optimizer:
        yield scalar("BF16_Optimizer: norm of the gradients", 4, replica)
    else:
        num_bytes = 16 if stage == 3 else 8
        for size in (dp, replica):
            yield scalar("ZeRO: norms of the gradients of two groups", num_bytes, size)
            if setting.case.precision == "bf16" and stage == 2:
                yield scalar("ZeRO: overflow flag", 1, size)
    if pp > 1:
        yield scalar("pipeline: loss", 8, pp)
        if setting.pp_rank == pp - 1:
            yield scalar("pipeline: loss", 4, dp)
