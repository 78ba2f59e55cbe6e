"""What rank 0 makes of what all ranks have written: steps that name each other, and no other."""

import os
import zlib

import numpy as np
import pytest

from megagpt.checkpoint import commit as commit_module
from megagpt.checkpoint.commit import Committer, Shard
from megagpt.checkpoint.directory import (
    complete_steps,
    find_checkpoint,
    read_latest,
    staging_directory,
    step_directory,
)
from megagpt.checkpoint.format.manifest import (
    MANIFEST_FILE,
    Layout,
    optimizer_file,
    read_links,
    read_manifest,
    weights_file,
)
from megagpt.checkpoint.format.reader import verify_checkpoint
from megagpt.checkpoint.owner import FolderTaken, Ownership
from megagpt.config.schema import CheckpointConfig

LAYOUT = Layout(4, 2, zero_stage=1)


@pytest.fixture
def checkpoints(tmp_path, known_config):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def stage(tmp_path, write_checkpoint):
    """Stages a step as four ranks write it; returns what each of them tells."""

    def _stage(committer, step):
        committer.stage(step)
        written = write_checkpoint(tmp_path / "ranks", step, tp_size=2, dp_size=2)
        manifest = read_manifest(written)
        (written / MANIFEST_FILE).unlink()
        staging = staging_directory(step_directory(tmp_path / "run" / "checkpoints", step))
        for path in written.iterdir():
            path.rename(staging / path.name)
        written.rmdir()
        return [
            Shard.of(
                [
                    (name, record.shape, piece.slice)
                    for name, record in manifest.tensors.items()
                    for piece in record.pieces
                    if piece.shard == rank
                ],
                {each(rank): manifest.files[each(rank)] for each in (weights_file, optimizer_file)},
            )
            for rank in range(4)
        ]

    return _stage


def committer_of(checkpoints, **config):
    return Committer(checkpoints, layout=LAYOUT, config=CheckpointConfig(**config))


def test_a_step_is_whole_and_named_and_names_those_before_it(checkpoints, stage, make_state):
    committer = committer_of(checkpoints)
    for step in (10, 20):
        committer.commit(make_state(step), stage(committer, step))
        assert verify_checkpoint(step_directory(checkpoints, step)) == []
    first, second = (read_links(step_directory(checkpoints, step)) for step in (10, 20))
    assert (first.previous, first.line) == (None, ())
    assert (second.previous, second.line) == (first.sha256, ((10, first.sha256),))
    assert read_latest(checkpoints) == (20, second.sha256)
    manifest = read_manifest(step_directory(checkpoints, 20))
    assert manifest.layout == LAYOUT and manifest.state == make_state(20)
    assert manifest.versions.keys() == {"megagpt", "python", "torch", "deepspeed"}
    assert not list(checkpoints.glob(".staging*"))


def test_parts_that_leave_a_hole_make_no_step(checkpoints, stage, make_state):
    committer = committer_of(checkpoints)
    shards = stage(committer, 10)
    slices = np.frombuffer(zlib.decompress(shards[2].slices), dtype=np.int64).reshape(-1, 6).copy()
    slices[-1, -1] -= 1
    shards[2] = shards[2]._replace(slices=zlib.compress(slices.tobytes()))
    with pytest.raises(ValueError, match="do not hold each of its elements once"):
        committer.commit(make_state(10), shards)
    assert complete_steps(checkpoints) == {}


def test_retention_removes_steps_of_the_line_alone(checkpoints, stage, make_state):
    committer = committer_of(checkpoints, keep_last=2, keep_every=30)
    for step in (10, 20, 30, 40):
        committer.commit(make_state(step), stage(committer, step))
    assert list(complete_steps(checkpoints)) == [30, 40]
    directory = step_directory(checkpoints, 30)
    committer.follow(directory, read_manifest(directory))  # back to it
    for step in (31, 32, 33):
        committer.commit(make_state(step), stage(committer, step))
    assert list(complete_steps(checkpoints)) == [30, 32, 33, 40]
    assert find_checkpoint(checkpoints) == step_directory(checkpoints, 33)


def test_a_step_of_another_folder_is_not_of_the_line(
    checkpoints, stage, make_state, tmp_path, write_checkpoint
):
    elsewhere = write_checkpoint(tmp_path / "elsewhere", 5)
    committer = committer_of(checkpoints)
    committer.follow(elsewhere, read_manifest(elsewhere))
    committer.commit(make_state(10), stage(committer, 10))
    assert read_links(step_directory(checkpoints, 10)).line == ()


def test_the_next_run_goes_on_from_what_was_saved_last(checkpoints, stage, make_state):
    committer = committer_of(checkpoints)
    committer.commit(make_state(10), stage(committer, 10))
    committer.owner.release()
    saved = read_links(step_directory(checkpoints, 10))
    committer = committer_of(checkpoints)
    committer.commit(make_state(20), stage(committer, 20))
    links = read_links(step_directory(checkpoints, 20))
    assert (links.previous, links.line) == (saved.sha256, ())  # it has not loaded it


def test_nothing_is_changed_in_a_folder_that_another_run_has_taken(checkpoints, stage, make_state):
    committer = committer_of(checkpoints)
    shards = stage(committer, 10)
    Ownership(checkpoints)
    before = sorted(os.listdir(checkpoints))
    with pytest.raises(FolderTaken):
        committer.commit(make_state(10), shards)
    with pytest.raises(FolderTaken):
        committer.stage(20)
    assert sorted(os.listdir(checkpoints)) == before
    assert complete_steps(checkpoints) == {}


def test_a_step_that_cannot_be_named_is_told_and_the_next_one_follows_it(
    checkpoints, stage, make_state, monkeypatch
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    committer = committer_of(checkpoints)
    shards = stage(committer, 10)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="is complete, but not named"):
        patch.setattr(commit_module, "write_latest", fail)
        committer.commit(make_state(10), shards)
    assert find_checkpoint(checkpoints) == step_directory(checkpoints, 10)
    committer.commit(make_state(20), stage(committer, 20))
    assert [step for step, _ in read_links(step_directory(checkpoints, 20)).line] == [10]


def test_a_folder_that_cannot_be_read_is_given_back(checkpoints, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(commit_module, "newest_sha256", fail)
        committer_of(checkpoints)
    assert '"pid": null' in (checkpoints / ".owner").read_text()
