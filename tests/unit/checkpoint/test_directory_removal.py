"""What a kill leaves in a run folder, and what retention lets go."""

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from saved_steps import Run  # noqa: E402

from megagpt.checkpoint import directory as directory_module
from megagpt.checkpoint.directory import (
    LATEST_FILE,
    complete_steps,
    line_of_steps,
    newest_readable,
    publish,
    remove_leftovers,
    remove_step,
    step_directory,
    steps_to_remove,
)
from megagpt.checkpoint.format.manifest import read_manifest


@pytest.fixture
def run(tmp_path, write_checkpoint, known_config):
    return Run(tmp_path, write_checkpoint)


@pytest.fixture
def steps(run):
    for step in (10, 20, 30):
        run.save(step)
    return run


class Killed(BaseException):
    """Stands for SIGKILL: nothing that runs after it may be relied on."""


def kill_before(number, patch):
    """Kills before the given of the operations on folders that follow, counted from 1."""
    calls = 0

    def counted(operation):
        def run(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == number:
                raise Killed
            return operation(*arguments, **keywords)

        return run

    for owner, name in ((Path, "rename"), (shutil, "rmtree"), (directory_module, "sync_directory")):
        patch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize(("number", "is_old"), [(n, n <= 4) for n in range(1, 7)])
def test_kill_within_publish_leaves_one_whole_step_of_the_name(steps, monkeypatch, number, is_old):
    target = step_directory(steps.checkpoints, 30)
    old = read_manifest(target).sha256
    steps.resume(20)
    staging = steps.stage(30)
    new = read_manifest(staging).sha256
    assert new != old
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(number, patch)
        publish(staging, target)
    assert steps.found() == [30, 20, 10]
    assert newest_readable(steps.checkpoints).sha256 == (old if is_old else new)
    remove_leftovers(steps.checkpoints)
    assert sorted(os.listdir(steps.checkpoints)) == [
        *("elsewhere", LATEST_FILE, "step_00000010", "step_00000020", "step_00000030")
    ]
    assert read_manifest(target).sha256 == (old if is_old else new)


def test_leftovers_go_and_nothing_else(steps):
    checkpoints = steps.checkpoints
    for name in (".staging_step_00000040", ".removed_step_00000005", ".replaced_step_00000020"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "weights").write_text("")
    (checkpoints / "latest.tmp123").write_text("")
    (checkpoints / "notes.txt").write_text("mine")
    remove_leftovers(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        *("elsewhere", LATEST_FILE, "notes.txt"),
        *("step_00000010", "step_00000020", "step_00000030"),
    ]
    remove_leftovers(checkpoints.parent / "absent")


def test_removed_step_is_gone(steps):
    remove_step(step_directory(steps.checkpoints, 20))
    assert steps.found() == [30, 10]
    assert sorted(os.listdir(steps.checkpoints)) == [
        *("elsewhere", LATEST_FILE, "step_00000010", "step_00000030")
    ]


@pytest.mark.parametrize(("number", "is_left"), [(n, n <= 2) for n in range(1, 5)])
def test_kill_within_a_removal_leaves_all_of_a_step_or_none(steps, monkeypatch, number, is_left):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(number, patch)
        remove_step(step_directory(steps.checkpoints, 20))
    assert (20 in complete_steps(steps.checkpoints)) == is_left
    remove_leftovers(steps.checkpoints)
    assert step_directory(steps.checkpoints, 20).exists() == is_left
    assert not [name for name in os.listdir(steps.checkpoints) if name.startswith(".")]


@pytest.mark.parametrize(
    ("line", "keep_last", "keep_every", "expected"),
    [
        ([40, 30, 20, 10], 0, 0, []),
        ([40, 30, 20, 10], 0, 20, []),
        ([40, 30, 20, 10], 1, 0, [10, 20, 30]),
        ([40, 30, 20, 10], 2, 0, [10, 20]),
        ([40, 30, 20, 10], 4, 0, []),
        ([40, 30, 20, 10], 9, 0, []),
        ([40, 30, 20, 10], 1, 20, [10, 30]),
        ([40, 30, 20, 10], 1, 30, [10, 20]),
        ([40, 30, 20, 10], 2, 1, []),
        ([10], 1, 0, []),
        ([], 1, 0, []),
    ],
)
def test_retention(line, keep_last, keep_every, expected):
    assert steps_to_remove(line, keep_last=keep_last, keep_every=keep_every) == expected


def test_retention_never_takes_a_step_of_another_line(steps):
    steps.resume(20)
    for step in (25, 35, 45, 55):
        steps.save(step)
        left = complete_steps(steps.checkpoints)
        for gone in steps_to_remove(list(line_of_steps(left, step)), keep_last=2, keep_every=0):
            remove_step(left[gone])
    assert list(complete_steps(steps.checkpoints)) == [30, 45, 55]


def test_step_under_its_replaced_name_is_removed_without_a_trace(steps):
    target = step_directory(steps.checkpoints, 20)
    target.rename(target.with_name(f".replaced_{target.name}"))
    assert steps.found() == [30, 20, 10]
    remove_step(complete_steps(steps.checkpoints)[20])
    assert sorted(os.listdir(steps.checkpoints)) == [
        *("elsewhere", LATEST_FILE, "step_00000010", "step_00000030")
    ]


def test_replaced_step_comes_back_where_the_new_one_is_not_whole(steps):
    target = step_directory(steps.checkpoints, 20)
    target.rename(target.with_name(f".replaced_{target.name}"))
    target.mkdir()  # no manifest in it
    remove_leftovers(steps.checkpoints)
    assert read_manifest(target).state.step == 20
    assert not [name for name in os.listdir(steps.checkpoints) if name.startswith(".")]
