"""No key of the DeepSpeed JSON is accepted that nothing proves."""

import keys
import pytest
from cells import KEYS

from megagpt.config.deepspeed_keys import ACCEPTED_KEYS


@pytest.mark.parametrize("path", keys.paths(ACCEPTED_KEYS))
def test_an_accepted_key_has_a_cell_or_stands_in_all(path):
    assert bool(keys.cells_of(path)) != (path in keys.BY_LAYOUT)


def test_cells_set_no_key_that_is_not_accepted():
    accepted = set(keys.paths(ACCEPTED_KEYS))
    assert {path for values in KEYS.values() for path in keys.paths(values)} <= accepted


def test_the_page_shows_the_table():
    assert keys.table() in keys.PAGE.read_text(), "python tests/parity/keys.py writes it"
