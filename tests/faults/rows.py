"""The rows of the fault matrix: what is done, what is promised, which function tries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import killing
import reading
import resuming
import sharing
import storage
from bench import Bench, Findings, mounting_problem
from ranks import tracing_problem


@dataclass(frozen=True)
class Row:
    """A fault and the promise that it tries."""

    number: int
    fault: str
    promise: str
    function: Callable[[Bench, Findings], str]
    """Returns what was measured, for the table."""
    needs: Literal["", "strace", "mount"] = ""
    """What this machine must have."""

    @property
    def name(self) -> str:
        """For tests and `--rows`."""
        return f"{self.number}-{self.function.__name__}"

    def problem(self) -> str | None:
        """Why the fault cannot be made here; None if it can."""
        problems = {"strace": tracing_problem, "mount": mounting_problem}
        return problems[self.needs]() if self.needs else None


ROWS = (
    Row(
        1,
        "kill -9 of a rank just before each change that a save makes to the folder",
        "the newest complete step is resumed with no act by hand; at most one interval is lost",
        killing.kill_at_every_stage,
        "strace",
    ),
    Row(
        1,
        "the same under torchrun, at one stage of each rank",
        "another launch goes on to the same bits",
        killing.kill_under_the_launcher,
        "strace",
    ),
    Row(
        2,
        "a rank is late with its shard, then killed",
        "a step never appears before all of it is written",
        killing.publish_race,
        "strace",
    ),
    Row(
        3,
        "the disk is full",
        "all ranks agree that the save failed, earlier steps stay, staging goes; stop or go on",
        storage.full_disk,
        "mount",
    ),
    Row(4, "no inodes are left", "the same", storage.full_inodes, "mount"),
    Row(
        5,
        "EIO, EDQUOT, a short write or a lost write on one rank",
        "every rank ends, one line names rank and cause, nothing is published",
        storage.failing_writes,
        "strace",
    ),
    Row(
        5,
        "EIO while a save is written in the background",
        "the next step finds out; as above",
        resuming.background_save_fails,
        "strace",
    ),
    Row(
        5,
        "EIO while a rank reads the checkpoint",
        "refused with the reason; no older step is taken for what may be mended",
        reading.failing_read,
        "strace",
    ),
    Row(6, "fsync fails", "not published", storage.failing_fsync, "strace"),
    Row(7, "the disk turns read-only", "as row 3", storage.read_only, "mount"),
    Row(8, "slow storage", "no failure", storage.slow_storage, "strace"),
    Row(
        9,
        "a file is truncated: to nothing, to half, by a byte",
        "refused by name; auto falls back one step and says so",
        reading.truncated,
    ),
    Row(
        10,
        "one bit of a file flips, 1,200 times",
        "all found before a tensor is used",
        reading.flipped,
    ),
    Row(
        11,
        "a file is missing, swapped or too many",
        "missing and swapped refused, strays ignored and named",
        reading.foreign_files,
    ),
    Row(
        12,
        "latest is empty, garbage, a path, a link, or names no complete step",
        "the newest complete step is resumed",
        reading.odd_latest,
    ),
    Row(
        13,
        "ranks disagree on the folder",
        "refused before the first byte",
        sharing.ranks_disagree,
    ),
    Row(
        14,
        "retention among incomplete folders",
        "only complete steps count, the newest stays",
        sharing.retention,
    ),
    Row(
        15,
        "kill -9 of a rank under torchrun at a random step",
        "later losses and the final state are bit-equal",
        resuming.killed_under_the_launcher,
    ),
    Row(
        16,
        "resumed on another layout",
        "losses within tolerance, Adam's count kept",
        resuming.resumed_on_another_layout,
    ),
    Row(
        17,
        "a manifest that lacks something; another model's checkpoint",
        "refused by name",
        reading.other_content,
    ),
    Row(
        18,
        "one setting changed",
        "refused by name; with override it goes on and logs it, the shape never",
        reading.drifted,
    ),
    Row(
        19,
        "killed with dropout on",
        "masks and each rank's random state as in the run without",
        resuming.dropout_and_random_states,
    ),
    Row(
        23,
        "nothing to resume from",
        "exit code 1 and one line, never training from scratch",
        reading.nothing_to_resume,
    ),
    Row(
        29,
        "two runs in one folder: on one host, or one of them on a host that was cut off",
        "never do both commit: the second is refused, or the first learns that it is over",
        sharing.two_runs,
    ),
    Row(
        35,
        "SIGTERM to one rank while a save is written in the background",
        "both steps are complete, exit code 75",
        resuming.told_to_stop,
        "strace",
    ),
    Row(
        41,
        "pickles in place of each file, with and without a manifest that vouches for them",
        "never run; refused",
        reading.hostile,
    ),
)
