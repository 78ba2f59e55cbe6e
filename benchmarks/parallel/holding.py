"""The formulae: what a rank holds of the model, and what papers say.

Sources: Rajbhandari et al. 2019 (ZeRO), https://arxiv.org/abs/1910.02054, section 5 and figure 1;
Shoeybi et al. 2019 (Megatron), https://arxiv.org/abs/1909.08053, section 3. DeepSpeed's files are
those of 0.19.8.
Next file: `memory.py`, which measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from shapes import Shape, local_shapes
from traffic import padded_numel, persistent_numel
from training_runs import Case

from megagpt.config.layout import Layout
from megagpt.config.schema import Config, ParallelConfig

CAUSES = {
    "replicated": "Parameters that tp does not split (norms, row-parallel biases, positions) are "
    "whole on each tensor-parallel rank, and the vocabulary is padded further: "
    "megagpt/model/layers.py.",
    "alignment": "Flat buffers are padded to twice the ranks, ZeRO-3's parameters each to the "
    "ranks: runtime/zero/stage_1_and_2.py, __init__; runtime/bf16_optimizer.py, "
    "_setup_for_real_optimizer; runtime/zero/partition_parameters.py, _partition_param.",
    "fp32 gradients": "Gradients accumulate in fp32 where the paper has 16 bits: "
    "megagpt/config/deepspeed_config.py, _fill_precision.",
    "gradients twice": "BF16_Optimizer holds the bf16 gradients of the last micro-batch beside the "
    "fp32 sums: runtime/bf16_optimizer.py, update_hp_grads and clear_lp_grads.",
    "cut gradients": "A gradient that two partitions share is held whole by both, each looking at "
    "its slice: runtime/zero/stage_1_and_2.py, get_flat_partition.",
    "master copy": "ZeRO copies the partition that it updates, though it is fp32 already: "
    "runtime/zero/stage_1_and_2.py, __init__ (single_partition_of_fp32_groups); "
    "runtime/zero/stage3.py, _create_fp32_partitions.",
    "persistent": "Parameters up to stage3_param_persistence_threshold stay whole beside their "
    "shard: runtime/zero/parameter_offload.py, mark_persistent_parameters.",
    "fp32 bucket": "A bucket of reduce_bucket_size fp32 gradients is kept between steps: "
    "runtime/zero/stage3.py, _setup_for_real_optimizer.",
}
"""Why a rank holds more than the papers say, by a short name."""

UNDER_WAY = (
    "Under way after the last backward, at most: two buckets; the largest parameter, gathered "
    "(ZeRO 3), and its gradient, larger than a bucket and not yet reduced; under ZeRO 2 also the "
    "rank's slices of this micro-batch's gradients, beside their sums over micro-batches "
    "(runtime/zero/stage_1_and_2.py, copy_grads_in_partition and all_grad_tensors)."
)


@dataclass(frozen=True)
class Term:
    """One part of a formula."""

    kind: str
    """As in the measurement."""
    num_bytes: float
    excess_bytes: dict[str, float] = field(default_factory=dict)
    """What of it the papers do not have, by name of the cause."""

    def __post_init__(self) -> None:
        assert self.excess_bytes.keys() <= CAUSES.keys()


def predict(case: Case, config: Config, *, dp_rank: int) -> Iterator[Term]:
    """Bytes that a rank holds.

    The papers' psi parameters are those of the whole model over tp. In 16 bits they count 2 psi of
    weights, 2 psi of gradients and K psi = 12 psi of optimizer state (fp32 weights and Adam's two
    moments), in fp32 4, 4 and 8 psi; ZeRO divides the last by dp from stage 1, the second from
    stage 2, the first in stage 3.
    """
    layout = Layout.parse(case.layout)
    dp, stage, is_bf16 = layout.data_parallel_size, layout.zero_stage, case.precision == "bf16"
    shapes = local_shapes(config)
    local = sum(shape.numel for shape in shapes)
    psi = _whole_model_numel(config) / layout.tensor_parallel_size
    persistent = 0
    flat = local if stage == 0 else padded_numel(shapes, dp)
    if stage == 3:
        persistent, others = persistent_numel(config, shapes, dp)
        flat = persistent + others
    weight_bytes = 2 if is_bf16 else 4

    def term(kind: str, each_bytes: float, numel: float = flat, **causes: float) -> Term:
        replicated, alignment = (local - psi) * each_bytes, (numel - local) * each_bytes
        excess = {"replicated": replicated, "alignment": alignment}
        return Term(kind, numel * each_bytes, excess | causes)

    yield term("parameters", weight_bytes / (dp if stage == 3 else 1))
    if persistent and dp > 1:
        whole = persistent * weight_bytes
        yield Term("parameters", whole, {"persistent": whole})

    shards = dp if stage >= 2 else 1
    # Separate tensors, without padding, where they are not accumulated in another type.
    numel = flat if stage == 3 or is_bf16 else local
    in_fp32 = {"fp32 gradients": (4 - weight_bytes) * psi / shards}
    yield term("gradients", 4 / shards, numel, **in_fp32)
    if stage == 1 and is_bf16:
        again = weight_bytes * local
        yield Term("gradients", again, {"gradients twice": again})
    if stage == 2 and not is_bf16:
        beyond = 4 * (_touched_numel(shapes, dp=dp, dp_rank=dp_rank) - local / dp)
        yield Term("gradients", beyond, {"cut gradients": beyond})

    if stage >= 1:
        copied = {} if is_bf16 else {"master copy": 4 * psi / dp}
        yield term("master weights", 4 / dp, **copied)
    yield term("moments", 8 / (dp if stage >= 1 else 1))
    if stage == 3:
        bucket = 4 * config.model.hidden_size**2
        yield Term("buckets", bucket, {"fp32 bucket": bucket})


def _whole_model_numel(config: Config) -> int:
    """Parameters of the model on one rank."""
    alone = replace(config, parallel=ParallelConfig())
    return sum(shape.numel for shape in local_shapes(alone))


def _touched_numel(shapes: list[Shape], *, dp: int, dp_rank: int) -> int:
    """Elements of all parameters of which a rank's partitions hold a part."""
    touched = 0
    for is_vector in (False, True):
        group = [shape for shape in shapes if (len(shape.dims) == 1) == is_vector]
        partition = padded_numel(group, dp) // dp
        start = 0
        for shape in group:
            end = start + shape.numel
            if end > dp_rank * partition and start < (dp_rank + 1) * partition:
                touched += shape.numel
            start = end
    return touched


def most_under_way_bytes(case: Case, config: Config) -> float:
    """See UNDER_WAY."""
    layout = Layout.parse(case.layout)
    weight, accumulated = (2, 4) if case.precision == "bf16" else (4, 4)
    shapes = local_shapes(config)
    most = 2.0 * accumulated * config.model.hidden_size**2
    if layout.zero_stage >= 2:
        most += (weight + accumulated) * max(shape.numel for shape in shapes)
    if layout.zero_stage == 2:
        most += accumulated * sum(shape.numel for shape in shapes) / layout.data_parallel_size
    return most
