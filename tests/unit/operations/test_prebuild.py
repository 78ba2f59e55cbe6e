"""Locks of builds: removed when their process is gone, kept while it is there."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.file_baton import FileBaton

from megagpt.operations.prebuild import extensions_root, remove_stale_locks

HOLD_LOCK = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["op", "py311_cpu/op"], ids=["TORCH_EXTENSIONS_DIR", "cache"])
def lock(request, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / request.param
    folder.mkdir(parents=True)
    return folder / "lock"


def start(command, **kwargs):
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)


def is_kept(lock):
    before = lock.exists()
    remove_stale_locks()
    return before and lock.exists()


def test_lock_of_a_killed_build_is_removed_with_a_message(lock, capsys):
    builder = start([sys.executable, "-c", HOLD_LOCK, str(lock)])
    assert builder.stdout.readline() == "held\n"
    try:
        assert is_kept(lock) and not capsys.readouterr().err
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.wait()
    assert lock.exists()
    assert not is_kept(lock)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(lock) in lines[0]
    # The next build gets the lock at once.
    assert FileBaton(str(lock)).try_acquire()


def test_lock_that_this_process_holds_is_kept(lock):
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert is_kept(lock)
    baton.release()
    remove_stale_locks()  # there is nothing to remove


def test_lock_is_kept_while_a_compiler_works_in_its_folder(lock, tmp_path):
    lock.touch()
    compiler = tmp_path / "ninja"
    shutil.copy(shutil.which("sleep"), compiler)
    process = start([str(compiler), "600"], cwd=lock.parent)
    try:
        deadline = time.monotonic() + 10
        while open(f"/proc/{process.pid}/comm").read() != "ninja\n":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert is_kept(lock)
    finally:
        process.kill()
        process.wait()
    assert not is_kept(lock)


def test_a_library_that_the_killed_build_cut_off_goes_with_its_lock(lock):
    import _ctypes

    lock.touch()
    whole = lock.with_name("whole.so")
    shutil.copy(_ctypes.__file__, whole)
    for name, size in (("empty.so", 0), ("header.so", 64), ("cut.so", whole.stat().st_size - 1)):
        lock.with_name(name).write_bytes(whole.read_bytes()[:size])
    assert not is_kept(lock)
    assert [path.name for path in lock.parent.iterdir()] == ["whole.so"]


def test_a_shell_in_the_folder_does_not_hold_the_lock(lock):
    lock.touch()
    process = start(["sleep", "600"], cwd=lock.parent)
    try:
        assert not is_kept(lock)
    finally:
        process.kill()
        process.wait()


def test_extensions_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_root() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # torch's own answer, without the folder for this Python and accelerator
    from torch.utils.cpp_extension import get_default_build_root

    assert str(extensions_root()) == get_default_build_root()


def test_prebuild_says_that_other_accelerators_need_nothing(monkeypatch, capsys):
    from deepspeed import accelerator

    from megagpt.operations.prebuild import prebuild

    other = accelerator.get_accelerator().__class__()
    other.device_name = lambda: "npu"
    monkeypatch.setattr(accelerator, "get_accelerator", lambda: other)
    prebuild()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "accelerator=npu" in lines[0]


def test_importing_prebuild_needs_no_torch():
    code = "import sys, megagpt.operations.prebuild; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.mark.slow
def test_prebuild_compiles_loads_again_and_mends_a_cut_library(tmp_path):
    code = """
from megagpt.operations import prebuild
prebuild.OPS = {"cpu": ("FusedAdamBuilder",)}
prebuild.async_io_problem = lambda: "not built here"
prebuild.prebuild()
"""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}

    def prebuild():
        return subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=550,
        )

    first = prebuild()
    assert first.returncode == 0, first.stderr
    library = tmp_path / "fused_adam" / "fused_adam.so"
    whole = library.read_bytes()
    again = prebuild()
    assert again.returncode == 0 and library.read_bytes() == whole
    library.write_bytes(whole[: len(whole) // 20])
    (library.parent / "lock").touch()
    mended = prebuild()
    assert mended.returncode == 0, mended.stderr
    assert "stale build lock" in mended.stderr and "cut off" in mended.stderr
    assert len(library.read_bytes()) == len(whole)


def test_without_libaio_the_op_is_left_out_and_nvme_refused_with_what_to_install(
    monkeypatch, capsys
):
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    from megagpt.operations.prebuild import async_io_problem, prebuild

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    assert "apt-get install libaio-dev" in async_io_problem()
    loaded = []
    monkeypatch.setattr(
        "megagpt.operations.prebuild._load", lambda name, title: loaded.append(title)
    )
    assert get_accelerator().device_name() == "cpu"
    prebuild()
    told = capsys.readouterr().err
    assert "AsyncIOBuilder is left out" in told and "libaio-dev" in told
    assert loaded[0].startswith("op 1/3 ")
    assert not any("AsyncIO" in title for title in loaded)
