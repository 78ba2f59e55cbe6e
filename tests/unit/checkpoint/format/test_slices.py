"""A slice filled from any partition of the tensor is what numpy's indexing gives."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.checkpoint.format.pieces import Piece, TensorRecord
from megagpt.checkpoint.format.slices import Slice, local_slice, overlaps, whole


def is_partition(shape, parts):
    return TensorRecord.of(shape, map(Piece, itertools.count(), parts)).is_whole


@st.composite
def layouts(draw, shape, tp_sizes):
    """Shards by tensor parallelism, each cut into ranges as ZeRO does: (slice, values) by rank."""
    tp_dim = draw(st.sampled_from([None, 0, 1][: len(shape) + 1]))
    tp_size = 1 if tp_dim is None else draw(tp_sizes)
    local_shape = list(shape)
    if tp_dim is not None:
        local_shape[tp_dim] = -(-shape[tp_dim] // tp_size)
        local_shape[tp_dim] += draw(st.integers(0, 2)) if tp_dim == 0 else 0  # padding
    padded = np.full([tp_size * n if d == tp_dim else n for d, n in enumerate(local_shape)], -1.0)
    padded[tuple(slice(n) for n in shape)] = numbered(shape)
    pieces = []
    for tp_rank in range(tp_size):
        shard = padded if tp_dim is None else np.split(padded, tp_size, tp_dim)[tp_rank]
        cuts = draw(st.lists(st.integers(0, shard.size), max_size=3))
        bounds = [0, *sorted(cuts), shard.size]
        for start, end in zip(bounds, bounds[1:], strict=False):
            part = local_slice(
                shape, tuple(local_shape), tp_dim=tp_dim, tp_rank=tp_rank, start=start, end=end
            )
            held = shard.reshape(-1)[start:end]
            real = held[held >= 0]
            assert (0 if part is None else part.size) == real.size
            if part is not None:
                np.testing.assert_array_equal(held[: part.size], real)  # padding comes last
                pieces.append((part, real))
    return pieces


def numbered(shape):
    return np.arange(math.prod(shape), dtype=np.float64).reshape(shape)


@st.composite
def reshardings(draw):
    # 12 columns or rows are shared by 1, 2, 3 or 4 ranks; rows may be padded to that.
    vector = st.tuples(st.integers(1, 13))
    matrix = st.tuples(st.integers(1, 7), st.sampled_from([1, 12]))
    shape = draw(st.one_of(vector, matrix))
    tp_sizes = st.just(1) if len(shape) == 2 and shape[1] == 1 else st.sampled_from([1, 2, 3, 4])
    return shape, draw(layouts(shape, tp_sizes)), draw(layouts(shape, tp_sizes))


@settings(max_examples=100, deadline=None)
@given(reshardings())
def test_any_slice_is_filled_from_any_partition(case):
    shape, sources, targets = case
    for target, expected in [*targets, (whole(shape), numbered(shape).reshape(-1))]:
        filled, found = np.full(target.size, np.nan), 0
        for source, values in sources:
            for overlap in overlaps(target, source):
                begin, end = overlap.source_span
                assert 0 <= begin < end <= source.size
                found += overlap.size
                if overlap.is_contiguous:
                    at = overlap.target_offset
                    filled[at : at + overlap.size] = values[begin:end]
                else:
                    for band in overlap.bands(2 * source.width):
                        first, last = band.source_span
                        assert last - first <= 2 * source.width
                        band.copy(values[first:last], filled)
        assert found == target.size
        np.testing.assert_array_equal(filled, expected)


@settings(max_examples=50, deadline=None)
@given(reshardings())
def test_partition_holds_each_element_once(case):
    shape, sources, _ = case
    parts = [part for part, _ in sources]
    assert is_partition(shape, parts)
    assert is_partition(shape, reversed(parts))
    for number, part in enumerate(parts):
        others = parts[:number] + parts[number + 1 :]
        assert not is_partition(shape, others)
        assert not is_partition(shape, [*parts, part])
        moved = dataclasses.replace(part, start=part.start + 1, end=part.end + 1)
        assert not is_partition(shape, [*others, moved])


@pytest.mark.parametrize(
    "parts",
    [
        # Eight elements each, as the tensor has.
        [Slice((0, 2), (0, 4), 0, 4), Slice((0, 2), (0, 4), 0, 4)],
        [Slice((0, 1), (0, 4), 0, 4), Slice((0, 2), (0, 2), 0, 4)],
        [Slice((0, 4), (0, 2), 0, 8)],
        [Slice((0, 2), (1, 5), 0, 8)],
        [Slice((1, 3), (0, 4), 0, 8)],
    ],
    ids=["same range", "boxes meet", "too many rows", "too many columns", "rows beyond"],
)
def test_as_many_elements_are_no_partition_when_some_are_twice_or_outside(parts):
    assert sum(part.size for part in parts) == 8
    assert not is_partition((2, 4), parts)


def test_whole_rows_are_one_rectangle():
    part = Slice((0, 1000), (4, 8), 3, 3999)
    assert [(r.num_rows, r.num_columns) for r in part.rectangles()] == [(1, 1), (998, 4), (1, 3)]
    # Where both are whole rows, one read does.
    (only,) = overlaps(whole((1000, 4)), Slice((0, 1000), (0, 4), 400, 800))
    assert only.is_contiguous and only.source_span == (0, 400) and only.target_offset == 400


def test_shard_of_padding_alone_is_none():
    def shard(tp_rank, start, end):
        return local_slice((5, 2), (4, 2), tp_dim=0, tp_rank=tp_rank, start=start, end=end)

    assert shard(1, 0, 8) == Slice((4, 5), (0, 2), 0, 2)
    assert shard(1, 2, 8) is None
    assert shard(2, 0, 8) is None
