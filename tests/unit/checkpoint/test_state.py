"""Which folder is a checkpoint, and which run may resume it."""

import dataclasses
import json

import pytest

from megagpt.checkpoint.state import (
    CheckpointState,
    find_checkpoint,
    read_state,
    refuse_other_run,
    step_directory,
    write_state,
)
from megagpt.config.schema import BatchConfig, Config, ModelConfig

LAYOUT = {"world_size": 2, "zero_stage": 1, "offload": "none", "data_fingerprint": {"a": 1}}


def state(step=5, **changes):
    return CheckpointState(
        step=step, consumed_samples=40, consumed_tokens=400, config=Config(**changes), **LAYOUT
    )


def save(root, step):
    folder = step_directory(root / "checkpoints", step)
    folder.mkdir(parents=True)
    write_state(folder, state(step))
    return folder


def test_state_comes_back_equal(tmp_path):
    folder = save(tmp_path, 5)
    assert read_state(folder) == state(5)


def test_the_newest_complete_step_is_found_and_an_incomplete_one_is_not(tmp_path):
    save(tmp_path, 90)
    newest = save(tmp_path, 100)
    step_directory(tmp_path / "checkpoints", 110).mkdir()
    (tmp_path / "checkpoints" / ".staging_step_00000120").mkdir()
    assert find_checkpoint(tmp_path) == newest
    assert find_checkpoint(newest) == newest


def test_nothing_to_resume_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint.*--checkpoint.load none"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1}', "\x00\x00"])
def test_a_damaged_state_is_named(tmp_path, content):
    folder = save(tmp_path, 5)
    (folder / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json is damaged.*older step"):
        read_state(folder)


def test_every_difference_is_told_at_once():
    wanted = Config(model=ModelConfig(hidden_size=768), batch=BatchConfig(global_batch_size=64))
    layout = LAYOUT | {"world_size": 4, "zero_stage": 3, "data_fingerprint": {"a": 2}}
    with pytest.raises(ValueError) as error:
        refuse_other_run(state(), wanted, **layout)
    for words in (
        "model.hidden_size: saved 384, asked 768",
        "batch.global_batch_size: saved 32, asked 64",
        "number of ranks: saved 2, asked 4",
        "ZeRO stage: saved 1, asked 3",
        "data: the files have changed",
    ):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_run_and_one_that_only_goes_on_longer_may_resume():
    longer = dataclasses.replace(
        Config(), training=dataclasses.replace(Config().training, train_steps=9000)
    )
    refuse_other_run(state(), Config(), **LAYOUT)
    refuse_other_run(state(), longer, **LAYOUT)


def test_state_is_plain_json(tmp_path):
    assert json.loads((save(tmp_path, 5) / "state.json").read_text())["step"] == 5
