"""Models are trained alike from one text, compress it, and training says what is wrong."""

import pytest
from tokenizer_text import TEXT

from megagpt.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece


def test_model_has_the_vocabulary_asked_for_and_compresses(model):
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.vocab_size == 500
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2


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
