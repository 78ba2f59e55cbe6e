"""Which steps count as lost, and that only those in a row do."""

import math
from types import SimpleNamespace

import pytest
from steps import record

from megagpt.training.followers.finite import Finite
from megagpt.training.train_step import StepResult


def engine(scaler=None):
    return SimpleNamespace(
        fp16_enabled=lambda: scaler is not None, optimizer=SimpleNamespace(loss_scaler=scaler)
    )


def followed(finite, loss, grad_norm):
    step = record(result=StepResult(loss=loss, num_tokens=10, grad_norm=grad_norm))
    return (finite.after_step(step) or step).num_nonfinite


def test_only_steps_in_a_row_are_counted():
    finite = Finite(engine())
    steps = [(2.0, 1.0), (math.nan, 1.0), (2.0, math.inf), (2.0, 1.0), (-math.inf, math.nan)]
    assert [followed(finite, *step) for step in steps] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("scaler", "count"),
    [
        (SimpleNamespace(cur_scale=2.0, min_scale=1.0), 0),  # it can still be lowered
        (SimpleNamespace(cur_scale=1.0, min_scale=1.0), 1),
        (SimpleNamespace(cur_scale=128.0), 1),  # a fixed one
    ],
)
def test_in_fp16_an_overflow_counts_at_the_least_scale_only(scaler, count):
    assert followed(Finite(engine(scaler)), 2.0, math.inf) == count
