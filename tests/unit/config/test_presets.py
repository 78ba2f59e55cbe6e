"""Tests that presets have the published numbers of parameters."""

from __future__ import annotations

import pytest

from megagpt.config.presets import PRESETS
from megagpt.config.schema import ModelConfig


def count(model: ModelConfig, vocab_size: int) -> int:
    """Parameters from the shape, with the unpadded vocabulary."""
    h, f = model.hidden_size, model.ffn_size
    kv = model.kv_heads * model.head_size
    bias = int(model.bias)
    norm = h * (2 if model.normalization == "layernorm" else 1)
    attention = 2 * h * h + 2 * h * kv + bias * (2 * h + 2 * kv)
    matrices = 3 if model.activation == "swiglu" else 2
    mlp = matrices * h * f + bias * (f + h)
    positions = model.seq_length * h if model.position_embedding == "learned" else 0
    embeddings = vocab_size * h * (1 if model.tie_embeddings else 2)
    return embeddings + positions + model.num_layers * (attention + mlp + 2 * norm) + norm


@pytest.mark.parametrize(
    ("name", "vocab_size", "published"),
    [
        ("gpt2-124m", 50257, 124_439_808),
        ("gpt2-355m", 50257, 354_823_168),
        ("gpt2-774m", 50257, 774_030_080),
        ("gpt2-1.5b", 50257, 1_557_611_200),
        ("llama-1b", 128256, 1_235_814_400),
        ("llama-7b", 32000, 6_738_415_616),
        ("llama-70b", 32000, 68_976_648_192),
    ],
)
def test_preset_has_the_published_number_of_parameters(
    name: str, vocab_size: int, published: int
) -> None:
    assert count(PRESETS[name], vocab_size) == published


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("gpt3")])
def test_gpt3_preset_is_the_size_in_its_name(name: str) -> None:
    text = name.removeprefix("gpt3-")
    size = float(text[:-1]) * {"m": 1e6, "b": 1e9}[text[-1]]
    # The paper's names are rounded, 356M to 350M being the coarsest.
    assert count(PRESETS[name], 50257) == pytest.approx(size, rel=0.04)


def test_vocabulary_is_left_to_the_data() -> None:
    assert all(model.vocab_size is None for model in PRESETS.values())
