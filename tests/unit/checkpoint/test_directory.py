"""Which step of a run folder is the newest."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from saved_steps import Run, damage_manifest  # noqa: E402

from megagpt.checkpoint.directory import (
    LATEST_FILE,
    find_checkpoint,
    find_checkpoints,
    newest_readable,
    read_latest,
    step_directory,
    write_latest,
)
from megagpt.checkpoint.format.manifest import MANIFEST_FILE, read_manifest


@pytest.fixture
def run(tmp_path, write_checkpoint, known_config):
    return Run(tmp_path, write_checkpoint)


@pytest.fixture
def steps(run):
    for step in (10, 20, 30):
        run.save(step)
    return run


def test_newest_comes_first_and_every_folder_means_it(steps):
    root = steps.checkpoints.parent
    assert steps.found() == [30, 20, 10]
    assert find_checkpoint(root) == find_checkpoint(steps.checkpoints)
    assert list(find_checkpoints(step_directory(steps.checkpoints, 20))) == [
        step_directory(steps.checkpoints, 20)
    ]
    assert newest_readable(root).state.step == 30


def test_folder_without_a_complete_step_is_told(tmp_path):
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"{path} holds no complete checkpoint"):
            find_checkpoints(path)


def absent(latest):
    latest.unlink()


def another_name(latest):
    latest.write_text('{"step": "../x", "sha256": ""}')


def incomplete(latest):
    (latest.parent / "step_00000040").mkdir()
    latest.write_text('{"step": "step_00000040", "sha256": ""}')


def link(latest):
    latest.rename(latest.parent / "elsewhere.json")
    latest.symlink_to("elsewhere.json")


def dangling(latest):
    latest.unlink()
    latest.symlink_to("nowhere")


def folder(latest):
    latest.unlink()
    latest.mkdir()


def content(text):
    def write(latest):
        latest.write_bytes(text)

    return write


whatever_latest_is = pytest.mark.parametrize(
    "change",
    [
        *(absent, another_name, incomplete, link, dangling, folder),
        *map(content, [b"", b"\xff\x00", b"step_00000030", b"[]", b"30", b'{"step": 30}', b"{}"]),
        *map(content, [b"[" * 100_000, b'{"step": null, "sha256": null}']),
    ],
)


@whatever_latest_is
def test_newest_is_found_whatever_latest_is(steps, change):
    change(steps.checkpoints / LATEST_FILE)
    assert steps.found() == [30, 20, 10]
    assert newest_readable(steps.checkpoints).state.step == 30


@whatever_latest_is
def test_newest_of_a_run_that_went_back_is_found_too(steps, change):
    steps.resume(10)
    steps.save(20)
    change(steps.checkpoints / LATEST_FILE)
    assert steps.found() == [20, 10]  # not 30, which has a higher number


def test_step_after_one_that_latest_names_and_is_gone_is_the_newest(steps):
    steps.resume(10)
    steps.save(20)
    steps.save(25, is_named=False)
    shutil.rmtree(step_directory(steps.checkpoints, 20))
    assert steps.found() == [25, 10]


def test_manifests_that_name_each_other_do_no_harm(steps):
    for step, links in ((40, ("cd", "ef")), (50, ("ef", "cd")), (60, ("ef", "ef"))):
        folder = step_directory(steps.checkpoints, step)
        folder.mkdir()
        own, previous = (2 * each * 16 for each in links)
        head = (f'"sha256": "{own}"', '"created": "9"', f'"previous": "{previous}"', '"line": []')
        (folder / MANIFEST_FILE).write_text("{\n " + ",\n ".join(head) + ",\n")
    assert steps.found()[0] == 30
    for step, previous in ((40, "[]"), (50, "{}"), (60, "5")):
        head = ('"sha256": []', '"created": 9', f'"previous": {previous}', '"line": [[1, 2]]')
        folder = step_directory(steps.checkpoints, step)
        (folder / MANIFEST_FILE).write_text("{\n " + ",\n ".join(head) + ",\n")
    assert steps.found()[0] == 30
    write_latest(steps.checkpoints, 40, "ef" * 32)
    assert steps.found()[0] == 40


def test_latest_is_told_as_written(steps):
    assert read_latest(steps.checkpoints) == (30, steps.previous)
    write_latest(steps.checkpoints, 123456789, "ab")
    assert read_latest(steps.checkpoints) == (123456789, "ab")
    for name in ("../step_00000010", "step_00000010/..", "step_1", ".staging_step_00000010"):
        (steps.checkpoints / LATEST_FILE).write_text(f'{{"step": "{name}", "sha256": ""}}')
        assert read_latest(steps.checkpoints) is None


def test_latest_that_is_a_link_is_replaced_and_its_target_kept(steps, tmp_path):
    (tmp_path / "mine").write_text("kept")
    (steps.checkpoints / LATEST_FILE).unlink()
    (steps.checkpoints / LATEST_FILE).symlink_to(tmp_path / "mine")
    write_latest(steps.checkpoints, 20, "")
    assert (tmp_path / "mine").read_text() == "kept"


def test_newest_after_going_back_is_that_of_the_new_line(steps):
    steps.resume(10)
    steps.save(15)
    assert steps.found() == [15, 10]
    steps.save(20)  # anew, over the one of the line that was left
    assert steps.found() == [20, 15, 10]
    steps.save(25)
    assert steps.found() == [25, 20, 15, 10]
    steps.save(30)
    assert steps.found() == [30, 25, 20, 15, 10]


def test_steps_of_a_line_that_was_left_are_passed_over(steps):
    steps.resume(10)
    steps.save(25)
    assert steps.found() == [25, 10]  # 20 did not lead to it
    steps.save(45)
    assert steps.found() == [45, 25, 10]


def test_line_goes_on_over_steps_that_are_gone_or_damaged(steps):
    for step in (40, 50, 60):
        steps.save(step)
    shutil.rmtree(step_directory(steps.checkpoints, 50))  # as retention does
    assert steps.found() == [60, 40, 30, 20, 10]
    (step_directory(steps.checkpoints, 30) / MANIFEST_FILE).write_bytes(b"")
    assert steps.found() == [60, 40, 20, 10]
    steps.resume(20)
    steps.save(70)
    assert steps.found() == [70, 20, 10]
    steps.save(40)  # anew, so that what 60 names is gone
    steps.resume(60)
    steps.save(80)
    assert steps.found() == [80, 60, 20, 10]


def test_where_the_newest_says_nothing_the_next_lower_step_stands_for_it(steps):
    steps.resume(10)
    steps.save(25)
    (step_directory(steps.checkpoints, 25) / MANIFEST_FILE).write_bytes(b"")
    assert steps.found() == [25, 20, 10]


def test_first_step_of_a_run_from_another_folder_has_no_step_before_it(steps):
    steps.line = ()
    steps.save(40)
    assert steps.found() == [40]
    steps.save(50)
    assert steps.found() == [50, 40]


@pytest.mark.parametrize("step", [15, 30, 35])
def test_first_step_of_a_new_line_that_a_kill_left_unnamed_is_found(steps, step):
    steps.resume(10)
    steps.save(step, is_named=False)
    assert steps.found() == [step, 10]


def test_step_that_a_kill_left_unnamed_is_the_newest(steps):
    steps.save(40, is_named=False)
    assert steps.found() == [40, 30, 20, 10]
    steps.save(50, is_named=False)
    assert steps.found() == [50, 40, 30, 20, 10]


def test_unnamed_step_of_the_new_line_is_told_from_the_old_ones(steps):
    steps.resume(10)
    steps.save(15)
    steps.save(20, is_named=False)  # over the old 20, whose line is 10, 20, 30
    assert steps.found() == [20, 15, 10]


def test_damaged_newest_gives_way_to_the_one_that_led_to_it(steps):
    steps.resume(10)
    steps.save(25)
    damage_manifest(steps.checkpoints, 25)
    # Not to 20 or 30, which are of the line that was left.
    assert steps.found() == [25, 10]
    assert newest_readable(steps.checkpoints).state.step == 10


def test_step_saved_after_a_damaged_one_that_latest_names_is_found(steps):
    steps.save(40, is_named=False)
    damage_manifest(steps.checkpoints, 30)
    assert steps.found() == [40, 30, 20, 10]


def test_step_written_anew_and_not_named_is_the_newest(steps):
    steps.save(40)
    write_latest(steps.checkpoints, 20, read_manifest(step_directory(steps.checkpoints, 20)).sha256)
    shutil.rmtree(step_directory(steps.checkpoints, 30))
    steps.resume(10)
    steps.save(20, is_named=False)
    assert steps.found() == [20, 10]
    steps.save(30, is_named=False)
    assert steps.found() == [30, 20, 10]


def test_a_wrong_name_in_latest_is_set_right_by_the_hash(steps):
    shutil.rmtree(step_directory(steps.checkpoints, 20))  # nothing leads from 10 to 30
    write_latest(steps.checkpoints, 10, steps.previous)
    assert steps.found() == [30, 10]


def test_all_damaged_tells_the_last_one(steps):
    for step in (10, 20, 30):
        damage_manifest(steps.checkpoints, step)
    with pytest.raises(ValueError, match=f"step_00000010/{MANIFEST_FILE} is damaged"):
        newest_readable(steps.checkpoints)
