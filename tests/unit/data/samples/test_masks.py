"""Boundaries of documents, compiled or not, inputs and labels are those of naive loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.samples.gpt_dataset import PAD
from megagpt.data.samples.masks import IGNORE_INDEX, document_boundaries, tokens_to_batch

quick = settings(max_examples=100, deadline=None, derandomize=True)
tokens_of_few_kinds = st.tuples(st.integers(1, 4), st.integers(1, 12)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(0, 3), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)


def naive_boundaries(rows, eod):
    positions, offsets, passed = [], [], 0
    for row in rows:
        for i, _ in enumerate(row):
            begins = i == 0 or row[i - 1] == eod
            if begins:
                offsets.append(passed)
            positions.append(0 if begins else positions[-1] + 1)
            passed += 1
    return np.reshape(positions, (len(rows), -1)), [*offsets, passed]


@quick
@given(tokens_of_few_kinds, st.booleans())
def test_document_boundaries_are_those_of_a_naive_loop(rows, compiled):
    expected_positions, expected_offsets = naive_boundaries(rows, eod=2)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr("megagpt.data.samples.masks.load_native", lambda: None)
        positions, offsets = document_boundaries(np.array(rows, dtype=np.int64), 2)
    np.testing.assert_array_equal(positions, expected_positions)
    assert offsets.tolist() == expected_offsets
    assert positions.dtype == np.int64 and offsets.dtype == np.int32


@quick
@given(tokens_of_few_kinds.filter(lambda rows: len(rows[0]) > 1), st.sampled_from([None, 2]))
def test_inputs_and_labels_are_those_of_a_naive_loop(rows, masked_after):
    samples = np.array(rows, dtype=np.int64)
    samples[samples == 3] = PAD
    before = samples.copy()
    tokens, labels = tokens_to_batch(samples, masked_after=masked_after)
    np.testing.assert_array_equal(samples, before)
    for b, row in enumerate(samples.tolist()):
        for i, (token, label) in enumerate(zip(row[:-1], row[1:], strict=True)):
            is_left_out = label == PAD or (masked_after is not None and token == masked_after)
            assert tokens[b, i] == (0 if token == PAD else token)
            assert labels[b, i] == (IGNORE_INDEX if is_left_out else label)
