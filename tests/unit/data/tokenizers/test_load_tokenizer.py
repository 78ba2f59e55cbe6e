"""A path stands for a tokenizer, or the error says what to give."""

import pytest

from megagpt.data.tokenizers.load import load_tokenizer, tokenizer_sha256


def test_the_path_decides_and_the_hash_is_the_tokenizers_own(model):
    for path, kind in (("byte", "byte"), (model, "sentencepiece")):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.kind, tokenizer.path) == (kind, str(path))
        assert tokenizer.sha256 == tokenizer_sha256(path)


def test_missing_and_broken_models_are_refused(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="no tokenizer at .*missing.model"):
        load_tokenizer(tmp_path / "missing.model")
    with pytest.raises(ValueError, match="bad.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(ValueError, match="no tokenizer at .*missing.model"):
        tokenizer_sha256(tmp_path / "missing.model")
