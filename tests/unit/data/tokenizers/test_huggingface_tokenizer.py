"""tokenizer.json: the library's ids, special tokens kept out of text, and clear refusals."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.preprocessing.preprocess import preprocess
from megagpt.data.tokenizers.load import load_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"


def make(path, special=("<|endoftext|>", "<|pad|>")):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.enable_truncation(4)  # a file may ask for it; documents are never cut
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make(tmp_path_factory.mktemp("hf") / "tokenizer.json"))


@pytest.mark.parametrize("text", [TEXT, "ça va? 漢字 😀\x00\n", "a<|endoftext|>b<|pad|>", " "])
def test_every_text_comes_back_and_special_tokens_stay_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.decode([*ids, tokenizer.eod]) == text


def test_text_is_not_cut(tokenizer):
    assert len(tokenizer.encode(TEXT)) > 4


def test_pair_is_made_with_it_and_names_it(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    manifest = preprocess(
        [tmp_path / "a.txt"], tmp_path / "a", tokenizer_path=tokenizer.path, workers=2
    )
    assert manifest.tokenizer_kind == "huggingface"
    assert IndexedDataset(tmp_path / "a").document(0).tolist() == [
        *tokenizer.encode(TEXT),
        tokenizer.eod,
    ]
    assert load_tokenizer(read_manifest(tmp_path / "a").tokenizer_path).sha256 == tokenizer.sha256


def test_what_is_no_usable_tokenizer_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="bad.json is not a tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no tokenizer at .*none.json"):
        load_tokenizer(tmp_path / "none.json")
    make(tmp_path / "odd.json", special=("[SEP]",))
    with pytest.raises(ValueError, match=r"special tokens \[SEP\], none known to end"):
        load_tokenizer(tmp_path / "odd.json")
