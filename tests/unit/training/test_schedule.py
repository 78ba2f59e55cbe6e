"""The learning rate against its definition, at the corners of each shape."""

import math

import pytest

from megagpt.config.schema import OptimizerConfig
from megagpt.training.schedule import learning_rate


def rate(step: int, schedule: str, **settings) -> float:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=10, schedule=schedule, **settings)
    return learning_rate(step, config, decay_steps=110, wsd_decay_steps=20)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warmup_is_linear_from_zero_to_the_peak(schedule):
    assert [rate(s, schedule) for s in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_decay_ends_at_the_minimum_and_stays(schedule):
    assert rate(110, schedule) == pytest.approx(0.1)
    assert rate(500, schedule) == pytest.approx(0.1)


def test_shapes_between_warmup_and_end():
    assert rate(60, "linear") == pytest.approx(0.55)
    assert rate(35, "cosine") == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rate(60, "constant") == 1.0
    assert rate(90, "wsd") == 1.0
    assert rate(100, "wsd") == pytest.approx(0.55)
