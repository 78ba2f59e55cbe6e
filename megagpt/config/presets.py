"""Named model shapes: `--preset NAME` fills the model section, a file or a flag overrides it.

The vocabulary is not part of a preset: it comes from the data. Knows nothing of torch. Next file:
`command_line.py`.
"""

from __future__ import annotations

from functools import partial

from megagpt.config.schema import ModelConfig

_gpt2 = partial(ModelConfig, seq_length=1024)
_gpt3 = partial(ModelConfig, seq_length=2048)
_llama = partial(
    ModelConfig,
    seq_length=4096,
    normalization="rmsnorm",
    position_embedding="rope",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
# Blocks, width and query heads, in the order of the fields.
PRESETS: dict[str, ModelConfig] = {
    "demo": _llama(4, 256, 4, seq_length=256, tie_embeddings=True),
    # Radford et al. 2019 (GPT-2), table 2, and the sizes that were released.
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    # Brown et al. 2020, https://arxiv.org/abs/2005.14165, table 2.1. Its XL row gives 24 heads of
    # 128 for a width of 2048 and its 13B row a width of 5140; 16 heads and 5120 are what fits.
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
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
