"""The sum that ends a step: loss, the tokens of the next and what ranks have to tell, in one."""

import dataclasses

import pytest
import torch

from megagpt.config.layout import Layout
from megagpt.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megagpt.data.samples.masks import IGNORE_INDEX
from megagpt.testing.distributed import run_distributed

CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=8, vocab_size=37
)
CELLS = [
    *(("dp2-zero0", "fp32"), ("pp2-zero0", "fp32"), ("tp2-zero0", "fp32")),
    *(("dp2-zero1", "bf16"), ("dp2-zero2", "bf16"), ("dp2-zero3", "bf16"), ("pp2-zero1", "bf16")),
]
NEXT_TOKENS = (5, 7)
"""Of each rank's part of the next step."""


def engine_of(layout, precision, groups):
    from megagpt.model.build import build_model
    from megagpt.training.engine import build_engine

    values = Layout.parse(layout).ds_config() | {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "timers": {"throughput": {"enabled": False}},
    }
    if precision == "bf16":
        values |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        values |= {"communication_data_type": "fp32"}
    size = groups.topology.pipeline_parallel_size
    model = build_model(
        CONFIG,
        seed=1,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        ds_config=values,
        parallel=ParallelConfig(
            tensor_parallel_size=groups.topology.tensor_parallel_size, pipeline_parallel_size=size
        ),
        groups=groups,
    )
    return build_engine(model, OptimizerConfig(weight_decay=0.0), values, groups)


def micro_batches(rank, *, counts):
    from megagpt.training.batches import MicroBatch

    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(37, (2, 2, 9), generator=generator)
    labels = tokens[:, :, 1:].clone()
    if not counts:
        labels.fill_(IGNORE_INDEX)
    inputs = tokens[:, :, :-1].contiguous()
    return [MicroBatch(*pair) for pair in zip(inputs, labels, strict=True)]


def steps_of(rank, layout, precision):
    """A step without a token that counts, and two with; results and the sums of each."""
    import torch.distributed as dist

    from megagpt.parallel.groups import ProcessGroups
    from megagpt.parallel.topology import ParallelTopology
    from megagpt.training.train_step import Message, Notices, train_step

    parsed = Layout.parse(layout)
    groups = ProcessGroups(
        ParallelTopology(
            2,
            tensor_parallel_size=parsed.tensor_parallel_size,
            pipeline_parallel_size=parsed.pipeline_parallel_size,
        )
    )
    engine = engine_of(layout, precision, groups)
    part = rank if groups.topology.data_parallel_size > 1 else 0
    results, sums = [], []
    all_reduce = dist.all_reduce

    def counted(tensor, *arguments, **options):
        if tensor.dtype == torch.float64 and tensor.numel() > 1:
            sums[-1].append(tensor.numel())
        return all_reduce(tensor, *arguments, **options)

    def message():
        return Message(NEXT_TOKENS[part], Notices(is_told=rank == 1, has_save_failed=False))

    dist.all_reduce = counted
    try:
        for counts in (False, True, True):
            sums.append([])
            batches = micro_batches(part, counts=counts)
            num_tokens = sum(b.num_tokens for b in batches) * groups.topology.data_parallel_size
            result = train_step(
                engine, batches, groups=groups, lr=1e-3, num_tokens=num_tokens, message=message
            )
            results.append(dataclasses.astuple(result))
    finally:
        dist.all_reduce = all_reduce
    counted_first = train_step(engine, batches, groups=groups, lr=0.0)
    return results, sums, counted_first.num_tokens


def cells(rank, world_size):
    return {cell: steps_of(rank, *cell) for cell in CELLS}


@pytest.fixture(scope="module")
def outcomes():
    first, second = run_distributed(cells, 2, timeout_seconds=300)
    assert {cell: o[0] for cell, o in first.items()} == {cell: o[0] for cell, o in second.items()}
    return first


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_step_ends_with_one_sum_that_tells_all_ranks_everything(outcomes, cell):
    results, sums, counted_first = outcomes[cell]
    assert sums == [[6], [6], [6]]
    ranks = 2 if cell[0].startswith("dp2") else 1
    for *_, num_pairs, next_tokens, notices in results:
        assert num_pairs == ranks * 4 * 36  # 4 samples of 8 * 9 / 2 pairs
        assert next_tokens == (sum(NEXT_TOKENS) if cell[0].startswith("dp2") else NEXT_TOKENS[0])
        assert notices == (False, True, False)  # rank 1 alone was told to stop
    assert counted_first == results[1][1]


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_global_batch_in_which_no_token_counts_changes_nothing(outcomes, cell):
    (nothing, first, second), *_ = outcomes[cell]
    assert nothing[:3] == (0.0, 0, 0.0)
    assert 3.0 < second[0] < first[0] < 4.0  # ln 37 = 3.6
    assert first[2] > 0
