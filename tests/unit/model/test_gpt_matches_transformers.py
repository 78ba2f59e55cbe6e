"""The oracle of the oracle: with the same weights, transformers' GPT-2 and Llama say the same.

A fault that all of our layouts share cannot pass here.
"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megagpt.config.schema import ModelConfig
from megagpt.data.samples.masks import IGNORE_INDEX
from megagpt.model.gpt import GPTModel, count_parameters

VOCAB, PADDED = 61, 64  # the padding is filled with large values: it must not show
GPT2 = ModelConfig(
    num_layers=3, hidden_size=24, num_attention_heads=4, seq_length=13,
    vocab_size=VOCAB, vocab_padding_multiple=8,
)  # fmt: skip
LLAMA = ModelConfig(
    num_layers=3, hidden_size=32, num_attention_heads=4, num_kv_heads=2, ffn_hidden_size=40,
    seq_length=13, vocab_size=VOCAB, vocab_padding_multiple=8, normalization="rmsnorm",
    norm_eps=1e-6, position_embedding="rope", rope_theta=500.0, activation="swiglu", bias=False,
    tie_embeddings=False,
)  # fmt: skip


def padded(table, fill):
    return torch.cat([table, torch.full((PADDED - VOCAB, table.shape[1]), fill)])


def from_gpt2(tensors, fill):
    """GPT-2's tensors by our names; Conv1D keeps [in, out], and fuses query, key and value."""
    ours = {
        "embedding.word.weight": padded(tensors["transformer.wte.weight"], fill),
        "embedding.position.weight": tensors["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"final_norm.{kind}"] = tensors[f"transformer.ln_f.{kind}"]
        for i in range(GPT2.num_layers):
            theirs, layer = f"transformer.h.{i}", f"layers.{i}"
            ours[f"{layer}.attention_norm.{kind}"] = tensors[f"{theirs}.ln_1.{kind}"]
            ours[f"{layer}.mlp_norm.{kind}"] = tensors[f"{theirs}.ln_2.{kind}"]
            parts = tensors[f"{theirs}.attn.c_attn.{kind}"].chunk(3, dim=-1)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                ours[f"{layer}.attention.{name}.{kind}"] = part.T if kind == "weight" else part
            for name, source in (
                ("attention.output", "attn.c_proj"),
                ("mlp.up", "mlp.c_fc"),
                ("mlp.down", "mlp.c_proj"),
            ):
                tensor = tensors[f"{theirs}.{source}.{kind}"]
                ours[f"{layer}.{name}.{kind}"] = tensor.T if kind == "weight" else tensor
    return ours


def from_llama(tensors, fill):
    ours = {
        "embedding.word.weight": padded(tensors["model.embed_tokens.weight"], fill),
        "lm_head.weight": padded(tensors["lm_head.weight"], fill),
        "final_norm.weight": tensors["model.norm.weight"],
    }
    for i in range(LLAMA.num_layers):
        for name, source in (
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
            ("attention.query", "self_attn.q_proj"),
            ("attention.key", "self_attn.k_proj"),
            ("attention.value", "self_attn.v_proj"),
            ("attention.output", "self_attn.o_proj"),
            ("mlp.gate", "mlp.gate_proj"),
            ("mlp.up", "mlp.up_proj"),
            ("mlp.down", "mlp.down_proj"),
        ):
            ours[f"layers.{i}.{name}.weight"] = tensors[f"model.layers.{i}.{source}.weight"]
    return ours


def gpt2():
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=13, n_embd=24, n_layer=3, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), from_gpt2, GPT2


def llama():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=13,
        rms_norm_eps=1e-6, rope_theta=500.0, tie_word_embeddings=False,
    )  # fmt: skip
    # Older and newer transformers name it differently; a silent default would hide a fault.
    if hasattr(config, "rope_parameters"):
        config.rope_parameters["rope_theta"] = 500.0
    return LlamaForCausalLM(config), from_llama, LLAMA


@pytest.mark.parametrize("build", [gpt2, llama])
def test_logits_loss_and_every_gradient_equal_transformers(build):
    torch.manual_seed(0)
    theirs, convert, config = build()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.3)  # biases and norms too: zeros and ones would hide faults
    ours = GPTModel(config)
    weights = convert({n: p.detach() for n, p in theirs.named_parameters()}, fill=50.0)
    assert set(weights) == {name for name, _ in ours.named_parameters()}
    ours.load_state_dict(weights, strict=config is LLAMA)  # a tied head has a second key

    tokens = torch.randint(VOCAB, (2, 13))
    reference = theirs(tokens, labels=tokens)
    reference.loss.backward()
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), IGNORE_INDEX)], dim=1)
    loss = ours(tokens, labels)
    assert loss.shape == (2, 13) and loss.dtype == torch.float32
    assert (loss[:, -1] == 0).all()
    (loss.sum() / 24).backward()

    # fp32 sums of at most 40 terms in another order: 1e-5 is some ten roundings.
    torch.testing.assert_close(ours.logits(tokens), reference.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.sum() / 24, reference.loss, rtol=1e-6, atol=1e-6)
    gradients = convert({n: p.grad for n, p in theirs.named_parameters()}, fill=0.0)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        # A key's bias shifts a whole row of scores: its gradient is 0 but for rounding, `largest`.
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad,
            gradients[name],
            rtol=1e-4,
            atol=2e-5 * scale + 1e-7 * largest,
            msg=lambda m, n=name: n + m,
        )
    assert count_parameters(config) == sum(p.numel() for p in theirs.parameters())
