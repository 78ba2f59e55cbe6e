"""Torch's generators draw the same again once their states are restored."""

import torch

from megagpt.checkpoint.state.snapshot import random_states, restore_random_states

CPU = torch.device("cpu")


def test_restored_states_draw_the_same_again():
    states = random_states(CPU)
    assert "random.cpu" in states
    drawn = torch.rand(5)
    assert not torch.equal(torch.rand(5), drawn)
    restore_random_states(CPU, states.get)
    assert torch.equal(torch.rand(5), drawn)


def test_what_was_not_kept_is_left_as_it_is():
    before = random_states(CPU)["random.cpu"]
    restore_random_states(CPU, lambda name: None)
    assert (random_states(CPU)["random.cpu"] == before).all()
