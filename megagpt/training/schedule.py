"""Learning rate as a pure function of the step, so that resuming needs no schedule state.

Knows nothing of DeepSpeed. Applied by `train_step.py`.
"""

import math

from megagpt.config.schema import OptimizerConfig


def learning_rate(
    step: int, config: OptimizerConfig, *, decay_steps: int, wsd_decay_steps: int = 0
) -> float:
    """Learning rate of an optimizer step.

    Args:
        step: Step about to be taken, from 1.
        config: Peak, minimum, warm-up and shape.
        decay_steps: Step at which min_lr is reached; it stays there afterwards.
        wsd_decay_steps: Steps of linear decay before decay_steps under `wsd`.

    Returns:
        The rate; at the last warm-up step it is config.lr.

    Source: cosine, Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983;
        warmup-stable-decay, Hu et al. 2024, https://arxiv.org/abs/2404.06395.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = config.lr - config.min_lr
    if config.schedule == "wsd":
        begin = decay_steps - wsd_decay_steps
        share = min(max(step - begin, 0) / wsd_decay_steps, 1.0)
        return config.lr - span * share
    share = min((step - config.warmup_steps) / (decay_steps - config.warmup_steps), 1.0)
    if config.schedule == "linear":
        return config.lr - span * share
    return config.min_lr + span * 0.5 * (1.0 + math.cos(math.pi * share))
