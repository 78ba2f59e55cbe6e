"""Torch's generators draw the same again once their states are restored."""

import torch

from megagpt.checkpoint.state.snapshot import random_states, restore_random_states


def test_restored_states_draw_the_same_again():
    states = random_states()
    assert "random.cpu" in states
    drawn = torch.rand(5)
    assert not torch.equal(torch.rand(5), drawn)
    restore_random_states(states.get)
    assert torch.equal(torch.rand(5), drawn)


def test_what_was_not_kept_is_left_as_it_is():
    before = random_states()["random.cpu"]
    restore_random_states(lambda name: None)
    assert (random_states()["random.cpu"] == before).all()
