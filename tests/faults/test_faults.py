"""Each row of the fault matrix keeps its promise; `fault_suite.py` says how."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bench import Bench  # noqa: E402
from fault_suite import run_row  # noqa: E402
from ranks import ROOT  # noqa: E402
from rows import ROWS  # noqa: E402


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_keeps_its_promise(row, bench):
    problem = row.problem()
    if problem is not None and os.environ.get("CI"):
        pytest.fail(problem)
    if problem is not None:
        pytest.skip(problem)
    record = run_row(row, bench)
    assert record["ok"], "\n".join(record["problems"])


@pytest.mark.slow
def test_the_page_of_faults_lists_every_row():
    page = (ROOT / "docs/faults.md").read_text()
    for row in ROWS:
        assert f"| {row.number} | {row.fault} | {row.promise} | " in page, row.name
