"""Layers on 1, 2 and 4 gloo ranks against plain torch: outputs and every gradient."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megagpt.config.schema import ModelConfig
from megagpt.data.samples.masks import IGNORE_INDEX
from megagpt.kernels.linear_cross_entropy import cpu, reference
from megagpt.kernels.linear_cross_entropy.contract import Vocabulary
from megagpt.model.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedColumnLinear,
    TensorParallel,
    VocabParallelEmbedding,
)
from megagpt.model.norm import Norm
from megagpt.parallel.collectives import (
    copy_to_group,
    gather_sequence,
    reduce_from_group,
    reduce_scatter_sequence,
)
from megagpt.parallel.groups import ProcessGroups
from megagpt.parallel.topology import ParallelTopology
from megagpt.testing.distributed import run_distributed

# s divisible by 4, for sequence parallelism
B, S, IN, OUT, VOCAB, PADDED = 3, 8, 12, 20, 37, 48


def close(actual, expected):
    # fp32 sums in another order
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def full(*shape, requires_grad=True):
    return torch.randn(*shape).requires_grad_(requires_grad)


def shard(tensor, dim, rank, size):
    return tensor.detach().chunk(size, dim=dim)[rank].clone()


def stream(tensor, sequence_parallel, rank, size):
    """This rank's part of the residual stream."""
    return shard(tensor, 1, rank, size) if sequence_parallel else tensor.detach().clone()


def linear_cells(group, rank, size, sequence_parallel):
    tp = TensorParallel(group, sequence_parallel)
    for bias in (True, False):
        x, upstream = full(B, S, IN), torch.randn(B, S, OUT)
        weight, offset = full(OUT, IN), full(OUT) if bias else None
        expected = F.linear(x, weight, offset)
        expected.backward(upstream)

        layer = ColumnParallelLinear(IN, OUT, bias=bias, tp=tp)
        layer.weight.data.copy_(shard(weight, 0, rank, size))
        if bias:
            layer.bias.data.copy_(shard(offset, 0, rank, size))
        mine = stream(x, sequence_parallel, rank, size).requires_grad_()
        y = layer(tp.enter(mine))
        close(y, shard(expected, -1, rank, size))
        y.backward(shard(upstream, -1, rank, size))
        close(mine.grad, stream(x.grad, sequence_parallel, rank, size))
        close(layer.weight.grad, shard(weight.grad, 0, rank, size))
        if bias:
            close(layer.bias.grad, shard(offset.grad, 0, rank, size))

        layer = RowParallelLinear(IN, OUT, bias=bias, tp=tp)
        layer.weight.data.copy_(shard(weight, 1, rank, size))
        if bias:
            layer.bias.data.copy_(offset.detach())
        mine = shard(x, -1, rank, size).requires_grad_()
        y = layer(mine)
        close(y, stream(expected, sequence_parallel, rank, size))
        given = stream(upstream, sequence_parallel, rank, size)
        kept = given.clone()
        y.backward(given)
        assert torch.equal(given, kept)
        close(mine.grad, shard(x.grad, -1, rank, size))
        close(layer.weight.grad, shard(weight.grad, 1, rank, size))
        if bias:
            close(layer.bias.grad, offset.grad)


def shared_linear_cell(group, rank, size):
    """Fewer blocks than ranks: each rank computes one, and has the whole gradient of all."""
    blocks, width = max(size // 2, 1), 5
    x, upstream = full(B, S, IN), torch.randn(size, B, S, width)
    weight, offset = full(blocks * width, IN), full(blocks * width)
    outputs = F.linear(x, weight, offset).split(width, dim=-1)
    own = [r * blocks // size for r in range(size)]
    sum((outputs[own[r]] * upstream[r]).sum() for r in range(size)).backward()
    layer = SharedColumnLinear(IN, width, num_blocks=blocks, bias=True, tp=TensorParallel(group))
    layer.load_state_dict({"weight": weight, "bias": offset})
    mine = x.detach().clone().requires_grad_()
    y = layer(copy_to_group(mine, group))
    close(y, outputs[own[rank]])
    y.backward(upstream[rank])
    close(mine.grad, x.grad)
    close(layer.weight.grad, weight.grad)
    close(layer.bias.grad, offset.grad)


def embedding_cell(group, rank, size, sequence_parallel):
    tokens, upstream = torch.randint(VOCAB, (B, S)), torch.randn(B, S, IN)
    tokens[0, :2] = VOCAB - 1  # twice the same row
    table = full(PADDED, IN)
    expected = F.embedding(tokens, table)
    expected.backward(upstream)
    layer = VocabParallelEmbedding(PADDED, IN, tp=TensorParallel(group, sequence_parallel))
    layer.weight.data.copy_(shard(table, 0, rank, size))
    y = layer(tokens)
    close(y, stream(expected, sequence_parallel, rank, size))
    y.backward(stream(upstream, sequence_parallel, rank, size))
    close(layer.weight.grad, shard(table.grad, 0, rank, size))


def cross_entropy_cell(group, rank, size, sequence_parallel):
    # 37 real tokens of 48: with 4 ranks, the last one holds padding only.
    targets, upstream = torch.randint(VOCAB, (B, S)), torch.randn(B, S)
    targets[0, 0], targets[1, 1] = VOCAB - 1, IGNORE_INDEX
    hidden, table = full(B, S, IN), full(PADDED, IN)
    logits = hidden @ table.T
    expected = F.cross_entropy(
        logits[..., :VOCAB].transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    expected.backward(upstream)

    tp = TensorParallel(group, sequence_parallel)
    rows = PADDED // size
    for backend in (reference, cpu):
        my_hidden = stream(hidden, sequence_parallel, rank, size).requires_grad_()
        my_table = shard(table, 0, rank, size).requires_grad_()
        loss = backend.linear_cross_entropy(
            tp.enter(my_hidden).flatten(0, 1),
            my_table,
            targets.flatten(),
            vocabulary=Vocabulary(VOCAB, rank * rows, group if size > 1 else None),
        ).view(B, S)
        close(loss, expected)
        loss.backward(upstream)
        close(my_hidden.grad, stream(hidden.grad, sequence_parallel, rank, size))
        close(my_table.grad, shard(table.grad, 0, rank, size))


def split_norm_cell(group, rank, size, dim):
    """A norm whose input is split over tp gives every rank the whole gradient of its weight.

    Split over heads (dim 2, per-head norms) or over the sequence (dim 1).
    """
    x, upstream = full(B, S, 4, 6), torch.randn(B, S, 4, 6)  # [b, s, n, d]
    for config, whole in (
        (ModelConfig(normalization="layernorm"), torch.nn.LayerNorm(6, eps=1e-5)),
        (ModelConfig(normalization="rmsnorm"), torch.nn.RMSNorm(6, eps=1e-5)),
    ):
        split = Norm(config, 6, split_group=group)
        with torch.no_grad():
            for parameter in whole.parameters():
                parameter.normal_()
        split.load_state_dict(whole.state_dict())
        x.grad = None
        expected = whole(x)
        expected.backward(upstream)
        mine = shard(x, dim, rank, size).requires_grad_()
        y, _ = split(mine)
        close(y, shard(expected, dim, rank, size))
        y.backward(shard(upstream, dim, rank, size))
        close(mine.grad, shard(x.grad, dim, rank, size))
        for ours, theirs in zip(split.parameters(), whole.parameters(), strict=True):
            close(ours.grad, theirs.grad)


def collective_cells(group, rank, size):
    """Each with its transpose as gradient; a non-contiguous upstream gradient is left alone."""
    ranks = range(size)
    base = torch.randn(B, S, IN)

    def run(function, tensor, upstream):
        tensor = tensor.clone().requires_grad_()
        y = function(tensor, group)
        kept = upstream.clone()
        y.backward(upstream)
        assert torch.equal(upstream, kept)
        assert y.is_contiguous()
        return y.detach(), tensor.grad

    upstream = torch.randn(IN, S, B).permute(2, 1, 0)
    total = sum(upstream + r for r in ranks)
    y, grad = run(copy_to_group, base + rank, upstream + rank)
    assert torch.equal(y, base + rank)
    close(grad, total)
    y, grad = run(reduce_from_group, base + rank, upstream)
    close(y, sum(base + r for r in ranks))
    assert torch.equal(grad, upstream)
    y, grad = run(gather_sequence, shard(base, 1, rank, size), upstream + rank)
    assert torch.equal(y, base)
    close(grad, shard(total, 1, rank, size))
    y, grad = run(reduce_scatter_sequence, base + rank, shard(upstream, 1, rank, size))
    close(y, shard(sum(base + r for r in ranks), 1, rank, size))
    close(grad, upstream)


def refusal_cell(group, size):
    if size > 1:
        with pytest.raises(ValueError, match=f"out_features=7 .* tensor_parallel_size={size}"):
            ColumnParallelLinear(8, 7, bias=True, tp=TensorParallel(group))


def all_cells(group, rank, size):
    torch.manual_seed(0)  # the same whole tensors on every rank
    for sequence_parallel in (False, True):
        linear_cells(group, rank, size, sequence_parallel)
        embedding_cell(group, rank, size, sequence_parallel)
        cross_entropy_cell(group, rank, size, sequence_parallel)
    shared_linear_cell(group, rank, size)
    for dim in (1, 2):
        split_norm_cell(group, rank, size, dim)
    collective_cells(group, rank, size)
    refusal_cell(group, size)


def cells_on_ranks(rank, world_size):
    if world_size == 1:

        def refuse(*_, **__):
            raise AssertionError("a collective was called in a group of one rank")

        group = dist.new_group([0])
        dist.all_reduce = dist.all_gather = dist.broadcast = refuse
        dist.all_gather_into_tensor = dist.reduce_scatter_tensor = refuse
        all_cells(group, 0, 1)
        all_cells(None, 0, 1)
        return True
    all_cells(dist.new_group(list(range(world_size))), rank, world_size)
    if world_size == 4:
        # tp 2 x dp 2: both tensor-parallel groups work side by side
        groups = ProcessGroups(ParallelTopology(4, tensor_parallel_size=2))
        assert groups.get_model_parallel_rank() == rank % 2
        assert groups.get_data_parallel_rank() == rank // 2
        assert groups.get_tensor_model_parallel_src_rank() == rank // 2 * 2
        assert dist.get_process_group_ranks(groups.tp_group) == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert dist.get_process_group_ranks(groups.dp_group) == [rank % 2, rank % 2 + 2]
        assert groups.get_data_parallel_group_ranks() == [rank % 2, rank % 2 + 2]
        assert groups.has_loss == (rank % 2 == 0)
        all_cells(groups.tp_group, rank % 2, 2)
        # Degree 1 has no group for the layers, but a real one for DeepSpeed.
        groups = ProcessGroups(ParallelTopology(4, tensor_parallel_size=4))
        assert groups.dp_group is None
        assert dist.get_process_group_ranks(groups.get_data_parallel_group()) == [rank]
        groups = ProcessGroups(ParallelTopology(4))
        assert groups.tp_group is None
        assert dist.get_world_size(groups.dp_group) == 4
        assert dist.get_process_group_ranks(groups.replica_group) == [rank]
        groups = ProcessGroups(ParallelTopology(4, pipeline_parallel_size=2))
        assert dist.get_process_group_ranks(groups.replica_group) == [rank % 2, rank % 2 + 2]
        assert groups.has_loss == (rank >= 2)
    return True


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_layers_match_plain_torch(world_size):
    assert run_distributed(cells_on_ranks, world_size) == [True] * world_size
