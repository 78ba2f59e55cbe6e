"""GPTModel on one rank: KV cache, names, tied weights, and no collective without a group."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from megagpt.config.schema import ModelConfig
from megagpt.kernels.registry import Kernels
from megagpt.model.attention import KVCache
from megagpt.model.gpt import GPTModel, count_parameters
from megagpt.model.initialization import initialize

SHAPE = dict(
    num_layers=2, hidden_size=24, num_attention_heads=6, seq_length=16, vocab_size=50,
    vocab_padding_multiple=8, init_std=0.3,
)  # fmt: skip
GPT2 = ModelConfig(**SHAPE)
LLAMA = ModelConfig(
    **SHAPE, num_kv_heads=2, normalization="rmsnorm", position_embedding="rope",
    activation="swiglu", bias=False, qk_norm=True, tie_embeddings=False,
)  # fmt: skip


def build(config):
    model = GPTModel(config)
    initialize(model, config, seed=1)
    return model


@pytest.mark.parametrize("config", [GPT2, LLAMA])
@torch.no_grad()
def test_logits_with_a_cache_equal_those_without(config):
    model = build(config)
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = model.logits(tokens)
    assert whole.shape == (2, 12, 50) and whole.dtype == torch.float32
    cache = KVCache(config.num_layers)
    # a prompt, a single token, and several at once after the prompt
    parts = [model.logits(part, kv_cache=cache) for part in tokens.split([5, 1, 4, 2], dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="17 tokens are more than seq_length=16"):
        model.logits(torch.zeros(2, 5, dtype=torch.long), kv_cache=cache)


@pytest.mark.parametrize("config", [GPT2, LLAMA])
@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(config):
    model = build(config)
    tokens = torch.randint(50, (1, 9), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 50
    a, b = model.logits(tokens), model.logits(changed)
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.equal(a[:, 6:], b[:, 6:])


def test_canonical_names_and_a_single_tied_weight():
    names = [name for name, _ in build(GPT2).named_parameters()]
    assert "lm_head.weight" not in names and len(names) == len(set(names))
    block = [
        f"{part}.{kind}"
        for part in ("attention.query", "attention.key", "attention.value", "attention.output")
        + ("attention_norm", "mlp_norm", "mlp.up", "mlp.down")
        for kind in ("weight", "bias")
    ]
    expected = {"embedding.word.weight", "embedding.position.weight"}
    expected |= {"final_norm.weight", "final_norm.bias"}
    expected |= {f"layers.{i}.{name}" for i in range(2) for name in block}
    assert set(names) == expected
    names = {name for name, _ in build(LLAMA).named_parameters()}
    assert {"lm_head.weight", "layers.1.mlp.gate.weight"} < names
    assert not any(name.endswith("bias") or "position" in name for name in names)


def test_the_padding_of_the_vocabulary_is_not_counted():
    small = ModelConfig(**{**SHAPE, "vocab_padding_multiple": 1})
    assert count_parameters(GPT2) == count_parameters(small)
    assert count_parameters(small) == sum(p.numel() for p in build(small).parameters())


@pytest.mark.parametrize("config", [GPT2, LLAMA])
def test_without_a_group_no_collective_is_called(config, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("torch.distributed was called")

    for name in (
        "all_reduce all_gather all_gather_into_tensor broadcast reduce_scatter barrier "
        "reduce_scatter_tensor get_rank get_world_size new_group"
    ).split():
        monkeypatch.setattr(dist, name, refuse)
    tokens = torch.randint(50, (2, 7))
    build(config)(tokens, tokens).sum().backward()


def test_bf16_stays_near_fp32():
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    model = build(LLAMA)
    loss = model(tokens, tokens)
    rounded = model.to(torch.bfloat16)(tokens, tokens)
    assert rounded.dtype == torch.float32
    # 2 layers of bf16 (2^-9 relative a rounding) at logits of about 3
    assert (rounded.mean() - loss.mean()).abs() < 0.05


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_z_loss_is_in_the_training_loss_and_its_gradients_and_not_in_validation(backend):
    tokens = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    losses, gradients = {}, {}
    for z_loss in (0.0, 0.1):
        config = dataclasses.replace(GPT2, z_loss=z_loss)
        model = GPTModel(config, kernels=Kernels(backend))
        initialize(model, config, seed=1)
        losses[z_loss, "valid"] = model.eval()(tokens, tokens).detach()
        losses[z_loss, "train"] = model.train()(tokens, tokens)
        losses[z_loss, "train"].sum().backward()
        gradients[z_loss] = model.embedding.word.weight.grad
    assert torch.equal(losses[0.1, "valid"], losses[0.0, "valid"])
    squares = model.logits(tokens).logsumexp(-1).square()
    torch.testing.assert_close(losses[0.1, "train"], losses[0.0, "train"] + 0.1 * squares)
    assert not torch.allclose(gradients[0.1], gradients[0.0], rtol=1e-2)
