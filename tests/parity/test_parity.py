"""Every supported layout gives the curve of one process of plain torch; `suite.py` says how."""

import sys
from pathlib import Path

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
def test_layout_gives_the_curve_of_one_process(cell, core):
    check(cell, core)


@pytest.mark.slow
@pytest.mark.parametrize("cell", REST, ids=lambda cell: cell.name)
def test_every_other_layout_gives_the_curve_of_one_process(cell, rest):
    check(cell, rest)


def check(cell, records):
    left_out, reason = suite.without_op([cell])
    if left_out:
        pytest.skip(reason)
    record = records[cell.name]
    assert record["ok"], record
    # The settings make clipping bite in some steps of this style, and not in all.
    if record["style"].startswith("gpt2") and "wide" not in record["style"]:
        assert 0 < record["clipped_steps"] < suite.STEPS


def test_the_page_of_parity_lists_every_cell_with_its_tolerance():
    page = (suite.ROOT / "docs/parity.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    listed = {(row[0].removeprefix("| "), row[1], row[2]) for row in rows}
    for cell in CELLS:
        style = " ".join([cell.style, *cell.features])
        assert (cell.layout, style, cell.precision) in listed, cell.name
    assert f"({TOLERANCES['fp32']['loss']:.0e})" in page
