"""Keyed dropout: SplitMix64 to the bit, and nothing but the key decides."""

import pytest
import torch

from megagpt.kernels.dropout import cpu, reference
from megagpt.model.dropout import Site, dropout_keys, keyed_dropout

MASK = (1 << 64) - 1


def splitmix(z):
    """The output function, on Python's integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def drop(keys, layer=0, site=Site.MLP, shape=(2, 6, 10), start=0, probability=0.25):
    return keyed_dropout(
        torch.ones(shape), keys, probability=probability, layer=layer, site=site,
        sequence_start=start, dropout=reference.dropout,
    )  # fmt: skip


KEYS = dropout_keys(torch.tensor([3, 70]), seed=1234, step=5)


def test_the_mask_is_splitmix64s_stream_of_the_key():
    golden = 0x9E3779B97F4A7C15
    for row, key in enumerate(KEYS.tolist()):
        stream = splitmix((key & MASK) ^ splitmix((7 * 3 + 2 + golden) & MASK))
        numbers = [splitmix((stream + (i + 1) * golden) & MASK) >> 40 for i in range(60)]
        kept = torch.tensor([n >= 0.25 * 2**24 for n in numbers]).view(6, 10)
        expected = kept / 0.75
        torch.testing.assert_close(drop(KEYS, layer=7)[row], expected.float())


def test_a_slice_of_the_sequence_has_the_mask_of_the_whole():
    whole = drop(KEYS)
    halves = [drop(KEYS, shape=(2, 3, 10), start=start) for start in (0, 3)]
    assert torch.equal(torch.cat(halves, dim=1), whole)


def test_seed_step_sample_layer_and_site_each_change_the_mask():
    masks = [drop(KEYS), drop(KEYS, layer=1), drop(KEYS, site=Site.ATTENTION)]
    for seed, step, first in ((1235, 5, 3), (1234, 6, 3), (1234, 5, 4)):
        masks.append(drop(dropout_keys(torch.tensor([first, 71]), seed=seed, step=step)))
    for i, a in enumerate(masks):
        assert not any(torch.equal(a, b) for b in masks[:i])
    # and the other sample of a batch does not
    alone = drop(KEYS[1:], shape=(1, 6, 10))
    assert torch.equal(alone[0], drop(KEYS)[1])


def test_the_share_dropped_and_the_mean_are_right():
    keys = dropout_keys(torch.arange(40), seed=0, step=1)
    x = drop(keys, shape=(40, 50, 100), probability=0.1)
    share = (x == 0).float().mean().item()
    assert abs(share - 0.1) < 0.003  # 4.5 standard deviations of 200,000 draws
    assert abs(x.mean().item() - 1) < 0.003
    per_column = (x == 0).float().mean(dim=(0, 1))
    assert per_column.std() < 0.0085  # binomial: sqrt(.09 / 2000) = 0.0067


def test_without_keys_or_probability_nothing_is_dropped():
    assert (drop(None) == 1).all() and (drop(KEYS, probability=0.0) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpus_equals_the_definition_to_the_last_bit_both_ways(dtype):
    torch.manual_seed(0)
    x, upstream = torch.randn(2, 3, 7, 333).to(dtype)
    stream = torch.randint(-(2**63), 2**63 - 1, (3,))
    outcomes = []
    for backend in (reference, cpu):
        own = x.clone().requires_grad_()
        out = backend.dropout(own, stream, first=2**40 + 3, probability=0.1)
        out.backward(upstream)
        outcomes.append((out.detach(), own.grad))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    # Autograd divides by another rounding of the same number.
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1])
    assert torch.equal(outcomes[0][1] == 0, outcomes[1][1] == 0)
