"""A value depends on seed, name and global shape, and on nothing else."""

import math

import torch

from megagpt.config.schema import ModelConfig
from megagpt.model import initialization
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import initial_value, initialize, local_shard

CONFIG = ModelConfig(
    num_layers=8, hidden_size=64, num_attention_heads=4, seq_length=32, vocab_size=100
)


def value(name="layers.0.mlp.up.weight", shape=(256, 64), config=CONFIG, seed=1):
    return initial_value(name, torch.Size(shape), config, seed=seed)


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


def test_slices_of_all_ranks_concatenated_are_the_whole(monkeypatch):
    whole = value()
    for dim in (0, 1):
        shards = []
        for rank in range(4):
            monkeypatch.setattr(initialization, "group_size", lambda group: 4)
            monkeypatch.setattr(initialization, "group_rank", lambda group, r=rank: r)
            shards.append(local_shard(whole, dim, object()))
        assert torch.equal(torch.cat(shards, dim=dim), whole)


def test_initialize_leaves_no_parameter_out():
    model = GPTModel(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    initialize(model, CONFIG, seed=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, value(name, parameter.shape, seed=3)), name


def test_the_padding_of_the_vocabulary_is_zero_and_changes_no_row():
    name = "embedding.word.weight"
    padded, more = value(name, (128, 64)), value(name, (256, 64))
    assert torch.equal(padded[:100], more[:100]) and padded[:100].std() > 0.01
    assert (more[100:] == 0).all() and (padded[100:] == 0).all()
