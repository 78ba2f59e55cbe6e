"""Tokenizers give text back exactly and keep control symbols out of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_text import TEXT

from megagpt.data.tokenizers.load import load_tokenizer


@pytest.fixture(scope="module", params=["byte", "sentencepiece"])
def tokenizer(request, model):
    return load_tokenizer("byte" if request.param == "byte" else model)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=40)
    | st.text(alphabet=" \n\r\t\0\u2581\u00a0\ufeffab<eod>/s\u0301漢😀", max_size=30)
)
def test_every_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("text", ["<eod>", "</s>", "<unk>", "<0x0A>", "a<eod>b", TEXT])
def test_text_that_looks_like_a_symbol_stays_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == text


def test_end_of_document_decodes_to_nothing(tokenizer):
    ids = tokenizer.encode("to be")
    assert tokenizer.decode([*ids, tokenizer.eod]) == "to be"


@pytest.mark.parametrize("token", [-1, 10**6])
def test_token_outside_the_vocabulary_is_refused(tokenizer, token):
    with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary"):
        tokenizer.decode([token])
