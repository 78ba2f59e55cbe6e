"""Linear + cross entropy of one rank: the reference against torch's own, back ends against it."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from megagpt.kernels.linear_cross_entropy.chunked import MAX_CHUNKS, MIN_CHUNK, chunks
from megagpt.kernels.linear_cross_entropy.contract import IGNORE_INDEX, Vocabulary
from megagpt.kernels.linear_cross_entropy.reference import linear_cross_entropy

REAL, PADDED, HIDDEN, TOKENS = 11, 16, 6, 9
# Relative, of whole tensors, against fp64 of the same inputs: some roundings of the type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def case(dtype, tokens=TOKENS, padded=PADDED, real=REAL):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    weight = torch.randn(padded, HIDDEN).to(dtype)
    targets = torch.randint(real, (tokens,))
    targets[::4] = IGNORE_INDEX
    return hidden, weight, targets


def outcome(function, hidden, weight, targets, upstream, **arguments):
    """The loss, and the gradients of hidden and weight where upstream comes to the loss."""
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    loss = function(hidden, weight, targets, **arguments)
    if isinstance(upstream, float):
        (loss.sum() * upstream).backward()
    else:
        loss.backward(upstream.to(loss.dtype))
    return loss.detach(), hidden.grad, weight.grad


def assert_near(ours, exact, dtype):
    for mine, truth in zip(ours, exact, strict=True):
        error = (mine.double() - truth).norm() / truth.norm()
        assert error < TOLERANCE[dtype], error.item()


def test_the_definition_is_torchs_cross_entropy_over_real_tokens():
    hidden, weight, targets = case(torch.float64)
    upstream = torch.randn(TOKENS, dtype=torch.float64)

    def torchs(hidden, weight, targets):
        logits = (hidden @ weight.T)[:, :REAL]
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")

    ours = outcome(
        linear_cross_entropy, hidden, weight, targets, upstream, vocabulary=Vocabulary(REAL)
    )
    for mine, theirs in zip(ours, outcome(torchs, hidden, weight, targets, upstream), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_z_loss_is_the_square_of_the_softmaxs_denominator():
    hidden, weight, targets = case(torch.float64)
    plain, with_z = (
        linear_cross_entropy(hidden, weight, targets, vocabulary=Vocabulary(REAL), z_loss=z)
        for z in (0.0, 0.25)
    )
    squares = (hidden @ weight.T)[:, :REAL].logsumexp(-1).square()
    expected = plain + 0.25 * squares.masked_fill(targets == IGNORE_INDEX, 0.0)
    torch.testing.assert_close(with_z, expected)


def cpu():
    module = importlib.import_module("megagpt.kernels.linear_cross_entropy.cpu")
    return module.linear_cross_entropy


UPSTREAM = {
    "told": 0.25,
    "told wrong": 0.5,
    "of each token": torch.arange(4000) % 3 * 0.25,
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize(
    ("tokens", "padded", "real"), [(1, 1, 1), (9, 16, 11), (2500, 130, 130), (1100, 300, 257)]
)
def test_the_cpus_equals_the_definition(dtype, upstream, tokens, padded, real):
    inputs = case(dtype, tokens, padded, real)
    if tokens == 1:
        inputs[2].zero_()
    coming = UPSTREAM[upstream]
    if not isinstance(coming, float):
        coming = coming[:tokens] + 0.25
    arguments = {"vocabulary": Vocabulary(real), "z_loss": 1e-2, "gradient": 0.25}
    ours = outcome(cpu(), *inputs, coming, **arguments)
    hidden, weight, targets = inputs
    exact = outcome(
        linear_cross_entropy, hidden.double(), weight.double(), targets, coming, **arguments
    )
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert_near(ours, exact, dtype)
    assert (ours[0][targets == IGNORE_INDEX] == 0).all()
    assert (ours[1][targets == IGNORE_INDEX] == 0).all()
    assert (ours[2][real:] == 0).all(), "the padding has no gradient"


def test_inputs_and_the_gradient_handed_in_are_not_changed():
    inputs = case(torch.bfloat16)
    before = [x.clone() for x in inputs]
    upstream = torch.rand(TOKENS)
    handed = upstream.clone()
    outcome(cpu(), *inputs, upstream, vocabulary=Vocabulary(REAL))
    assert all(map(torch.equal, (*inputs, upstream), (*before, handed)))


def test_a_second_backward_pass_gives_the_same():
    hidden, weight, targets = case(torch.float32)
    hidden.requires_grad_()
    loss = cpu()(hidden, weight, targets, vocabulary=Vocabulary(REAL)).sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("function", [linear_cross_entropy, cpu()])
def test_large_logits_do_not_overflow_and_what_is_not_finite_shows(function):
    weight = torch.zeros(PADDED, 1)
    weight[3], weight[REAL:] = 1e4, 1e5
    hidden, targets = torch.ones(3, 1), torch.tensor([3, 0, 0])
    hidden[1] = 0
    hidden[2] = torch.nan
    loss = function(hidden, weight, targets, vocabulary=Vocabulary(REAL))
    torch.testing.assert_close(
        loss[:2],
        torch.tensor([0.0, float(REAL)]).where(
            torch.tensor([True, False]), torch.tensor(float(REAL)).log()
        ),
    )
    assert loss[2].isnan()


def test_chunks_are_few_large_and_all_of_it():
    for tokens in (0, 1, 5, 1024, 1025, 8192, 8193, 100_000):
        parts = list(chunks(tokens))
        assert list(itertools.chain(*(range(tokens)[part] for part in parts))) == [*range(tokens)]
        assert len(parts) <= MAX_CHUNKS
        assert all(part.stop - part.start >= MIN_CHUNK for part in parts[:-1])
