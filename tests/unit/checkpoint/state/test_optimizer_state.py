"""The loss scale of fp16, which no test here can train: what is saved, and where it is restored."""

from types import SimpleNamespace

import deepspeed.comm
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megagpt.checkpoint.state.optimizer_state import optimizer_state


@pytest.fixture(autouse=True)
def rank(monkeypatch):
    """Only the rank that tells of an overflow; no process group is needed for a scale."""
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 1)


def state_with(loss_scaler):
    """The state of an engine whose optimizer has DeepSpeed's scaler; nothing else of it is used."""
    optimizer = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    optimizer.loss_scaler = loss_scaler
    return optimizer_state(SimpleNamespace(optimizer=optimizer))


def scaler(precision, *, static_scale=1.0, is_dynamic=True, window=4):
    arguments = {
        "init_scale": 2.0**16, "scale_window": window, "min_scale": 1, "delayed_shift": 2,
        "consecutive_hysteresis": False,
    }  # fmt: skip
    dynamic_loss_args = arguments if is_dynamic else None
    return CreateLossScaler(
        dtype=precision,
        static_loss_scale=static_scale,
        dynamic_scaling=is_dynamic,
        dynamic_loss_args=dynamic_loss_args,
    )


def scales(loss_scaler, overflows):
    """Its scale after each update."""
    found = []
    for overflow in overflows:
        loss_scaler.update_scale(overflow)
        found.append(loss_scaler.loss_scale)
    return found


def test_dynamic_scale_goes_on_as_in_a_run_without_a_restart():
    before = [False, True, False, True, False, False]
    after = [True, False, False, False, False, True, True, False]
    straight = scaler(torch.float16)
    expected = scales(straight, before + after)[len(before) :]
    assert len(set(expected)) > 2
    saved = scaler(torch.float16)
    scales(saved, before)
    resumed = scaler(torch.float16)
    state = state_with(resumed)
    state.loss_scaler = state_with(saved).loss_scaler
    assert scales(resumed, after) == expected


def test_settings_of_the_scale_are_those_of_this_run():
    saved, resumed = scaler(torch.float16, window=4), scaler(torch.float16, window=9)
    values = {**state_with(saved).loss_scaler, "scale_window": 4, "dynamic": False}
    state_with(resumed).loss_scaler = values
    assert resumed.scale_window == 9 and resumed.dynamic


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_other_precisions_keep_nothing_and_take_nothing(precision):
    fp16 = scaler(torch.float16)
    fp16.update_scale(True)
    values = state_with(fp16).loss_scaler
    assert values
    fixed = scaler(precision)
    state = state_with(fixed)
    assert state.loss_scaler == {}
    state.loss_scaler = values
    assert fixed.loss_scale == 1.0
    untouched = scaler(torch.float16)
    state_with(untouched).loss_scaler = {}  # of a checkpoint in bf16
    assert untouched.loss_scale == 2.0**16


def test_fixed_scale_stays_as_it_is_set():
    fixed = scaler(torch.float16, static_scale=128.0, is_dynamic=False)
    state = state_with(fixed)
    state.loss_scaler = state_with(scaler(torch.float16)).loss_scaler
    assert state.loss_scaler == {} and fixed.loss_scale == 128.0
