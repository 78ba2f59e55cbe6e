"""Tokenizers give text back exactly, keep control symbols out of it and explain what is wrong."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.tokenizers.tokenizer import load_tokenizer, tokenizer_sha256, train_sentencepiece

ROOT = Path(__file__).resolve().parents[4]
TEXT = (ROOT / "megagpt/data/tokenizers/tokenizer.py").read_text() * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(iter([TEXT]), path, vocab_size=500)
    return path


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


def test_model_compresses_and_identifies_itself(model):
    tokenizer = load_tokenizer(model)
    assert tokenizer.vocab_size == 500
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
    assert tokenizer.sha256 == tokenizer_sha256(model)
    assert tokenizer_sha256("byte") == load_tokenizer("byte").sha256


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_same_text_gives_the_same_model(tmp_path, model_type):
    for name in ("one", "two"):
        train_sentencepiece(
            iter([TEXT]), tmp_path / f"{name}.model", vocab_size=400, model_type=model_type
        )
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([TEXT], 1_000_000, "vocab_size=1000000 is too large for this text.*choose at most"),
        ([TEXT], 100, "vocab_size=100 is smaller than.*choose at least"),
        (["\n \n", ""], 400, "holds no text"),
    ],
)
def test_training_errors_are_one_line_and_write_nothing(tmp_path, texts, vocab_size, message):
    with pytest.raises(ValueError, match=message) as caught:
        train_sentencepiece(iter(texts), tmp_path / "a.model", vocab_size=vocab_size)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_broken_models_are_refused(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="no tokenizer at .*missing.model"):
        load_tokenizer(tmp_path / "missing.model")
    with pytest.raises(ValueError, match="bad.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
