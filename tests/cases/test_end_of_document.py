"""Which token ends documents: asked for, said by the tokenizer's config, or the only candidate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megagpt.data.indexed.dataset import IndexedDataset, manifest_path
from megagpt.data.indexed.manifest import read_manifest
from megagpt.data.indexed.rewrite import adopt, merge
from megagpt.data.preprocessing.preprocess import preprocess
from megagpt.data.tokenizers.huggingface import EOD_TOKENS
from megagpt.data.tokenizers.load import load_tokenizer
from megagpt.data.tokenizers.sentencepiece import train_sentencepiece

INPUTS = Path(__file__).parent / "inputs"


def tokenizer_with(folder: Path, names: list[str]) -> Path:
    """A tokenizer.json of bytes with special tokens of these names, and no others."""
    content = json.loads((INPUTS / "tok_eosname.json").read_text())
    kept = {token: i for token, i in content["model"]["vocab"].items() if token != "<|eos|>"}
    first = max(kept.values()) + 1
    like = content["added_tokens"][0]
    content["model"]["vocab"] = kept
    content["added_tokens"] = [
        {**like, "id": first + i, "content": name} for i, name in enumerate(names)
    ]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("one document")
    return path


def last_token(prefix: Path) -> int:
    return int(IndexedDataset(prefix).document(0)[-1])


@pytest.mark.parametrize("name", EOD_TOKENS)
def test_the_only_candidate_is_taken(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_with(tmp_path, ["<pad>", name]))
    assert tokenizer.eod == tokenizer.vocab_size - 1


@pytest.mark.parametrize("first", EOD_TOKENS)
@pytest.mark.parametrize("second", EOD_TOKENS)
def test_two_candidates_are_refused_with_their_names(
    first: str, second: str, tmp_path: Path
) -> None:
    if first == second:
        return
    path = tokenizer_with(tmp_path, [first, second])
    with pytest.raises(ValueError, match="give one with --eod") as error:
        load_tokenizer(path)
    assert first in str(error.value) and second in str(error.value)
    assert load_tokenizer(path, eod=second).eod == load_tokenizer(path, eod=first).eod + 1
    for eos in (second, {"content": second, "special": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(path).eod == load_tokenizer(path, eod=second).eod


@pytest.mark.parametrize("config", ["[", "[" * 100_000, '{"eos_token": "<none>"}'])
def test_a_config_that_does_not_help_is_one_line(config: str, tmp_path: Path) -> None:
    path = tokenizer_with(tmp_path, ["</s>"])
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json") as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)
    assert load_tokenizer(path, eod="</s>").eod


@pytest.mark.parametrize("config", ["{}", '{"eos_token": null}', "[]"])
def test_a_config_that_says_nothing_is_passed_over(config: str, tmp_path: Path) -> None:
    path = tokenizer_with(tmp_path, ["</s>"])
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert load_tokenizer(path).eod


def test_preprocessing_and_adoption_take_the_one_asked_for(source: Path, tmp_path: Path) -> None:
    name = INPUTS / "tok_eosname.json"
    with pytest.raises(ValueError, match=r"special tokens <\|eos\|>, none known to end documents"):
        preprocess([source], tmp_path / "a", tokenizer_path=name)
    preprocess([source], tmp_path / "a", tokenizer_path=name, eod="<|eos|>", workers=2)
    assert last_token(tmp_path / "a") == 0

    two = INPUTS / "tok_two.json"
    ambiguous = r"<\|endoftext\|>, </s>; give one with --eod"
    with pytest.raises(ValueError, match=ambiguous):
        preprocess([source], tmp_path / "b", tokenizer_path=two)
    for asked, token in (("</s>", 2), ("<|endoftext|>", 3)):
        made = preprocess([source], tmp_path / "b", tokenizer_path=two, eod=asked)
        assert (made.eod, last_token(tmp_path / "b")) == (token, token)
        manifest_path(tmp_path / "b").unlink()
        with pytest.raises(ValueError, match=ambiguous):
            adopt(tmp_path / "b", two)
        assert adopt(tmp_path / "b", two, eod=asked).eod == token
        assert read_manifest(tmp_path / "b").eod == token
    with pytest.raises(ValueError, match="--eod says that nothing ends documents"):
        preprocess([source], tmp_path / "c", tokenizer_path=two, eod="nothing")


def test_pairs_of_two_ends_do_not_go_together(source: Path, tmp_path: Path) -> None:
    for prefix, eod in (("a", "</s>"), ("b", "<|endoftext|>")):
        tokenizer = INPUTS / "tok_two.json"
        preprocess([source], tmp_path / prefix, tokenizer_path=tokenizer, eod=eod)
    with pytest.raises(ValueError, match="make both with one --eod"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


def test_sentencepiece_and_bytes_take_what_they_have(tmp_path: Path) -> None:
    path = tmp_path / "a.model"
    tokenizer = train_sentencepiece(iter(["some text", "more of it"]), path, vocab_size=270)
    assert load_tokenizer(path, eod="<eod>").eod == load_tokenizer(path, eod=1).eod == tokenizer.eod
    with pytest.raises(ValueError, match="some is no control symbol of .*its are <eod>"):
        load_tokenizer(path, eod="some")
    assert load_tokenizer("byte", eod=256).eod == 256
    with pytest.raises(ValueError, match="--eod x is not known"):
        load_tokenizer("byte", eod="x")
