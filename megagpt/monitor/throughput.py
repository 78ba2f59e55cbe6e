"""Model FLOPs of a step, for the throughput that is logged.

Pure arithmetic. Recomputation does not count, so the figure is a model rate (MFU), not a
hardware one.
"""

from megagpt.config.schema import ModelConfig
from megagpt.parallel.partition import forward_multiply_adds


def model_flops_per_token(config: ModelConfig) -> float:
    """Multiply-adds times two of forward and backward for one token of a full sequence.

    Backward costs twice the forward; what counts is as in Megatron-LM.

    Source: Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, appendix; with grouped-query
        attention and SwiGLU counted by their own shapes.
    """
    embedding, block, output = forward_multiply_adds(config)
    return 6.0 * (embedding + config.num_layers * block + output)
