"""The baselines against their definitions."""

import bz2
import gzip
import math
from collections import Counter

import pytest

from megagpt.inference.compression import baselines, order2_bits_per_byte


def reference_order2(train, test):
    """Witten-Bell written out with dictionaries."""
    counts: dict[bytes, Counter] = {}
    for document in train:
        padded = b"\n\n" + document
        for i in range(2, len(padded)):
            for context in (padded[i - 2 : i], padded[i - 1 : i], b""):
                counts.setdefault(context, Counter())[padded[i]] += 1
    padded = b"\n\n" + test
    bits = 0.0
    for i in range(2, len(padded)):
        probability = 1 / 256
        for context in (b"", padded[i - 1 : i], padded[i - 2 : i]):
            if seen := counts.get(context):
                total, distinct = sum(seen.values()), len(seen)
                probability = (seen[padded[i]] + distinct * probability) / (total + distinct)
        bits -= math.log2(probability)
    return bits / len(test)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ([b"abracadabra", b"alakazam"], b"abra kadabra"),
        ([b"to be or not to be"], b"\x00\xff never seen \xf0"),
        ([b"a"], b"a"),
    ],
)
def test_order2_equals_the_written_out_model(train, test):
    expected = reference_order2(train, test)
    assert order2_bits_per_byte(train, test) == pytest.approx(expected, rel=1e-12)


def test_baselines_are_bits_per_byte_of_utf8():
    test = "Ça ira, ça ira! " * 30
    size = len(test.encode())
    result = baselines([test], test)
    assert result["gzip_bits_per_byte"] == 8 * len(gzip.compress(test.encode(), 9)) / size
    assert result["bzip2_bits_per_byte"] == 8 * len(bz2.compress(test.encode(), 9)) / size
    assert 0 < result["order2_bits_per_byte"] < 1
    with pytest.raises(ValueError, match="holds none"):
        baselines([""], test)
