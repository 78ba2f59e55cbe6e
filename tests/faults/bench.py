"""What every row works with: a tiny run, its uninterrupted reference, mounts, and launches.

Next files, which hold the rows: `killing.py`, `storage.py`, `sharing.py`, `reading.py`,
`resuming.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path

from ranks import ROOT, SCRIPT, Fault, Ranks

from megagpt.checkpoint.directory import (
    LATEST_FILE,
    complete_steps,
    find_checkpoint,
    newest_state,
)
from megagpt.checkpoint.format.manifest import KINDS
from megagpt.checkpoint.format.reader import CheckpointReader, verify_checkpoint
from megagpt.checkpoint.owner import OWNER_FILE
from megagpt.testing.corpus import byte_corpus

TRAIN_STEPS = 80
REFERENCE_STEPS = 60
BASE_STEPS = 3
"""Steps of the run that rows copy and go on from; each of them is saved."""
EVERY_STEP = ("--checkpoint.save_interval", "1")
AUTO = ("--checkpoint.load", "auto")
KEEP_TWO = ("--checkpoint.keep_last", "2")


class Findings:
    """What a row found wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.tried: list[str] = []
        """Each case of a row that has many, for build/faults.json."""

    def check(self, holds: bool, problem: str) -> None:
        """Notes a promise that is not kept."""
        if not holds:
            self.problems.append(problem)

    def ended_by_one_line(self, ranks: Ranks, codes: list[int], text: str, name: str) -> str:
        """Checks for exit code 1 on every rank and one `error:` line with a text; the line."""
        errors = ranks.errors()
        self.check(all(code == 1 for code in codes), f"{name}: exit codes {codes}")
        self.check(len(errors) == 1, f"{name}: {len(errors)} error lines {errors}")
        self.check(any(text in line for line in errors), f"{name}: {errors} does not say {text}")
        self.check("Traceback" not in ranks.output(0), f"{name}: a traceback")
        return errors[0] if errors else ""


class Bench:
    """Data, a reference run without faults, and folders to try faults on.

    Args:
        root: A folder of its own, emptied by whoever made it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()  # strace compares paths as they are written

    @cached_property
    def data(self) -> Path:
        """This repository's licence as bytes."""
        words = (ROOT / "LICENSE").read_text().split()
        return byte_corpus(
            self.root, (" ".join(words[i : i + 60]) for i in range(0, len(words), 4))
        )

    def arguments(self, run: Path, *extra: str) -> list[str]:
        """Of `launch/pretrain.py`, for the tiny run; later ones override."""
        return [
            *"--model.num_layers 1 --model.hidden_size 32 --model.num_attention_heads 2".split(),
            *"--model.seq_length 32 --model.vocab_padding_multiple 8".split(),
            *"--batch.micro_batch_size 2 --batch.global_batch_size 8".split(),
            *"--training.precision fp32 --training.eval_interval 0".split(),
            *("--training.train_steps", str(TRAIN_STEPS), "--ds_config"),
            *(str(ROOT / "ds_configs/zero1.json"), "--data.path", str(self.data)),
            *("--data.split", "8,1,1", "--output_dir", str(run), *extra),
        ]

    def ranks(
        self, run: Path, *extra: str, world_size: int = 2, faults: Sequence[Fault] = ()
    ) -> Ranks:
        """Ranks of the tiny run."""
        return Ranks(self.arguments(run, *extra), self.root, world_size=world_size, faults=faults)

    def train(self, run: Path, *extra: str, world_size: int = 2) -> Ranks:
        """A run from start to end, which must succeed."""
        with self.ranks(run, *extra, world_size=world_size) as ranks:
            codes = ranks.wait()
        if any(codes):
            raise RuntimeError(f"exit codes {codes}:\n" + "".join(map(ranks.output, range(2))))
        return ranks

    @cached_property
    def reference(self) -> dict[int, str]:
        """Hash of weights and moments after each step of a run that nothing happened to."""
        run = self.root / "reference"
        self.train(run, *EVERY_STEP, "--training.exit_step", str(REFERENCE_STEPS))
        return {step: digest(path) for step, path in complete_steps(run / "checkpoints").items()}

    @cached_property
    def reference_losses(self) -> dict[int, float]:
        """Its losses."""
        assert self.reference
        return losses(self.root / "reference")

    @cached_property
    def base(self) -> Path:
        """A run of BASE_STEPS steps."""
        run = self.root / "base"
        self.train(run, *EVERY_STEP, "--training.exit_step", str(BASE_STEPS))
        return run

    def copy(self, name: str) -> Path:
        """A copy of the base run."""
        run = self.root / name
        shutil.copytree(self.base, run)
        return run

    @contextlib.contextmanager
    def small_disk(self, run: Path, options: str) -> Iterator[Path]:
        """A tmpfs in place of the checkpoints of a run, with its newest step."""
        checkpoints = run / "checkpoints"
        with tempfile.TemporaryDirectory(dir=self.root) as aside:
            kept = Path(aside) / "checkpoints"
            checkpoints.rename(kept)
            checkpoints.mkdir()
            with mounted(checkpoints, options):
                newest = step_folder(run, BASE_STEPS).name
                shutil.copytree(kept / newest, checkpoints / newest)
                shutil.copy(kept / "latest", checkpoints)
                yield checkpoints


def step_folder(run: Path, step: int, *, staging: bool = False) -> Path:
    """Folder of a step, or where it is written."""
    return run / "checkpoints" / f"{'.staging_' * staging}step_{step:08d}"


def digest(directory: Path) -> str:
    """Hash of all weights and moments of a step folder, whatever files they are in."""
    sha256 = hashlib.sha256()
    with CheckpointReader(directory) as reader:
        for name in sorted(reader.manifest.tensors):
            for kind in KINDS:
                sha256.update(f"{name} {kind}".encode() + reader.tensor(name, kind).tobytes())
    return sha256.hexdigest()


def losses(run: Path) -> dict[int, float]:
    """Loss by step, as float32, from the event files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # It tells of what a killed run wrote and a resumed one wrote again.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {point.step: point.value for point in events.Scalars("lm loss")}


def newest_step(run: Path) -> int:
    """The step that a resume takes."""
    return newest_state(run).step


def check_intact(findings: Findings, run: Path, reference: dict[int, str], name: str) -> int:
    """Checks that the newest step is whole and what the reference has; returns it."""
    newest = find_checkpoint(run)
    step = newest_step(run)
    problems = verify_checkpoint(newest)
    findings.check(not problems, f"{name}: {problems}")
    if not problems:
        findings.check(digest(newest) == reference[step], f"{name}: step {step} has other values")
    return step


def clutter(run: Path) -> list[str]:
    """What lies beside the complete steps of a run."""
    complete = {path.name for path in complete_steps(run / "checkpoints").values()}
    names = {path.name for path in (run / "checkpoints").iterdir()}
    return sorted(names - complete - {LATEST_FILE, OWNER_FILE})


# --- mounts


@cache
def mounting_problem() -> str | None:
    """Why no small disk can be mounted here; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "mounting a small disk needs root on Linux"
    with tempfile.TemporaryDirectory() as directory:
        try:
            with mounted(Path(directory), "size=64k"):
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            return f"a tmpfs cannot be mounted here: {error}"


@contextlib.contextmanager
def mounted(directory: Path, options: str) -> Iterator[None]:
    """A tmpfs on a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def remount(directory: Path, option: str) -> None:
    """Changes a mount, as `ro` or `size=1m`; waits until no file stands against it."""
    for _ in range(500):
        words = ["mount", "-o", f"remount,{option}", str(directory)]
        if subprocess.run(words, capture_output=True).returncode == 0:
            return
        time.sleep(0.005)
    raise TimeoutError(f"{directory} cannot be remounted with {option}")


# --- the real launcher


class Launch:
    """`torchrun launch/pretrain.py` on two ranks; a context manager that leaves no process behind.

    Args:
        arguments: Of the script.
        log: Where the output goes.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        torchrun = Path(sys.executable).parent / "torchrun"
        words = [str(torchrun), "--standalone", "--nproc_per_node", "2", str(SCRIPT), *arguments]
        self._log = log
        self._tracers: list[subprocess.Popen] = []
        with log.open("w") as file:
            self.process = subprocess.Popen(
                words,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            for pid in [self.process.pid, *_descendants(self.process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for tracer in self._tracers:
            tracer.kill()
            tracer.wait()

    def inject(self, fault: Fault) -> None:
        """Attaches strace to a running rank."""
        words = fault.command(self.rank_pid(fault.rank), Path(os.devnull))
        self._tracers.append(
            subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
        )

    def output(self) -> str:
        """All that was printed so far."""
        return self._log.read_text()

    def wait(self, timeout_seconds: float = 150) -> int:
        """The exit code of the launcher."""
        return self.process.wait(timeout_seconds)

    def until(self, text: str, timeout_seconds: float = 120) -> None:
        """Waits until a text was printed."""
        deadline = time.monotonic() + timeout_seconds
        while text not in self.output():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise TimeoutError(f"{text!r} was not printed:\n{self.output()[-3000:]}")
            time.sleep(0.005)

    def rank_pid(self, rank: int) -> int:
        """Process of a rank."""
        for pid in _descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(
                    b"\0"
                ):
                    return pid
        raise ProcessLookupError(f"no rank {rank}")


def _descendants(pid: int) -> list[int]:
    """Children of a process and theirs."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, left = [], [pid]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def latest_step(run: Path) -> str:
    """What `latest` names."""
    return json.loads((run / "checkpoints" / "latest").read_text())["step"]


def short(line: str) -> str:
    """An error line without its folders and its remedy."""
    return re.sub(r"/\S*/", "", line.removeprefix("error: ").partition("; free")[0])
