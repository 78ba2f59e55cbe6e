"""Documents in one sample do not see each other: each has the loss it has alone."""

import dataclasses

import numpy as np
import pytest
import torch

from megagpt.config.schema import ModelConfig
from megagpt.data.samples.masks import IGNORE_INDEX, document_boundaries, tokens_to_batch
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import initialize

EOD = 36
GPT2 = ModelConfig(
    num_layers=2, hidden_size=24, num_attention_heads=4, seq_length=16, vocab_size=37,
    vocab_padding_multiple=8, init_std=0.3,
)  # fmt: skip
LLAMA = dataclasses.replace(
    GPT2, num_kv_heads=2, normalization="rmsnorm", position_embedding="rope",
    activation="swiglu", bias=False, tie_embeddings=False,
)  # fmt: skip
TOKENS = np.array(
    [
        [5, 6, 7, EOD, 8, 9, 1, 2, EOD, EOD, 3, 4, 5, 6, 7, 8],
        [EOD, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, EOD],
    ]
)


def test_positions_begin_again_after_each_end_of_document():
    assert document_boundaries(TOKENS, EOD)[0].tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5],
        [0, *range(15)],
    ]


def test_the_successor_of_an_end_of_document_is_not_scored_on_request():
    samples = np.array([[1, EOD, 2, 3, EOD, -1]])
    tokens, labels = tokens_to_batch(samples)
    assert labels.tolist() == [[EOD, 2, 3, EOD, IGNORE_INDEX]] and tokens[0, 4] == EOD
    _, labels = tokens_to_batch(samples, masked_after=EOD)
    assert labels.tolist() == [[EOD, IGNORE_INDEX, 3, EOD, IGNORE_INDEX]]


def losses(model, tokens, labels):
    positions = torch.from_numpy(document_boundaries(tokens.numpy(), EOD)[0])
    return model(tokens, labels, positions)


@pytest.mark.parametrize("config", [GPT2, LLAMA])
def test_each_document_has_the_losses_it_has_alone_and_the_next_does_not_see_it(config):
    model = GPTModel(config)
    initialize(model, config, seed=1)
    tokens = torch.from_numpy(TOKENS[:1])
    labels = torch.roll(tokens, -1, dims=1)
    packed = losses(model, tokens, labels)
    bounds = [0, 4, 9, 10, 16]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        alone = model(tokens[:, begin:end], labels[:, begin:end])
        torch.testing.assert_close(packed[:, begin:end], alone, rtol=1e-5, atol=1e-5)
    changed = tokens.clone()
    changed[0, 1] = 30  # in the first document
    after = losses(model, changed, labels)
    assert torch.equal(after[:, 4:], packed[:, 4:])
    assert not torch.equal(after[:, 2:4], packed[:, 2:4])
    # Without positions it would see it.
    assert not torch.equal(model(changed, labels)[:, 4:], model(tokens, labels)[:, 4:])
