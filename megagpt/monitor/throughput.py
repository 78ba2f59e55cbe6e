"""Model FLOPs of a step, for the throughput that is logged.

Pure arithmetic. Recomputation does not count, so the figure is a model rate (MFU), not a
hardware one.
"""

from megagpt.config.schema import ModelConfig
from megagpt.parallel.partition import matrix_parameters


def model_flops(config: ModelConfig, *, num_tokens: int, num_pairs: int) -> float:
    """Multiply-adds times two of the matrix products, forward and backward; backward is twice.

    Which pairs of attention count is a convention: Megatron-LM counts those that the causal mask
    leaves; PaLM (appendix B), nanoGPT and torchtitan count the whole square, and so did
    Megatron-LM's paper and Megatron-DeepSpeed.

    Args:
        config: The model's shape.
        num_tokens: Tokens that count.
        num_pairs: Pairs of a query and a key, over all samples; not times heads or layers.

    Source: Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, appendix; with grouped-query
        attention and SwiGLU counted by their own shapes.
    """
    weights = config.num_layers * matrix_parameters(config)
    weights += config.padded_vocab_size() * config.hidden_size
    # Scores, and values weighted by them.
    attention = config.num_layers * 2 * config.hidden_size * num_pairs
    return 6.0 * (num_tokens * weights + attention)


def square_pairs(causal_pairs: int, num_positions: int) -> int:
    """Pairs of the whole squares, of those at or below their diagonals and the diagonals."""
    return 2 * causal_pairs - num_positions
