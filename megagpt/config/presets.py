"""Named model shapes: `--preset NAME` fills the model section, a file or a flag overrides it.

The vocabulary is not part of a preset: it comes from the data. Knows nothing of torch. Next file:
`command_line.py`.
"""

from __future__ import annotations

from megagpt.config.schema import ModelConfig


def _gpt(
    num_layers: int, hidden_size: int, num_attention_heads: int, seq_length: int
) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        seq_length=seq_length,
    )


def _llama(
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    *,
    num_kv_heads: int | None = None,
    ffn_hidden_size: int | None = None,
    seq_length: int = 4096,
    rope_theta: float = 10000.0,
    tie_embeddings: bool = False,
) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_kv_heads=num_kv_heads,
        ffn_hidden_size=ffn_hidden_size,
        seq_length=seq_length,
        normalization="rmsnorm",
        position_embedding="rope",
        rope_theta=rope_theta,
        activation="swiglu",
        bias=False,
        tie_embeddings=tie_embeddings,
    )


PRESETS: dict[str, ModelConfig] = {
    "demo": _llama(4, 256, 4, seq_length=256, tie_embeddings=True),
    # Radford et al. 2019 (GPT-2), table 2, and the sizes that were released.
    "gpt2-124m": _gpt(12, 768, 12, 1024),
    "gpt2-355m": _gpt(24, 1024, 16, 1024),
    "gpt2-774m": _gpt(36, 1280, 20, 1024),
    "gpt2-1.5b": _gpt(48, 1600, 25, 1024),
    # Brown et al. 2020, https://arxiv.org/abs/2005.14165, table 2.1. Its XL row gives 24 heads of
    # 128 for a width of 2048 and its 13B row a width of 5140; 16 heads and 5120 are what fits.
    "gpt3-125m": _gpt(12, 768, 12, 2048),
    "gpt3-350m": _gpt(24, 1024, 16, 2048),
    "gpt3-760m": _gpt(24, 1536, 16, 2048),
    "gpt3-1.3b": _gpt(24, 2048, 16, 2048),
    "gpt3-2.7b": _gpt(32, 2560, 32, 2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, 2048),
    "gpt3-13b": _gpt(40, 5120, 40, 2048),
    "gpt3-175b": _gpt(96, 12288, 96, 2048),
    # Llama-3.2-1B without its rope scaling; Llama-2 7B and 70B.
    "llama-1b": _llama(
        16,
        2048,
        32,
        num_kv_heads=8,
        ffn_hidden_size=8192,
        seq_length=8192,
        rope_theta=500000.0,
        tie_embeddings=True,
    ),
    "llama-7b": _llama(32, 4096, 32, ffn_hidden_size=11008),
    "llama-70b": _llama(80, 8192, 64, num_kv_heads=8, ffn_hidden_size=28672),
}
"""Model shapes by name."""
