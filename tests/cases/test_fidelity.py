"""Text that a tokenizer cannot represent: measured, told, kept, refused; no bits per byte of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megagpt.config.schema import DataConfig
from megagpt.data.indexed.manifest import Fidelity, read_manifest
from megagpt.data.indexed.rewrite import merge, split
from megagpt.data.preprocessing.preprocess import preprocess
from megagpt.data.tokenizers.load import load_tokenizer
from megagpt.data.tokenizers.sentencepiece import train_sentencepiece
from megagpt.inference.evaluate import read_split

INPUTS = Path(__file__).parent / "inputs"
NO_UNK = INPUTS / "tok_nounk.json"


def lines(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_pair_of_the_report_is_refused_with_its_share_and_places(tmp_path: Path) -> None:
    source, told = INPUTS / "mixed.jsonl", []
    with pytest.raises(ValueError, match=r"% of the bytes do not come back .* share of 0\.01") as e:
        preprocess([source], tmp_path / "a", tokenizer_path=NO_UNK, report=told.append)
    assert f"{source}:1 without " in str(e.value) and "--largest_lost_share" in str(e.value)
    assert any("not given back exactly" in line for line in told)
    assert read_manifest(tmp_path / "a") is None
    # The same command goes on from there with a larger share.
    made = preprocess([source], tmp_path / "a", tokenizer_path=NO_UNK, largest_lost_share=0.9)
    assert made == read_manifest(tmp_path / "a") and made.fidelity is not None
    mixed, plain = (
        sum(len(json.loads(line)["text"].encode()) for line in path.open(encoding="utf-8"))
        for path in (source, INPUTS / "plainonly.jsonl")
    )
    assert made.fidelity.lost_bytes == pytest.approx(mixed - plain, rel=0.01)
    assert read_split(DataConfig(train_path=str(tmp_path / "a")), "train", load_tokenizer(NO_UNK))[
        1
    ] is None  # fmt: skip


def test_unknown_tokens_are_counted(tmp_path: Path) -> None:
    content = json.loads((INPUTS / "tok_wl.json").read_text())
    content["model"]["vocab"]["[UNK]"] = 2
    tokenizer = tmp_path / "words.json"
    tokenizer.write_text(json.dumps(content))
    source = lines(tmp_path / "a.jsonl", "hello hello", "hello you there", "hello")
    with pytest.raises(ValueError, match=r"25\.00% of the tokens are unknown|tokens are unknown"):
        preprocess([source], tmp_path / "a", tokenizer_path=tokenizer)
    made = preprocess([source], tmp_path / "a", tokenizer_path=tokenizer, largest_lost_share=1)
    assert made.fidelity is not None
    assert (made.fidelity.unknown_tokens, made.fidelity.altered_documents) == (2, 1)
    assert made.fidelity.first[0].startswith(f"{source}:2 ")


def sentencepiece_models(folder: Path) -> dict[str, Path]:
    import sentencepiece

    exact = folder / "exact.model"
    texts = ["some plain text to learn from", "and more of it", "abcdefghijklmnopqrstuvwxyz"] * 20
    train_sentencepiece(iter(texts), exact, vocab_size=300)
    found = {"exact": exact}
    for kind in ("bpe", "unigram"):
        found[kind] = folder / f"{kind}.model"
        with found[kind].open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=file, model_type=kind, vocab_size=50,
                hard_vocab_limit=False, minloglevel=2,
            )  # fmt: skip
    return found


TEXTS = (
    "plain text",
    "naïve café 日本語 ﬁ",
    "two  spaces\n\tand lines",
    "a\u2581b",
    " leading",
    "É",
)


@pytest.mark.parametrize("text", TEXTS)
def test_every_tokenizer_is_measured_against_what_it_gives_back(text: str, tmp_path: Path) -> None:
    paths = {**sentencepiece_models(tmp_path), "nounk": NO_UNK, "bytes": "byte"}
    paths["bytelevel"] = INPUTS / "tok_eosname.json"
    source = lines(tmp_path / "a.jsonl", text)
    for name, path in paths.items():
        eod = "<|eos|>" if name == "bytelevel" else None
        tokenizer = load_tokenizer(path, eod=eod)
        try:
            made = preprocess(
                [source], tmp_path / name, tokenizer_path=path, eod=eod, largest_lost_share=1
            )
        except ValueError as error:
            assert "cannot" in str(error)
            continue
        assert made.fidelity is not None
        ids = tokenizer.encode(text)
        assert made.fidelity.altered_documents == (tokenizer.decode(ids) != text)
        assert made.fidelity.unknown_tokens == sum(i == tokenizer.unknown for i in ids)
        if name in ("bytes", "bytelevel", "exact"):
            assert made.fidelity == Fidelity()


def test_merged_and_split_pairs_know_it_too(tmp_path: Path) -> None:
    good = lines(tmp_path / "good.jsonl", *["abc"] * 4)
    bad = lines(tmp_path / "bad.jsonl", *["日本"] + ["abc"] * 4)
    for name, source in (("good", good), ("bad", bad)):
        preprocess([source], tmp_path / name, tokenizer_path=NO_UNK, largest_lost_share=1)
    merge([tmp_path / "good", tmp_path / "bad"], tmp_path / "both")
    made = split(tmp_path / "both", "50,50,0", tmp_path / "part")
    for prefix in (tmp_path / "both", *(each.prefix for each in made.values())):
        manifest = read_manifest(prefix)
        assert manifest is not None and manifest.fidelity is not None
        assert manifest.fidelity.lost_bytes == 6
