"""Which part of a tensor is in the files of which shard, in runs instead of one by one.

ZeRO cuts a tensor into as many pieces as there are ranks, nearly all of one size and on one rank
after the other: a run, whatever their number. Knows no files. Next file: `manifest.py`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np

from megagpt.checkpoint.format.slices import Slice, boxes_meet, whole

ROWS = ("tensor", "row", "end_row", "column", "end_column", "start", "end", "shard")
"""What the rows of a table of pieces are, one piece a column; `tensor` is an index of shapes."""


@dataclass(frozen=True)
class Piece:
    """A part of a tensor in the files of one shard."""

    shard: int
    """The rank that wrote it, and the number in the names of its files."""
    slice: Slice
    """Which part."""


class Run(NamedTuple):
    """Pieces of equal size, each beginning where the one before ends."""

    start: int
    """First element of the first, in the flattened box."""
    size: int
    """Elements of each."""
    num_pieces: int
    """Of them."""
    shard: int
    """Of the first."""
    step: int
    """From the shard of one to that of the next."""

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + self.size * self.num_pieces


@dataclass(frozen=True)
class Box:
    """A box of a tensor, as tensor parallelism cuts it out, and the pieces that make it up."""

    rows: tuple[int, int]
    """First row and one past the last."""
    columns: tuple[int, int]
    """First column and one past the last."""
    runs: tuple[Run, ...]
    """By their start."""

    @property
    def size(self) -> int:
        """Elements."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    @property
    def is_whole(self) -> bool:
        """Whether the pieces hold each element of the box once."""
        position = 0
        for run in self.runs:
            if run.start != position or run.size < 1 or run.num_pieces < 1:
                return False
            position = run.end
        return position == self.size

    def pieces(self, begin: int = 0, end: int | None = None) -> Iterator[Piece]:
        """Those that have elements from begin to end."""
        end = self.size if end is None else end
        for run in self.runs[max(0, bisect_right(self._starts, begin) - 1) :]:
            if run.start >= end:
                return
            first = max(0, (begin - run.start) // run.size)
            for number in range(first, min(run.num_pieces, -(-(end - run.start) // run.size))):
                start = run.start + number * run.size
                part = Slice(self.rows, self.columns, start, start + run.size)
                yield Piece(run.shard + number * run.step, part)

    @cached_property
    def _starts(self) -> list[int]:
        return [run.start for run in self.runs]


@dataclass(frozen=True)
class TensorRecord:
    """A parameter: the same pieces for its weight and its moments."""

    shape: tuple[int, ...]
    """Of the whole tensor, without the padding of the vocabulary."""
    boxes: tuple[Box, ...]
    """Together they are the tensor, each element once."""

    @staticmethod
    def of(shape: tuple[int, ...], pieces: Iterable[Piece]) -> TensorRecord:
        """The record of single pieces, in any order."""
        rows = [(0, *p.slice.rows, *p.slice.columns, p.slice.start, p.slice.end, p.shard)
                for p in pieces]  # fmt: skip
        table = np.array(rows, dtype=np.int64).reshape(-1, len(ROWS))
        return records_of([shape], table.T)[0]

    @property
    def num_elements(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape)

    @property
    def num_pieces(self) -> int:
        """In the files of all shards."""
        return sum(run.num_pieces for box in self.boxes for run in box.runs)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All of them, in the order of the shards; for few ranks."""
        every = (piece for box in self.boxes for piece in box.pieces())
        return tuple(sorted(every, key=lambda piece: (piece.shard, piece.slice.start)))

    @property
    def is_whole(self) -> bool:
        """Whether the pieces lie within the tensor and hold each of its elements once."""
        tensor = whole(self.shape)
        for box in self.boxes:
            if not (0 <= box.rows[0] < box.rows[1] <= tensor.rows[1]):
                return False
            if not (0 <= box.columns[0] < box.columns[1] <= tensor.columns[1]):
                return False
        return (
            all(box.is_whole for box in self.boxes)
            and sum(box.size for box in self.boxes) == tensor.size
            and not any(_meet(a, b) for a, b in combinations(self.boxes, 2))
        )

    def meeting(self, part: Slice) -> Iterator[Piece]:
        """The pieces that may share elements with a part; found without a look at the others."""
        rows = part.row_range
        for box in self.boxes:
            if not boxes_meet((part.rows, part.columns), (box.rows, box.columns)):
                continue
            if (box.rows, box.columns) == (part.rows, part.columns):
                yield from box.pieces(part.start, part.end)
                continue
            width = box.columns[1] - box.columns[0]
            begin, end = (min(max(row, box.rows[0]), box.rows[1]) - box.rows[0] for row in rows)
            yield from box.pieces(begin * width, end * width)


def _meet(a: Box, b: Box) -> bool:
    return boxes_meet((a.rows, a.columns), (b.rows, b.columns))


def _equal_to_the_one_before(table: np.ndarray, rows: range) -> np.ndarray:
    """[pieces - 1]; column by column, for each row stands together in memory."""
    equal = np.ones(table.shape[1] - 1, dtype=bool)
    for row in rows:
        equal &= table[row, 1:] == table[row, :-1]
    return equal


def records_of(shapes: Sequence[tuple[int, ...]], table: np.ndarray) -> list[TensorRecord]:
    """The records of many pieces of many tensors.

    Args:
        shapes: Of the tensors.
        table: [8, pieces], int64; see ROWS. The pieces stand in any order.
    """
    boxes: list[list[Box]] = [[] for _ in shapes]
    if table.shape[1]:
        in_box = _equal_to_the_one_before(table, range(5))
        follows = in_box & (table[5, 1:] >= table[5, :-1])
        if not (follows | (table[0, 1:] > table[0, :-1])).all():
            # Not by tensor, box and start, as ZeRO-3 brings them without tensor parallelism.
            table = table[:, np.lexsort(table[[5, 4, 3, 2, 1, 0]])]
            in_box = _equal_to_the_one_before(table, range(5))
        start, end, shard = table[5:]
        size, step = end - start, np.diff(shard, prepend=shard[0])
        begins_box = np.append(True, ~in_box)
        begins = begins_box.copy()
        begins[1:] |= (size[1:] != size[:-1]) | (start[1:] != end[:-1]) | (step[1:] < 1)
        # Within a run the second piece sets the step.
        changes = ~begins[1:] & ~begins[:-1] & (step[1:] != step[:-1])
        begins[1:] |= changes
        first = np.flatnonzero(begins)
        counts = np.diff(first, append=len(start))
        steps = np.where(counts > 1, step[np.minimum(first + 1, len(start) - 1)], 1)
        runs = np.stack([start[first], size[first], counts, shard[first], steps], axis=1).tolist()
        of_box = np.flatnonzero(begins_box[first])
        for begin, stop in zip(of_box, [*of_box[1:], len(first)], strict=True):
            tensor, row, end_row, column, end_column = table[:5, first[begin]].tolist()
            own = tuple(Run(*run) for run in runs[begin:stop])
            boxes[tensor].append(Box((row, end_row), (column, end_column), own))
    return [TensorRecord(shape, tuple(own)) for shape, own in zip(shapes, boxes, strict=True)]
