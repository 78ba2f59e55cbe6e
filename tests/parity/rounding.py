"""The rule of parity: a layout may be off the truth by a few times what honest rounding is off.

The truth is the oracle in fp64. The unit is the oracle in fp32, one process, run in several orders
of its sums: what it is off is what this machine's arithmetic does to this model, whoever computes
it. docs/parity.md gives the reasons for the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass

import numpy as np

K = 6.0
"""How many units a layout may be off."""
ORDERS = range(6)
"""Orders of the oracle in fp32; the unit is the largest error of all."""
CEILINGS = {
    "fp32": {"loss": 2e-6, "grad_norm": 1e-4},
    # These have no unit: a weight is rounded by 2^-9 of itself, or 2^-12, so only the loss can be
    # compared.
    "bf16": {"loss": 5e-3},
    "fp16": {"loss": 1e-3},
}
"""What no unit raises, relative."""
QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)
"""Where the distribution of the weights' errors is compared; the last is the largest error."""
NOISE = ("attention.key.bias",)
"""Weights without a gradient where positions are not rotary: Adam amplifies rounding there."""

Outcome = tuple[list[tuple[float, float, int]], float, dict[str, np.ndarray]]
"""(loss, gradient norm, tokens) of each step, validation loss, final weights by name."""


@dataclass(frozen=True)
class Errors:
    """How far one training is from another; a NaN is far from everything."""

    loss: float
    """Largest relative difference over all steps and the validation at the end."""
    grad_norm: float
    """Largest relative difference over all steps."""
    weights: tuple[float, ...]
    """Absolute differences of the final weights, at QUANTILES."""


def errors(outcome: Outcome, truth: Outcome) -> Errors:
    """Compares a training with the truth.

    Args:
        outcome: Weights may lack the rows that only pad the truth's vocabulary.
        truth: The oracle's, in fp64.
    """
    curve, validation, weights = outcome
    expected, expected_validation, expected_weights = truth
    assert len(curve) == len(expected)
    assert [tokens for *_, tokens in curve] == [tokens for *_, tokens in expected]
    assert weights.keys() == expected_weights.keys()
    steps, real = np.array(curve)[:, :2], np.array(expected)[:, :2]
    relative = np.abs(steps - real) / np.abs(real)  # [steps, 2]
    off = [
        np.abs(weights[name] - whole[: len(weights[name])]).ravel()
        for name, whole in expected_weights.items()
        if not name.endswith(NOISE)
    ]
    return Errors(
        loss=float(
            np.maximum(
                relative[:, 0].max(), abs(validation - expected_validation) / expected_validation
            )
        ),
        grad_norm=float(relative[:, 1].max()),
        weights=tuple(np.quantile(np.concatenate(off), QUANTILES).tolist()),
    )


def largest(of_runs: Iterable[Errors]) -> Errors:
    """The largest of each figure."""
    losses, norms, weights = zip(*map(astuple, of_runs), strict=True)
    return Errors(
        float(np.max(losses)), float(np.max(norms)), tuple(np.max(weights, axis=0).tolist())
    )


def judge(measured: Errors, unit: Errors, *, precision: str) -> dict:
    """What a cell's errors are allowed to be, and which are more.

    Returns:
        `allowed`: loss, grad_norm and weights (at QUANTILES), as far as the precision is compared;
        `units`: how many units each is off, of the weights the largest; and `off`, the names of
        those beyond what is allowed.
    """
    figures = asdict(measured)
    allowed: dict = dict(CEILINGS[precision])
    units: dict = {}
    if precision == "fp32":
        for key in ("loss", "grad_norm"):
            units[key] = figures[key] / getattr(unit, key)
            allowed[key] = min(allowed[key], K * getattr(unit, key))
        units["weights"] = float(np.max(np.divide(measured.weights, unit.weights)))
        allowed["weights"] = [K * weight for weight in unit.weights]
    # A NaN is not within anything.
    off = [key for key in allowed if not np.all(np.less_equal(figures[key], allowed[key]))]
    return {"allowed": allowed, "units": units, "off": off}
