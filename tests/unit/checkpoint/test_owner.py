"""One run at a time writes to a folder of checkpoints, and none keeps it after its end."""

import json
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from megagpt.checkpoint import owner as owner_module
from megagpt.checkpoint.owner import OWNER_FILE, FolderTaken, Ownership, is_owned

HOLD = """
import sys, time
from pathlib import Path
from megagpt.checkpoint.owner import Ownership
owner = Ownership(Path(sys.argv[1]))
print(owner.token, flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the folder, and its token."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def pretend_other_host(folder):
    owner = json.loads((folder / OWNER_FILE).read_text())
    (folder / OWNER_FILE).write_text(json.dumps(owner | {"place": "elsewhere"}))


def test_a_live_run_of_this_host_keeps_another_out(tmp_path, other, monkeypatch):
    monkeypatch.setattr(owner_module, "_DYING_SECONDS", 0.3)
    process, token = other
    with pytest.raises(
        ValueError, match=rf"written by another run \(process {process.pid}\); wait"
    ):
        Ownership(tmp_path)
    assert is_owned(tmp_path, token)


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_killed_run_keeps_nobody_out(tmp_path, other, is_reaped):
    process, token = other
    process.send_signal(signal.SIGKILL)
    if is_reaped:
        process.wait()
    owner = Ownership(tmp_path)
    owner.require()
    assert is_owned(tmp_path, owner.token) and not is_owned(tmp_path, token)


def test_a_process_that_has_the_old_ones_number_keeps_nobody_out(tmp_path, other):
    owner = json.loads((tmp_path / OWNER_FILE).read_text())
    (tmp_path / OWNER_FILE).write_text(json.dumps(owner | {"started": owner["started"] - 60}))
    Ownership(tmp_path).require()


def test_a_run_of_another_host_is_taken_over_and_learns_of_it(tmp_path):
    first = Ownership(tmp_path)
    pretend_other_host(tmp_path)
    first.require()
    second = Ownership(tmp_path)
    second.require()
    with pytest.raises(FolderTaken, match=rf"taken by another run, on {socket.gethostname()}"):
        first.require()
    first.release()
    second.require()
    second.release()
    with pytest.raises(FolderTaken):  # not though the other has ended: it may have saved
        first.require()


def test_a_folder_that_was_taken_over_and_left_unchanged_is_given_back(tmp_path):
    first = Ownership(tmp_path)
    pretend_other_host(tmp_path)
    Ownership(tmp_path).release()
    first.require()


def test_a_file_that_someone_removed_is_written_again(tmp_path):
    owner = Ownership(tmp_path)
    (tmp_path / OWNER_FILE).unlink()
    owner.require()
    assert is_owned(tmp_path, owner.token)


def test_a_folder_that_is_no_longer_mounted_is_not_written(tmp_path):
    (tmp_path / "mounted").mkdir()
    owner = Ownership(tmp_path / "mounted")
    owner.require()
    (tmp_path / "mounted").rename(tmp_path / "elsewhere")
    (tmp_path / "mounted").mkdir()
    with pytest.raises(OSError, match="is it still mounted"):
        owner.require()
    assert not list((tmp_path / "mounted").iterdir())


def test_a_copied_folder_does_not_belong_to_the_owner_of_the_first(tmp_path, other):
    shutil.copytree(tmp_path, tmp_path / "copy")
    Ownership(tmp_path / "copy").require()


def test_a_damaged_file_is_told_and_not_taken_for_another_run(tmp_path):
    owner = Ownership(tmp_path)
    (tmp_path / OWNER_FILE).write_bytes(b"\xff")
    with pytest.raises(OSError, match="is damaged; remove it") as caught:
        owner.require()
    assert not isinstance(caught.value, FolderTaken)


def test_a_file_that_cannot_be_read_is_not_taken_for_another_run(tmp_path):
    owner = Ownership(tmp_path)
    (tmp_path / OWNER_FILE).unlink()
    (tmp_path / OWNER_FILE).mkdir()
    with pytest.raises(IsADirectoryError):
        owner.require()


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"place": 1, "pid": "x"}']
)
def test_whatever_stands_in_the_file_a_run_can_take_the_folder(tmp_path, content):
    (tmp_path / OWNER_FILE).write_bytes(content)
    assert not is_owned(tmp_path, "")
    Ownership(tmp_path).require()


def test_folder_that_cannot_be_written_is_told_by_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        Ownership(tmp_path / "absent")
