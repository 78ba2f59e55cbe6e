"""Trains parity cells in the tree that PYTHONPATH names and compares them with stored references.

A process of its own for each tree, so that no module of another tree is loaded; `mutate.py` starts
it. The references come from the unbroken tree alone: the oracle shares the model's code with the
trainer, and a mutation would change both.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import suite
from cells import CELLS, Cell

import megagpt
from megagpt.testing.distributed import run_distributed

TIMEOUT_SECONDS = 1200
"""`mutate.py` ends the process before; a busy machine takes minutes for all cells."""


def require_tree(tree: Path) -> None:
    """Makes sure that the code is the tree's, not that of the installed package."""
    for module in (megagpt, suite):
        if not Path(module.__file__).is_relative_to(tree):
            raise RuntimeError(f"{module.__name__} comes from {module.__file__}, not from {tree}")


def leave_mark(folder: Path, rank: int, value: Any = None) -> Any:
    """Notes that a mutated line ran on this rank; returns the value."""
    (folder / f"rank_{rank}").touch()
    return value


def oracle_of_tree(rank: int, world_size: int, *arguments: Any, tree: Path) -> dict:
    """`suite.oracle_references`, surely of the tree."""
    require_tree(tree)
    return suite.oracle_references(rank, world_size, *arguments)


def train_in_tree(
    rank: int, world_size: int, tree: Path, marks: Path, *arguments: Any
) -> list[tuple]:
    """`suite.train_cells`, surely of the tree, where mutated lines find `mark`."""
    require_tree(tree)
    builtins.mark = functools.partial(leave_mark, marks, rank)
    return suite.train_cells(rank, world_size, *arguments)


def make_references(cells: list[Cell], tree: Path, folder: Path) -> None:
    """Writes the data and what the cells are compared with into the folder."""
    data = suite.prepare_data(folder)
    references = suite.make_references(
        cells,
        data,
        folder,
        function=functools.partial(oracle_of_tree, tree=tree),
        timeout_seconds=TIMEOUT_SECONDS,
    )
    (folder / "references.pickle").write_bytes(pickle.dumps((data, references)))


def measure(cells: list[Cell], tree: Path, folder: Path, output: Path) -> list[dict]:
    """Trains the cells; their records, as `suite.compare` makes them, and whether all is finite.

    Args:
        cells: To train.
        tree: Where the code must come from.
        folder: With the references.
        output: Empty folder for runs and marks.
    """
    data, references = pickle.loads((folder / "references.pickle").read_bytes())
    marks = output / "marks"
    marks.mkdir()
    records = []
    for world_size in sorted({cell.world_size for cell in cells}):
        chosen = [cell for cell in cells if cell.world_size == world_size]
        outcomes = run_distributed(
            train_in_tree,
            world_size,
            *(tree, marks, chosen, data, output),
            timeout_seconds=TIMEOUT_SECONDS,
        )[0]
        for cell, outcome in zip(chosen, outcomes, strict=True):
            record = suite.compare(cell, outcome, references[cell.reference])
            records.append(record | {"is_finite": is_finite(outcome)})
    return records


def is_finite(outcome: tuple) -> bool:
    """Whether every loss, norm and weight of a cell is a number."""
    curve, validation, weights, _ = outcome
    scalars = [validation, *(value for step in curve for value in step)]
    return all(map(math.isfinite, scalars)) and all(np.isfinite(w).all() for w in weights.values())


def main() -> int:
    """Writes OUTPUT/records.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--references", type=Path, required=True, help="folder")
    parser.add_argument("--output", type=Path, required=True, help="empty folder")
    parser.add_argument("--make_references", action="store_true")
    parser.add_argument("names", nargs="+", help="cells")
    options = parser.parse_args()
    require_tree(options.tree)
    unknown = set(options.names) - {cell.name for cell in CELLS}
    if unknown:
        raise ValueError(f"no cells of tests/parity/cells.py: {', '.join(sorted(unknown))}")
    cells = [cell for cell in CELLS if cell.name in options.names]
    if options.make_references:
        make_references(cells, options.tree, options.references)
    records = measure(cells, options.tree, options.references, options.output)
    (options.output / "records.json").write_text(json.dumps(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
