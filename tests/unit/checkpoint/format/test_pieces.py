"""Runs hold the pieces that they were made of, however few they are, and find those of a part."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_slices import reshardings

from megagpt.checkpoint.format.pieces import Piece, Run, TensorRecord
from megagpt.checkpoint.format.slices import Slice, overlaps


@settings(max_examples=200, deadline=None)
@given(reshardings(), st.randoms(use_true_random=False))
def test_pieces_come_back_and_a_part_finds_those_that_it_meets(resharding, random):
    shape, cut, others = resharding
    shards = random.sample(range(len(cut)), len(cut))
    pieces = [Piece(shard, part) for shard, (part, _) in zip(shards, cut, strict=True)]
    record = TensorRecord.of(shape, pieces)
    assert record.is_whole and record.num_pieces == len(pieces)
    assert record.pieces == tuple(sorted(pieces, key=lambda p: (p.shard, p.slice.start)))
    for part, _ in others:
        met = {piece.shard for piece in pieces if overlaps(part, piece.slice)}
        assert met <= {piece.shard for piece in record.meeting(part)}


@pytest.mark.parametrize("ranks", [64, 1024, 4096])
@pytest.mark.parametrize("stride", [1, 8])
def test_equal_cuts_are_two_runs_whatever_the_ranks(ranks, stride):
    rows, columns = 12_288, 4 * 12_288
    size = -(-rows * columns // ranks) + 3  # so that the last one is shorter
    cuts = [*range(0, rows * columns, size), rows * columns]
    parts = (Slice((0, rows), (0, columns), a, b) for a, b in itertools.pairwise(cuts))
    shards = itertools.count(5, stride)
    record = TensorRecord.of((rows, columns), map(Piece, shards, parts))
    (box,) = record.boxes
    last = len(cuts) - 2
    assert box.runs == (
        Run(0, size, last, 5, stride),
        Run(last * size, rows * columns - last * size, 1, 5 + last * stride, 1),
    )
    part = Slice((0, rows), (0, columns), 10 * size + 1, 12 * size + 1)
    assert [piece.shard for piece in record.meeting(part)] == [5 + n * stride for n in (10, 11, 12)]
