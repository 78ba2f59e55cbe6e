"""A value depends on seed, name and place in the whole parameter, and on nothing else."""

import math

import pytest
import torch
from torch import nn

from megagpt.config.schema import ModelConfig
from megagpt.model import initialization
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import fill_range, initial_range, initialize

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    num_layers=8, hidden_size=64, num_attention_heads=4, seq_length=32, vocab_size=100
)


def value(name="layers.0.mlp.up.weight", shape=(256, 64), config=CONFIG, seed=1):
    numel = math.prod(shape)
    return initial_range(name, shape, 0, numel, config=config, seed=seed, device=CPU).view(shape)


def test_name_and_seed_and_nothing_else_decide_the_value():
    first = value()
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(first, value())
    assert not torch.equal(first, value(seed=2))
    assert not torch.equal(first, value(name="layers.1.mlp.up.weight"))


def test_standard_deviations_biases_and_norms():
    assert math.isclose(value().std().item(), 0.02, rel_tol=0.03)
    for name in ("layers.3.attention.output.weight", "layers.3.mlp.down.weight"):
        assert math.isclose(value(name).std().item(), 0.02 / 4, rel_tol=0.03)  # sqrt(2 * 8) = 4
    assert (value("layers.0.mlp.up.bias", (256,)) == 0).all()
    assert (value("final_norm.weight", (64,)) == 1).all()


@pytest.mark.parametrize("shape", [(24, 20), (20, 28), (4, 12)])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_shares_put_together_are_the_whole(shape, dim, monkeypatch):
    # Four ranks of tensor parallelism, each share in three ranges, as ZeRO-3 cuts it.
    whole, ranks = value(shape=shape), 4
    local_shape = tuple(n // ranks if d == dim else n for d, n in enumerate(shape))
    parameter = nn.Parameter(torch.empty(local_shape))
    parameter.tp_dim = dim
    monkeypatch.setattr(initialization, "group_size", lambda group: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(initialization, "group_rank", lambda group, r=rank: r)
        size = -(-parameter.numel() // 3)
        shards = torch.full((3, size), math.nan)
        for number, shard in enumerate(shards):
            fill_range(
                shard,
                "layers.0.mlp.up.weight",
                parameter,
                number * size,
                config=CONFIG,
                seed=1,
                tp_group=None,
            )
        flat = shards.flatten()
        assert (flat[parameter.numel() :] == 0).all()  # what pads the last shard
        shares.append(flat[: parameter.numel()].view(local_shape))
    assert torch.equal(torch.cat(shares, dim=dim), whole)


def test_a_range_of_many_chunks_is_that_of_one(monkeypatch):
    whole = value(shape=(50, 9))
    monkeypatch.setattr(initialization, "_ELEMENTS_AT_ONCE", 30)
    parameter, target = nn.Parameter(torch.empty(50, 9)), torch.full((400,), math.nan)
    fill_range(
        target, "layers.0.mlp.up.weight", parameter, 13, config=CONFIG, seed=1, tp_group=None
    )
    assert torch.equal(target, whole.flatten()[13:413])


def test_initialize_leaves_no_parameter_out():
    model = GPTModel(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    initialize(model, CONFIG, seed=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, value(name, parameter.shape, seed=3)), name


def test_without_a_seed_all_is_zero(monkeypatch):
    monkeypatch.delattr(initialization, "standard_normal")  # nothing is drawn
    model = GPTModel(CONFIG)
    initialize(model, CONFIG, seed=None)
    assert all((parameter == 0).all() for parameter in model.parameters())


def test_the_padding_of_the_vocabulary_is_zero_and_changes_no_row():
    name = "embedding.word.weight"
    padded, more = value(name, (128, 64)), value(name, (256, 64))
    assert torch.equal(padded[:100], more[:100]) and padded[:100].std() > 0.01
    assert (more[100:] == 0).all() and (padded[100:] == 0).all()
