"""Sampling mathematics, and generation with and without a KV cache."""

import math

import pytest
import torch

from megagpt.config.schema import ModelConfig
from megagpt.inference.generate import Sampling, generate, next_token_probabilities
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import initialize

EOD = 12


def build(seed=3, **changes):
    shape = dict(num_layers=2, hidden_size=12, num_attention_heads=3, seq_length=10, vocab_size=13)
    config = ModelConfig(**(shape | {"init_std": 0.5} | changes))
    model = GPTModel(config)
    initialize(model, config, seed=seed)
    return model.requires_grad_(False).eval()


GPT2 = {}
LLAMA = dict(
    position_embedding="rope",
    normalization="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
    hidden_size=16,
    num_attention_heads=4,
    num_kv_heads=2,
    qk_norm=True,
)


def test_probabilities_are_the_softmax_over_temperature():
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 3.0]])
    before = logits.clone()
    probabilities = next_token_probabilities(logits, Sampling(temperature=0.7))
    expected = torch.exp(logits / 0.7) / torch.exp(logits / 0.7).sum(-1, keepdim=True)
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


def test_greedy_gives_all_to_the_first_of_the_likeliest():
    logits = torch.tensor([[1.0, 4.0, 4.0]])
    probabilities = next_token_probabilities(logits, Sampling(temperature=0))
    assert probabilities.tolist() == [[0.0, 1.0, 0.0]]


def test_top_k_keeps_k_even_among_equals():
    logits = torch.tensor([[0.0, math.log(3), 0.0, 0.0]])
    probabilities = next_token_probabilities(logits, Sampling(top_k=2))
    torch.testing.assert_close(probabilities, torch.tensor([[0.25, 0.75, 0.0, 0.0]]))


def test_top_p_keeps_the_token_that_crosses_p():
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    kept = {0.4: [1], 0.51: [1, 2], 0.74: [1, 2], 0.8: [1, 2, 3], 1.0: [0, 1, 2, 3], 1e-9: [1]}
    for top_p, tokens in kept.items():
        probabilities = next_token_probabilities(logits, Sampling(top_p=top_p))
        assert probabilities[0].nonzero().flatten().tolist() == tokens, top_p
        expected = logits.exp()[0, tokens] / logits.exp()[0, tokens].sum()
        torch.testing.assert_close(probabilities[0, tokens], expected)


def test_top_p_counts_what_top_k_leaves():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    probabilities = next_token_probabilities(logits, Sampling(top_k=2, top_p=0.5))
    assert probabilities.tolist() == [[1.0, 0.0, 0.0, 0.0]]  # 0.4 / 0.7 passes 0.5


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0}]
)
def test_impossible_sampling_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)


@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cache_changes_nothing_also_past_seq_length(shape, temperature):
    model = build(**shape)
    arguments = dict(
        max_new_tokens=25, sampling=Sampling(temperature), eod=-1, seed=5, num_samples=3
    )
    prompt = [4, 1, 7]
    cached = generate(model, prompt, **arguments)
    logits, seen = model.logits, {}

    def logits_of_all(tokens, cache):
        seen[cache] = torch.cat([seen.get(cache, tokens[:, :0]), tokens], dim=1)
        return logits(seen[cache])

    model.logits = logits_of_all
    assert cached == generate(model, prompt, **arguments)
    assert max(len(sample) for sample in cached) > model.config.seq_length


def test_greedy_follows_the_argmax_of_the_logits():
    model = build()
    tokens = [4, 1]
    for _ in range(6):
        tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    greedy = generate(model, [4, 1], max_new_tokens=6, sampling=Sampling(0), eod=-1)
    assert greedy == [tokens[2:]]


def test_samples_follow_the_distribution():
    model = build()
    sampling = Sampling(temperature=1.3, top_k=5)
    expected = next_token_probabilities(model.logits(torch.tensor([[4, 1]]))[:, -1], sampling)[0]
    count = 20_000
    samples = generate(
        model, [4, 1], max_new_tokens=1, sampling=sampling, eod=-1, num_samples=count
    )
    drawn = torch.bincount(torch.tensor(samples).flatten(), minlength=13) / count
    # Five standard deviations of a share.
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_seed_decides():
    model = build()
    arguments = dict(max_new_tokens=8, sampling=Sampling(), eod=EOD, num_samples=4)
    first = generate(model, [], seed=1, **arguments)
    assert generate(model, [], seed=1, **arguments) == first
    assert generate(model, [], seed=2, **arguments) != first


def test_each_sample_stops_at_its_end_of_document():
    model = build()
    arguments = dict(max_new_tokens=12, sampling=Sampling(), seed=2, num_samples=6)
    whole = generate(model, [3], eod=-1, **arguments)
    eod = whole[0][4]
    stopped = generate(model, [3], eod=eod, **arguments)
    expected = [s[: s.index(eod)] if eod in s else s for s in whole]
    assert stopped == expected
    assert len({len(sample) for sample in stopped}) > 1


def test_tokens_beyond_the_tokenizer_are_never_drawn():
    model = build()
    samples = generate(
        model, [1], max_new_tokens=50, sampling=Sampling(5.0), eod=-1, num_samples=4, num_tokens=3
    )
    assert {token for sample in samples for token in sample} == {0, 1, 2}


def test_bad_requests_are_refused():
    model = build()
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model, [1], max_new_tokens=0, sampling=Sampling(), eod=EOD)
    with pytest.raises(ValueError, match="token 13 is outside"):
        generate(model, [13], max_new_tokens=1, sampling=Sampling(), eod=EOD)
