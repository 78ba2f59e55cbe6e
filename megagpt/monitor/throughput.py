"""Model FLOPs of a step, for the throughput that is logged.

Pure arithmetic. Recomputation does not count, so the figure is a model rate (MFU), not a
hardware one.
"""

from megagpt.config.schema import ModelConfig


def model_flops_per_token(config: ModelConfig) -> float:
    """Multiply-adds times two of forward and backward for one token of a full sequence.

    Matrix products only: 6 per weight of the linear layers and the output layer, and attention
    scores and values over the whole [s, s] square, as Megatron-LM counts them.

    Source: Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, appendix; with grouped-query
        attention and SwiGLU counted by their own shapes.
    """
    h, f = config.hidden_size, config.ffn_size
    kv_width = config.kv_heads * config.head_size
    num_mlp_matrices = 3 if config.activation == "swiglu" else 2
    layer = 2 * h * h + 2 * h * kv_width + num_mlp_matrices * h * f
    attention = 2 * config.seq_length * h
    output = h * config.padded_vocab_size()
    return 6.0 * (config.num_layers * (layer + attention) + output)
