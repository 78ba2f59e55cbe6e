"""Which elements of a tensor a rank holds, and where two such ranges meet.

Pure arithmetic on whole numbers and numpy views; knows neither files nor torch.
Next file: `shard_file.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Box = tuple[tuple[int, int], tuple[int, int]]  # rows, columns


@dataclass(frozen=True)
class Slice:
    """Elements [start, end) of a box of a tensor, the box flattened row by row.

    Tensor parallelism cuts a box out of a tensor; ZeRO cuts a range out of the flattened box. A
    vector is a matrix of one column.
    """

    rows: tuple[int, int]
    """First row of the box and one past its last."""
    columns: tuple[int, int]
    """First column and one past the last."""
    start: int
    """First element of the flattened box."""
    end: int
    """One past the last."""

    @property
    def width(self) -> int:
        """Columns of the box."""
        return self.columns[1] - self.columns[0]

    @property
    def size(self) -> int:
        """Elements."""
        return self.end - self.start

    @property
    def is_whole_box(self) -> bool:
        """Whether nothing of the box is left out."""
        return self.size == (self.rows[1] - self.rows[0]) * self.width

    @property
    def row_range(self) -> tuple[int, int]:
        """First row of the tensor that it has elements of, and one past the last."""
        return self.rows[0] + self.start // self.width, self.rows[0] + -(-self.end // self.width)

    def rectangles(self) -> list[_Rectangle]:
        """The slice as at most three rectangles: a part of a row, whole rows, a part of a row."""
        pieces = []
        position = self.start
        while position < self.end:
            row, column = divmod(position, self.width)
            if column or self.end - position < self.width:
                num_rows, num_columns = 1, min(self.width - column, self.end - position)
            else:
                num_rows, num_columns = (self.end - position) // self.width, self.width
            corner = self.rows[0] + row, self.columns[0] + column
            pieces.append(_Rectangle(*corner, num_rows, num_columns, position - self.start))
            position += num_rows * num_columns
        return pieces


class _Rectangle(NamedTuple):
    row: int
    column: int
    num_rows: int
    num_columns: int
    offset: int  # of its first element in the slice


class Overlap(NamedTuple):
    """A rectangle that two slices share; offsets and strides are in elements of each slice."""

    num_rows: int
    num_columns: int
    target_offset: int
    target_stride: int
    source_offset: int
    source_stride: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.num_rows * self.num_columns

    @property
    def source_span(self) -> tuple[int, int]:
        """The range of the source that holds it, from its first element to one past its last."""
        length = (self.num_rows - 1) * self.source_stride + self.num_columns
        return self.source_offset, self.source_offset + length

    @property
    def is_contiguous(self) -> bool:
        """Whether it is one range in both."""
        return self.num_rows == 1

    def bands(self, max_elements: int) -> Iterator[Overlap]:
        """Its rows in bands, whose spans are at most so long, or one row."""
        num_rows = max(1, max_elements // self.source_stride)
        for row in range(0, self.num_rows, num_rows):
            yield self._replace(
                num_rows=min(num_rows, self.num_rows - row),
                target_offset=self.target_offset + row * self.target_stride,
                source_offset=self.source_offset + row * self.source_stride,
            )

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies it.

        Args:
            source: [elements of source_span].
            target: [elements of the target slice].
        """
        shape = (self.num_rows, self.num_columns)
        to = np.lib.stride_tricks.as_strided(
            target[self.target_offset :],
            shape,
            (self.target_stride * target.itemsize, target.itemsize),
        )
        to[:] = np.lib.stride_tricks.as_strided(
            source, shape, (self.source_stride * source.itemsize, source.itemsize)
        )


def overlaps(target: Slice, source: Slice) -> list[Overlap]:
    """What two slices of one tensor share, as rectangles."""
    if not boxes_meet((target.rows, target.columns), (source.rows, source.columns)):
        return []
    shared = []
    for a in target.rectangles():
        for b in source.rectangles():
            row, column = max(a.row, b.row), max(a.column, b.column)
            num_rows = min(a.row + a.num_rows, b.row + b.num_rows) - row
            num_columns = min(a.column + a.num_columns, b.column + b.num_columns) - column
            if num_rows <= 0 or num_columns <= 0:
                continue
            if num_columns == target.width == source.width:
                num_rows, num_columns = 1, num_rows * num_columns  # one range in both
            shared.append(
                Overlap(
                    num_rows,
                    num_columns,
                    a.offset + (row - a.row) * target.width + column - a.column,
                    target.width,
                    b.offset + (row - b.row) * source.width + column - b.column,
                    source.width,
                )
            )
    return shared


def whole(shape: tuple[int, ...]) -> Slice:
    """The slice that is a whole tensor of one or two dims."""
    num_rows, num_columns = _matrix(shape)
    return Slice((0, num_rows), (0, num_columns), 0, num_rows * num_columns)


def boxes_meet(first: Box, second: Box) -> bool:
    """Whether two boxes, (rows, columns), share elements."""
    return all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in zip(first, second, strict=True))


def local_slice(
    shape: tuple[int, ...],
    local_shape: tuple[int, ...],
    *,
    tp_dim: int | None,
    tp_rank: int,
    start: int,
    end: int,
) -> Slice | None:
    """The slice that a range of a tensor-parallel shard is, without what pads the tensor.

    Args:
        shape: Of the whole tensor, without the padding of the vocabulary.
        local_shape: Of the shard, which may reach beyond the tensor's last row.
        tp_dim: The dim that is split; None where the shard is the whole.
        tp_rank: Which shard.
        start: First element of the flattened shard.
        end: One past the last.

    Returns:
        None if all of the range is padding.
    """
    num_rows, num_columns = _matrix(local_shape)
    row = tp_rank * num_rows if tp_dim == 0 else 0
    column = tp_rank * num_columns if tp_dim == 1 else 0
    real_rows = max(0, min(num_rows, _matrix(shape)[0] - row))
    end = min(end, real_rows * num_columns)
    if start >= end:
        return None
    return Slice((row, row + real_rows), (column, column + num_columns), start, end)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    assert 1 <= len(shape) <= 2, shape
    return (shape[0], shape[1] if len(shape) == 2 else 1)
