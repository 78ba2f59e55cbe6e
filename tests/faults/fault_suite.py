"""Does faults to real runs and compares what happens with what is promised.

`make faults` runs all rows, writes build/faults.json and makes the table of docs/faults.md; the
slow tests run the same rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from bench import Bench, Findings
from rows import ROWS, Row

from megagpt.testing.report import markdown_table, replace_table, write_records


def run_row(row: Row, bench: Bench) -> dict:
    """Tries one row.

    Returns:
        The record, as in build/faults.json; of a row that cannot be tried here, `left_out` says
        why, and `ok` is None, or False where `CI` is set.
    """
    record = {"row": row.number, "name": row.name, "fault": row.fault, "promise": row.promise}
    problem = row.problem()
    if problem is not None:
        ok = False if os.environ.get("CI") else None
        return record | {"measured": "", "ok": ok, "problems": [], "left_out": problem}
    findings = Findings()
    begin = time.monotonic()
    try:
        measured = row.function(bench, findings)
    except Exception:  # a row that breaks is one that fails; the others are tried
        measured = ""
        findings.problems.append(traceback.format_exc())
    return record | {
        "measured": measured,
        "ok": not findings.problems,
        "problems": findings.problems,
        "tried": findings.tried,
        "seconds": round(time.monotonic() - begin, 1),
    }


def markdown(records: list[dict]) -> str:
    """The generated part of docs/faults.md."""
    columns = ["row", "fault", "promise", "measured"]
    return markdown_table(columns, ([str(r[column]) for column in columns] for r in records))


def main() -> int:
    """Runs the suite, or the rows whose names are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--docs", type=Path, help="page whose generated table is replaced")
    parser.add_argument("--rows", help="only rows whose name holds this")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.rows or options.rows in row.name]
    begin = time.monotonic()
    records = []
    with tempfile.TemporaryDirectory(prefix="megagpt_faults_") as directory:
        bench = Bench(Path(directory))
        for row in rows:
            record = run_row(row, bench)
            records.append(record)
            word = {True: "ok  ", False: "FAIL", None: "LEFT OUT"}[record["ok"]]
            detail = record.get("left_out") or record["measured"]
            print(f"{word} {row.name:36} {record.get('seconds', 0):6.1f} s  {detail}", flush=True)
            for problem in record["problems"][:10]:
                print(f"     {problem}", flush=True)
    failed = [record for record in records if record["ok"] is False]
    left_out = [record for record in records if "left_out" in record]
    print(
        f"{sum(record['ok'] is True for record in records)} of {len(records)} rows keep their "
        f"promise, {len(left_out)} left out, {time.monotonic() - begin:.0f} s"
    )
    write_records(options.json, records)
    if options.docs and not failed and not left_out and not options.rows:
        replace_table(options.docs, "rows", markdown(records))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
