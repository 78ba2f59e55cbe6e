"""Every supported layout gives the curve of one process of plain torch; `suite.py` says how."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import suite  # noqa: E402
from cells import CELLS, TOLERANCES  # noqa: E402

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


def test_a_run_that_is_not_a_number_or_drifts_anywhere_is_not_equal():
    cell = CELLS[0]
    good = [(5.0, 1.0, 10)] * suite.STEPS
    weights = {"a": np.ones((2, 2)), "b": np.ones(3)}
    reference = (good, 5.0, weights)
    assert suite.compare(cell, (good, 5.0, weights, []), reference)["ok"]
    assert not suite.compare(cell, (good, 5.0, weights, ["a"]), reference)["ok"]
    nan = float("nan")
    for curve, validation, changed in (
        ([*good[:-1], (nan, 1.0, 10)], 5.0, weights),
        ([*good[:-1], (5.0, nan, 10)], 5.0, weights),
        (good, nan, weights),
        (good, 5.0, weights | {"b": np.array([1.0, nan, 1.0])}),
        (good, 5.0, weights | {"a": np.ones((2, 2)) * 1.1}),
    ):
        assert not suite.compare(cell, (curve, validation, changed, []), reference)["ok"]


def test_the_page_of_parity_lists_every_cell_with_its_tolerance():
    page = (suite.ROOT / "docs/parity.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    listed = {(row[0].removeprefix("| "), row[1], row[2]) for row in rows}
    for cell in CELLS:
        style = " ".join([cell.style, *cell.features])
        assert (cell.layout, style, cell.precision) in listed, cell.name
    assert f"({TOLERANCES['fp32']['loss']:.0e})" in page
