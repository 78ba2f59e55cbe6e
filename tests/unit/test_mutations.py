"""What `make mutation` changes stands in the package, each text once; it runs by hand, and late."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/mutation"))

from mutations import MUTATIONS  # noqa: E402


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_of_a_mutation_stands_there_once(mutation):
    assert (ROOT / "megagpt" / mutation.file).read_text().count(mutation.old) == 1
