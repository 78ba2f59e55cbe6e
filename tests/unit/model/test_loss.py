"""Cross entropy of one rank against torch's own, and the contract of the last layer."""

import pytest
import torch
import torch.nn.functional as F

from megagpt.model.layers import ONE_RANK
from megagpt.model.loss import IGNORE_INDEX, linear_cross_entropy, vocab_parallel_cross_entropy

VOCAB, PADDED = 11, 16


@pytest.fixture
def case():
    torch.manual_seed(0)
    targets = torch.randint(VOCAB, (2, 5))
    targets[0, 1] = targets[1, 4] = IGNORE_INDEX
    return torch.randn(2, 5, PADDED) * 3, targets, torch.randn(2, 5)


def reference(logits, targets):
    real = logits[..., :VOCAB].float().transpose(1, 2)
    return F.cross_entropy(real, targets, ignore_index=IGNORE_INDEX, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_equal_torchs_and_inputs_stay(case, dtype):
    logits, targets, weights = case
    ours = logits.to(dtype).requires_grad_()
    theirs = logits.to(dtype).requires_grad_()
    loss = vocab_parallel_cross_entropy(ours, targets, vocab_size=VOCAB, tp_group=None)
    expected = reference(theirs, targets)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert (ours.grad[..., VOCAB:] == 0).all()
    assert (ours.grad[targets == IGNORE_INDEX] == 0).all()
    assert torch.equal(ours.detach(), logits.to(dtype))


def test_large_logits_do_not_overflow_and_padding_takes_no_part():
    logits = torch.zeros(1, 2, PADDED)
    logits[0, 0, 3] = 1e4
    logits[0, :, VOCAB:] = 1e5
    loss = vocab_parallel_cross_entropy(
        logits, torch.tensor([[3, 0]]), vocab_size=VOCAB, tp_group=None
    )
    expected = torch.tensor([[0.0, torch.tensor(float(VOCAB)).log()]])
    torch.testing.assert_close(loss, expected)


def test_gradcheck_in_the_linear_form(case):
    _, targets, weights = case
    hidden = torch.randn(2, 5, 6, requires_grad=True)
    table = torch.randn(PADDED, 6, requires_grad=True)
    loss = linear_cross_entropy(hidden, table, targets, vocab_size=VOCAB, tp=ONE_RANK)
    grads = torch.autograd.grad((loss * weights).sum(), (hidden, table))
    expected = reference(hidden @ table.T, targets)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        grads, torch.autograd.grad((expected * weights).sum(), (hidden, table)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_handed_in_is_not_changed(case):
    logits, targets, weights = case
    before = weights.clone()
    logits.requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, targets, vocab_size=VOCAB, tp_group=None)
    loss.backward(weights)
    assert torch.equal(weights, before)


def test_a_shape_mismatch_is_refused():
    with pytest.raises(ValueError, match=r"logits are \[2, 5, 16\] and targets \[2, 4\]"):
        vocab_parallel_cross_entropy(
            torch.zeros(2, 5, 16), torch.zeros(2, 4, dtype=torch.long), vocab_size=11, tp_group=None
        )
