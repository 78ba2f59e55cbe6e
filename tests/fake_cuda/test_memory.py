"""The memory of a micro-batch is what `terms.py` says: no term grows, and none shrinks unseen."""

import pytest
import terms
from live_bytes import count

MOST, LEAST = 1.01, 0.95
"""Of a term's figure."""


def wrong_terms(row, mib):
    """Which terms are not as the row says, in words."""
    return [
        f"{row.name}: {kind} is {mib[kind]:,.0f} MiB, the table says {figure:,}; "
        + ("it has grown" if mib[kind] > figure else "lower the table in the same commit")
        for kind, figure in zip(terms.COLUMNS, row.mib, strict=True)
        if not LEAST * figure <= mib[kind] <= MOST * figure
    ]


@pytest.mark.parametrize("row", terms.ROWS, ids=lambda row: row.name.replace(" ", "_"))
def test_memory_is_what_the_table_says(row, on_fake_cuda):
    assert not wrong_terms(row, on_fake_cuda(count, row.job))


def test_the_page_shows_the_table():
    assert terms.table() in terms.PAGE.read_text(), "python tests/fake_cuda/terms.py writes it"


def keep_more(model):
    for block in model.layers.values():
        # Its result is kept for backward: 64 MiB.
        block.register_forward_hook(lambda _m, _i, output: output + output.exp())


def copy_widely(model):
    def copy(module, inputs, output):
        output.double().repeat(4, 1, 1)

    model.layers["0"].register_forward_hook(copy)


def gather_logits(model):
    def gather(module, inputs, losses):
        inputs[0].new_empty(4, 8192, 128256)

    model.lm_head.register_forward_hook(gather)


DAMAGES = {"layers": keep_more, "temporary": copy_widely, "loss": gather_logits}


def count_damaged(kind):
    return count(terms.ROWS[0].job, DAMAGES[kind])


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_term_that_grows_is_seen(kind, on_fake_cuda):
    assert f"{kind} is" in " ".join(wrong_terms(terms.ROWS[0], on_fake_cuda(count_damaged, kind)))


def test_a_term_that_shrinks_is_seen():
    row = terms.ROWS[0]
    mib = dict(zip(terms.COLUMNS, row.mib, strict=True))
    assert not wrong_terms(row, mib)
    (wrong,) = wrong_terms(row, mib | {"loss": 0.94 * mib["loss"]})
    assert "lower the table" in wrong
