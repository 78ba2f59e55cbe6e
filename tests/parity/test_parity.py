"""Every supported layout gives the curve of one process of plain torch; `suite.py` says how."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import oracle  # noqa: E402
import rounding  # noqa: E402
import suite  # noqa: E402
from cells import CELLS, GPT2, LLAMA, Cell  # noqa: E402

from megagpt.config.command_line import parse_config  # noqa: E402

CORE = [cell for cell in CELLS if cell.is_core]
REST = [cell for cell in CELLS if not cell.is_core]


@pytest.fixture(scope="module")
def core():
    return {record["name"]: record for record in suite.run_cells(CORE)}


@pytest.fixture(scope="module")
def rest():
    return {record["name"]: record for record in suite.run_cells(REST)}


@pytest.mark.parametrize("cell", CORE, ids=lambda cell: cell.name)
def test_layout_gives_the_curve_of_one_process(cell, core, request):
    check(cell, core, request)


@pytest.mark.slow
@pytest.mark.parametrize("cell", REST, ids=lambda cell: cell.name)
def test_every_other_layout_gives_the_curve_of_one_process(cell, rest, request):
    check(cell, rest, request)


def check(cell, records, request):
    if "nvme" in cell.layout:
        request.getfixturevalue("async_io")
    record = records[cell.name]
    assert record["ok"], record
    # The settings make clipping bite in some steps of this style, and not in all.
    if record["style"].startswith("gpt2") and "wide" not in record["style"]:
        assert 0 < record["clipped_steps"] < suite.STEPS


def outcome(loss=5.0, norm=1.0, validation=5.0, **weights):
    """A training of two weights; a number in a weight's place moves its first element."""
    values = {"a": np.ones((20, 20)), "b": np.ones(30000)}
    for name, first in weights.items():
        values[name].flat[0] = first
    return [(5.0, 1.0, 10)] * (suite.STEPS - 1) + [(loss, norm, 10)], validation, values


UNIT = rounding.Errors(loss=1e-7, grad_norm=3e-7, weights=(1e-9, 5e-9, 1e-8, 2e-7, 4e-7, 1e-6))
REFERENCE = (outcome(), UNIT)


def compare(training, drifted=()):
    return suite.compare(CELLS[0], (*training, list(drifted)), REFERENCE)


def test_a_run_within_a_few_units_is_equal():
    record = compare(outcome(loss=5 * (1 + 5e-7), norm=1 + 15e-7, validation=5, b=1 + 5e-6))
    assert record["ok"] and record["off"] == []
    units = {"loss": 5, "grad_norm": 5, "weights": 5}
    assert record["units"] == pytest.approx(units, rel=1e-3)


@pytest.mark.parametrize(
    ("training", "off"),
    [
        (outcome(loss=5 * (1 + 7e-7)), ["loss"]),
        (outcome(validation=5 * (1 + 7e-7)), ["loss"]),
        (outcome(norm=1 + 21e-7), ["grad_norm"]),
        (outcome(b=1 + 7e-6), ["weights"]),
        (outcome(loss=float("nan")), ["loss"]),
        (outcome(norm=float("nan")), ["grad_norm"]),
        (outcome(validation=float("nan")), ["loss"]),
        (outcome(a=float("nan")), ["weights"]),
    ],
)
def test_a_run_beyond_them_or_that_is_not_a_number_is_not(training, off):
    record = compare(training)
    assert not record["ok"] and record["off"] == off


def test_many_small_errors_are_seen_though_each_is_below_the_largest():
    training = outcome()
    training[2]["b"] += 2e-8  # far within 6 x 1e-6, beyond 6 x 1e-9 at the median
    assert compare(training)["off"] == ["weights"]


def test_copies_that_drift_apart_are_not_equal():
    record = compare(outcome(), drifted=["a"])
    assert not record["ok"] and record["off"] == []


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_no_unit_raises_a_ceiling(key):
    ceiling = rounding.CEILINGS["fp32"][key]
    off = dataclasses.replace(UNIT, **{key: 2 * ceiling})
    assert rounding.judge(off, dataclasses.replace(UNIT, **{key: ceiling}), precision="fp32")[
        "off"
    ] == [key]


@pytest.mark.parametrize("style", [GPT2, LLAMA])
def test_the_oracle_computes_in_fp64_throughout_and_the_same_in_every_order(style, tmp_path):
    cell = Cell("zero0", style, features=("documents", "dropout"))
    data = suite.prepare_data(tmp_path)
    flags = [*suite.arguments(cell, data, tmp_path), "--training.train_steps", "6"]
    config = suite.with_vocabulary(parse_config(flags)[0])
    truth = oracle.train(config, torch.float64)
    for order in (1, 2, 3):
        off = rounding.errors(oracle.train(config, torch.float64, order=order), truth)
        # A single sum or table in fp32 on the way would show as 1e-8 or more.
        assert max(off.loss, off.grad_norm) < 1e-13 and off.weights[-1] < 1e-12


def test_the_page_of_parity_lists_every_cell_and_the_rule():
    page = (suite.ROOT / "docs/parity.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    listed = {(row[0].removeprefix("| "), row[1], row[2]) for row in rows if len(row) > 2}
    for cell in CELLS:
        style = " ".join([cell.style, *cell.features])
        assert (cell.layout, style, cell.precision) in listed, cell.name
    assert f"k = {rounding.K:g}" in page
