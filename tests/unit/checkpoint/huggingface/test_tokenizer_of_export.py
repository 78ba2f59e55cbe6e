"""The tokenizer goes along with a model, or stays behind and says why."""

import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hf_models import LENGTH, OURS, our_checkpoint, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from megagpt.checkpoint.huggingface.convert import import_checkpoint
from megagpt.checkpoint.huggingface.names import parameter_shapes
from megagpt.config.schema import ModelConfig
from megagpt.data.tokenizers.load import load_tokenizer
from megagpt.data.tokenizers.sentencepiece import train_sentencepiece
from megagpt.inference.export import export, tokenizer_files
from megagpt.inference.load import load

TEXT = "It is a truth universally acknowledged, that a single man  must be in want of a wife.\n"


def make_tokenizer_json(path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path))
    return path


SAMPLES = [TEXT, "  lead\n\n\tça va? 漢字 😀", "x" * 40, " ", "a\u00a0b\r\n", ""]


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_the_tokenizer_goes_along_and_gives_the_same_ids(kind, style, tmp_path):
    if kind == "json":
        path = make_tokenizer_json(tmp_path / "tokenizer.json")
    else:
        path = tmp_path / "tokenizer.model"
        train_sentencepiece(iter([TEXT]), path, vocab_size=300)
    ours = load_tokenizer(path)
    config = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=LENGTH, vocab_size=320,
        **OURS[style],
    )  # fmt: skip
    weights = {n: np.ones(s, np.float32) for n, s in parameter_shapes(config).items()}
    write_checkpoint(tmp_path / "run", config, weights)
    assert "with tokenizer" in export(
        tmp_path / "run", tmp_path / "theirs", tokenizer_path=str(path)
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert theirs.eos_token_id == ours.eod
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").config.eos_token_id == ours.eod
    for text in SAMPLES:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text
    import_checkpoint(tmp_path / "theirs", tmp_path / "again")
    assert load(tmp_path / "again").tokenizer.encode(TEXT) == ours.encode(TEXT)
    assert_scored_alike(tmp_path, path)


def assert_scored_alike(folder, tokenizer):
    """An import scores a pair as the checkpoint does that it came from."""
    (folder / "text.txt").write_text(TEXT)
    run_verb("preprocess", "--input", folder / "text.txt", "--format", "text",
             "--output_prefix", folder / "pair", "--tokenizer", tokenizer)  # fmt: skip
    losses = {}
    for run in ("run", "again"):
        words = ("--checkpoint", folder / run, "--data", folder / "pair", "--tokenizer", tokenizer)
        run_verb("evaluate", *words, "--json", folder / f"{run}.json")
        losses[run] = json.loads((folder / f"{run}.json").read_text())["loss"]
    assert losses["run"] == losses["again"] > 0


def run_verb(name, *words):
    command = [sys.executable, "-m", "megagpt", name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_tokenizer_without_like_stays_behind(tmp_path):
    assert tokenizer_files(load_tokenizer("byte"), model_max_length=8)[0] == {}
    texts = [TEXT + f"{n} {n * n}\n" for n in range(100)]
    unigram = tmp_path / "unigram.model"
    train_sentencepiece(iter(texts), unigram, vocab_size=310, model_type="unigram")
    prefixing = tmp_path / "prefixing.model"  # puts a space before the text, as Llama 2's
    with prefixing.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=310, model_type="bpe",
            normalization_rule_name="identity", byte_fallback=True,
            remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    for path in (unigram, prefixing):
        files, note = tokenizer_files(load_tokenizer(path), model_max_length=8)
        assert files == {} and "gives other ids" in note


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    our_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="has 257 tokens, the model 61"):
        export(tmp_path / "run", tmp_path / "theirs", tokenizer_path="byte")
    assert "without" in export(tmp_path / "run", tmp_path / "theirs", tokenizer_path="none")
