"""A small SentencePiece model."""

import pytest
from tokenizer_text import TEXT

from megagpt.data.tokenizers.sentencepiece import train_sentencepiece


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(iter([TEXT]), path, vocab_size=500)
    return path
