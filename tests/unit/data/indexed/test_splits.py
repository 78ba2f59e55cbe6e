"""Shares become contiguous ranges of documents, or are refused."""

import pytest

from megagpt.data.indexed.splits import split_bounds


@pytest.mark.parametrize(
    ("split", "count", "bounds"),
    [
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("969,30,1", 10, [(0, 10), (10, 10), (10, 10)]),
        ("8,1,1", 10, [(0, 8), (8, 9), (9, 10)]),
        ("1", 3, [(0, 3), (3, 3), (3, 3)]),
        ("0.5,0.5", 4, [(0, 2), (2, 4), (4, 4)]),
        ("0,0,1", 4, [(0, 0), (0, 0), (0, 4)]),
    ],
)
def test_split_by_documents(split, count, bounds):
    assert split_bounds(split, count) == bounds


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf,1"])
def test_split_that_is_no_shares_is_refused(split):
    with pytest.raises(ValueError, match="must be up to three shares"):
        split_bounds(split, 10)
