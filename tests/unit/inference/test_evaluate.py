"""Evaluation against a direct computation, on a random model and bytes as tokens."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from megagpt.config.schema import Config, DataConfig, ModelConfig
from megagpt.data.preprocessing.preprocess import preprocess
from megagpt.data.tokenizers.byte import ByteTokenizer
from megagpt.inference.evaluate import evaluate, read_split
from megagpt.inference.load import build_model
from megagpt.kernels.registry import Kernels
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import VOCABULARY_WEIGHTS, initialize

TEXTS = ["O, speak again!\n", "Zwölf größere Ölkäfer.", "x"]
TOKENIZER = ByteTokenizer()
SHAPE = ModelConfig(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=3,
    seq_length=8,
    vocab_size=257,
    init_std=0.3,
)


@pytest.fixture(scope="module")
def model():
    model = GPTModel(SHAPE, kernels=Kernels("auto"))  # as a checkpoint is opened
    initialize(model, SHAPE, seed=1)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    preprocess(
        [str(folder / "text.jsonl")],
        str(folder / "text"),
        tokenizer_path="byte",
        file_format="auto",
        json_key="text",
        workers=1,
        report=None,
    )
    return str(folder / "text")


def all_tokens():
    return np.array([t for text in TEXTS for t in [*text.encode(), 256]], dtype=np.int64)


def direct_nats(model, tokens, stride):
    """One forward pass a token, with the context its window gives it."""
    inputs = [256, *tokens[:-1].tolist()]
    size = model.config.seq_length
    nats = 0.0
    for i, target in enumerate(tokens.tolist()):
        if i < size:
            start = 0
        else:  # the window that scores it ends at the next multiple, or with the text
            end = min(size + ((i - size) // stride + 1) * stride, len(tokens))
            start = end - size
        logits = model.logits(torch.tensor([inputs[start : i + 1]]))[0, -1]
        nats -= float(logits.double().log_softmax(-1)[target])
    return nats


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 24, 42])
def test_every_token_is_scored_once_with_the_context_of_its_window(model, stride, num_tokens):
    tokens = all_tokens()[:num_tokens]
    assert len(tokens) == num_tokens
    loss = evaluate(model, tokens, 1, eod=256, stride=stride, batch_size=3).loss
    # float32 logits of another order of summation
    assert loss * num_tokens == pytest.approx(direct_nats(model, tokens, stride), rel=1e-5)


def test_bits_per_byte_counts_utf8_bytes_and_ends_of_documents(model, prefix):
    data = DataConfig(train_path=prefix, test_path=prefix)
    tokens, text_bytes = read_split(data, "test", TOKENIZER)
    assert text_bytes == sum(len(t.encode()) for t in TEXTS)
    assert tokens.tolist() == all_tokens().tolist()
    evaluation = evaluate(model, tokens, text_bytes, eod=256, stride=4)
    nats = direct_nats(model, all_tokens(), 4)
    assert evaluation.num_tokens == text_bytes + len(TEXTS)
    assert evaluation.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert evaluation.loss == pytest.approx(nats / evaluation.num_tokens, rel=1e-5)
    assert evaluation.perplexity == pytest.approx(math.exp(evaluation.loss))


def saved_weights(model):
    """As a checkpoint holds them: without the padding of the vocabulary."""
    return {
        name: p.detach()[: model.config.vocab_size].clone() if name in VOCABULARY_WEIGHTS else p
        for name, p in model.canonical_parameters()
    }


def test_uniform_model_costs_log_v_a_token(model):
    config = dataclasses.replace(SHAPE, tie_embeddings=False)
    weights = {n: torch.zeros_like(p) for n, p in saved_weights(GPTModel(config)).items()}
    uniform = build_model(Config(model=config), weights)
    evaluation = evaluate(uniform, all_tokens(), 39, eod=256, stride=4)
    assert evaluation.loss == pytest.approx(math.log(257), rel=1e-6)


def test_a_share_of_one_pair_has_its_own_bytes(prefix):
    data = DataConfig(path=prefix, split="1,1,1")
    for split, text in zip(("train", "valid", "test"), TEXTS, strict=True):
        tokens, text_bytes = read_split(data, split, TOKENIZER)
        assert tokens.tolist() == [*text.encode(), 256]
        assert text_bytes == len(text.encode())


def test_wrong_requests_are_refused_in_one_line(model, prefix):
    with pytest.raises(ValueError, match="no test data"):
        read_split(DataConfig(train_path=prefix), "test", TOKENIZER)
    with pytest.raises(ValueError, match="split of .* is empty"):
        read_split(DataConfig(path=prefix, split="1,1,0"), "test", TOKENIZER)
    other = ByteTokenizer()
    other.sha256 = "0" * 64
    with pytest.raises(ValueError, match="another tokenizer"):
        read_split(DataConfig(train_path=prefix), "train", other)
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"stride={stride}"):
            evaluate(model, all_tokens(), 1, eod=256, stride=stride)


def test_build_model_takes_exactly_the_weights_of_the_configuration(model):
    config = Config(model=SHAPE)
    weights = saved_weights(model)
    built = build_model(config, weights)
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(built.logits(tokens), model.logits(tokens), rtol=0, atol=0)
    assert not built.training
    with pytest.raises(ValueError, match="final_norm.weight"):
        bad = weights | {"final_norm.weight": torch.ones(5)}
        build_model(config, bad)
    with pytest.raises(ValueError, match="extra.weight"):
        bad = weights | {"extra.weight": torch.ones(5)}
        build_model(config, bad)
