"""Breaks one invariant of the trainer at a time and shows that the parity suite sees each.

Works on copies in a temporary folder. The unbroken copy must pass first, and gives the oracle's
curves. A mutation is killed if its line was executed and every cell named for it trains to the end
with finite numbers out of the rule; a crash or a hang is no proof.
Next files: `mutations.py`, the table; `measure.py`, what runs in a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("megagpt", "tools", "launch", "tests/parity", "LICENSE")
"""What the suite needs below its root."""
MIN_MUTATIONS = 12
UNBROKEN_LIMIT_SECONDS = 1200
LIMIT_SECONDS = 600
"""Ten times what a mutation takes on a quiet machine, so that load is not taken for a hang."""
_FIGURES = {"loss": "max_loss_rel", "grad_norm": "max_grad_norm_rel", "weights": "max_weight_abs"}


@dataclass(frozen=True)
class Result:
    """What a mutation did."""

    mutation: Mutation
    records: list[dict]
    """Of its cells, from `suite.compare`; empty after a crash."""
    reached: bool
    """Whether the mutated line left a mark."""
    failure: str = ""
    """Why there are no records."""

    @property
    def killed_by(self) -> list[str]:
        """Cells that caught it: numbers out of the rule, all of them finite."""
        return [r["name"] for r in self.records if differs(r) and r["is_finite"] and self.reached]

    @property
    def ok(self) -> bool:
        """Whether every cell named for it caught it."""
        return set(self.killed_by) == set(self.mutation.cells)

    def largest(self, measure: str) -> float | None:
        """The largest difference over the cells; None where there is no number."""
        if not self.records or not all(r["is_finite"] for r in self.records):
            return None
        return max(r[measure] for r in self.records)

    def difference(self, key: str) -> str:
        """The largest difference in loss, gradient norm or weights, with what is allowed."""
        value = self.largest(_FIGURES[key])
        if value is None:
            return "-"
        allowed = self.records[0]["allowed"][key]
        return f"{value:.1e} ({allowed[-1] if key == 'weights' else allowed:.0e})"

    def to_json(self) -> dict:
        """The record in the JSON file."""
        return {
            "mutation": self.mutation.name,
            "invariant": self.mutation.invariant,
            "file": f"megagpt/{self.mutation.file}",
            "killed_by": self.killed_by,
            **{measure: self.largest(measure) for measure in _FIGURES.values()},
            "reached": self.reached,
            "ok": self.ok,
        }

    def outcome(self) -> str:
        """The cells that killed it, or why it counts as alive."""
        if self.ok:
            return ", ".join(self.killed_by)
        if self.failure:
            return f"no: {self.failure}"
        if not self.reached:
            return "no: line not reached"
        if not all(r["is_finite"] for r in self.records):
            return "no: not a number"
        alive = [name for name in self.mutation.cells if name not in self.killed_by]
        return f"no: survives {', '.join(alive)}"


def differs(record: dict) -> bool:
    """Whether a number is out of the rule; copies that drift apart are no such number."""
    return bool(record["off"])


def copy_tree(source: Path, target: Path) -> Path:
    """Copies what the suite needs."""
    for name in COPIED:
        origin, copy = source / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, copy)
    return target


def mutated_text(mutation: Mutation, tree: Path) -> str:
    """The mutated file's text.

    Raises:
        ValueError: If the file does not hold the old text exactly once.
    """
    text = (tree / "megagpt" / mutation.file).read_text()
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(
            f"mutation '{mutation.name}': megagpt/{mutation.file} holds its old text {count} "
            "times and must hold it once; adapt tests/mutation/mutations.py"
        )
    return text.replace(mutation.old, mutation.new)


def run_in_tree(
    tree: Path, cells: list[str], *, references: Path, output: Path, limit_seconds: float, **flags
) -> list[dict]:
    """Runs `measure.py` in a tree and returns its records.

    Raises:
        RuntimeError: If it crashed or was not done in time.
    """
    output.mkdir()
    command = [sys.executable, "-B", str(Path(__file__).with_name("measure.py"))]
    command += ["--tree", str(tree), "--references", str(references), "--output", str(output)]
    command += [f"--{flag}" for flag, given in flags.items() if given]
    log = output / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *cells],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=output,
            start_new_session=True,
            env={
                **os.environ,
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                # Before the installed package; spawned ranks inherit the path.
                "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests/parity")]),
            },
        )
        try:
            code = process.wait(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"hang, no end in {limit_seconds:.0f} s") from None
        finally:
            end_group(process)
    if code != 0:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        raise RuntimeError(f"crash, {lines[-1].strip() if lines else f'exit {code}'}")
    return json.loads((output / "records.json").read_text())


def end_group(process: subprocess.Popen) -> None:
    """Kills what is left of a process and its descendants."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_mutation(mutation: Mutation, unbroken: Path, *, references: Path, folder: Path) -> Result:
    """Breaks a copy and measures its cells."""
    tree = copy_tree(unbroken, folder / "tree")
    (tree / "megagpt" / mutation.file).write_text(mutated_text(mutation, tree))
    records, failure = [], ""
    try:
        records = run_in_tree(
            tree,
            list(mutation.cells),
            references=references,
            output=folder / "output",
            limit_seconds=LIMIT_SECONDS,
        )
    except RuntimeError as error:
        failure = str(error)
    marks = folder / "output/marks"
    reached = marks.is_dir() and any(marks.iterdir())
    return Result(mutation, records, reached, failure)


def markdown(results: list[Result]) -> str:
    """The table; the tolerance stands beside each difference."""
    lines = [
        "| mutation | invariant | killed by | loss, relative | gradient norm, relative "
        "| weights, absolute |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        differences = [result.difference(key) for key in _FIGURES]
        mutation = result.mutation
        columns = [mutation.name, mutation.invariant, result.outcome(), *differences]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def run_all(mutations: list[Mutation], folder: Path) -> list[Result] | None:
    """Runs the unbroken copy, then each mutation; None if the unbroken copy fails.

    Raises:
        RuntimeError: If the unbroken copy crashes.
        ValueError: If a mutation does not fit the code.
    """
    unbroken = copy_tree(ROOT, folder / "unbroken")
    for mutation in mutations:
        mutated_text(mutation, unbroken)  # before minutes are spent
    references = folder / "references"
    references.mkdir()
    begin = time.monotonic()
    records = run_in_tree(
        unbroken,
        sorted({cell for mutation in mutations for cell in mutation.cells}),
        references=references,
        output=folder / "output",
        limit_seconds=UNBROKEN_LIMIT_SECONDS,
        make_references=True,
    )
    failed = [record["name"] for record in records if not record["ok"]]
    passed = len(records) - len(failed)
    report(f"unbroken: {passed} of {len(records)} cells equal the oracle", begin)
    if failed:
        report(f"not equal: {', '.join(failed)}")
        return None
    results = []
    for mutation in mutations:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(dir=folder) as own:
            result = run_mutation(mutation, unbroken, references=references, folder=Path(own))
        report(f"{mutation.name}: {result.outcome()}", begin)
        results.append(result)
    return results


def report(text: str, begin: float | None = None) -> None:
    """Progress, beside the table."""
    seconds = "" if begin is None else f", {time.monotonic() - begin:.0f} s"
    print(f"{text}{seconds}", file=sys.stderr, flush=True)


def main() -> int:
    """Runs the mutations; 0 if the suite sees every one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", metavar="TEXT", help="mutations whose name holds this")
    options = parser.parse_args()
    mutations = [m for m in MUTATIONS if not options.only or options.only in m.name]
    if not mutations:
        parser.error(f"no mutation's name holds '{options.only}'")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        try:
            results = run_all(mutations, Path(directory).resolve())
        except (RuntimeError, ValueError) as error:
            report(f"error: {error}")
            return 1
    if results is None:
        return 1
    print(markdown(results))
    killed = sum(result.ok for result in results)
    print(f"\n{killed} of {len(results)} mutations killed, {time.monotonic() - begin:.0f} s")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([r.to_json() for r in results], indent=1) + "\n")
    enough = options.only is not None or len(results) >= MIN_MUTATIONS
    return 0 if enough and killed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
