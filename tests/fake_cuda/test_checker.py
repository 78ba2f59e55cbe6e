"""The checker refuses models that are broken on purpose: each line of `FAULTS` is one."""

from functools import partial

import pytest
import torch
from fake_model import Case, attention_of_training

FAULTS = {
    "reads a number": (lambda x: x * x.sum().item(), "_local_scalar_dense.* wait"),
    "decides by a value": (lambda x: x if x.amax() < 3 else -x, "_local_scalar_dense.* wait"),
    "makes a list": (lambda x: x * x.sum((0, 1)).tolist()[0], "_local_scalar_dense.* wait"),
    "compares tensors": (lambda x: x * torch.equal(x, x), "equal.* wait"),
    "looks for elements": (lambda x: x * x.nonzero().shape[0], "nonzero.* wait"),
    "takes elements by a mask": (lambda x: x + x[x > 0].sum(), "index.Tensor.* wait"),
    "moves to the host": (lambda x: x.cpu().to(x.device), "_to_copy.* on cpu"),
    "makes a tensor on the host": (lambda x: x + torch.zeros(x.shape).to(x.device), "on cpu"),
    "copies a number": (lambda x: x * torch.tensor(2.0).to(x.device), "on cpu"),
}


def damage_forward(fault, model):
    model.layers["0"].register_forward_hook(lambda _m, _i, output: fault(output))


def damage_recomputed(fault, model):
    calls = []

    def second_time(module, inputs, output):
        calls.append(module)
        return fault(output) if len(calls) == 2 else output

    model.layers["0"].attention.register_forward_hook(second_time)


def damage_backward(fault, model):
    def look_at_gradient(module, inputs, output):
        output.register_hook(fault)

    model.layers["0"].register_forward_hook(look_at_gradient)


PLACES = {"forward": damage_forward, "recomputed": damage_recomputed, "backward": damage_backward}


def train_damaged(place, fault, recompute):
    damage = partial(PLACES[place], FAULTS[fault][0])
    attention_of_training(Case("llama_grouped", recompute=recompute), damage)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_leaves_or_waits_is_refused(fault, place, on_fake_cuda):
    with pytest.raises(AssertionError, match=FAULTS[fault][1]):
        on_fake_cuda(train_damaged, place, fault, "full" if place == "recomputed" else "none")


def train_with_a_weight_unused():
    def damage(model):
        model.spare = torch.nn.Parameter(torch.empty(1, device="cuda"))

    attention_of_training(Case("gpt2"), damage)


def train_with_a_loss_in_half():
    attention_of_training(
        Case("gpt2"), lambda model: model.register_forward_hook(lambda _m, _i, loss: loss.half())
    )


@pytest.mark.parametrize("function", (train_with_a_weight_unused, train_with_a_loss_in_half))
def test_a_missing_gradient_and_a_narrow_loss_are_refused(function, on_fake_cuda):
    with pytest.raises(AssertionError):
        on_fake_cuda(function)
