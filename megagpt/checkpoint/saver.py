"""Saving and loading the state of a run, whatever the layout; the room's face.

Every rank writes what it owns into a staging folder; when all have succeeded, rank 0 writes the
manifest and renames the folder. Loading reads, for each range that this rank holds, the pieces of
the checkpoint that meet it.
Next files: `state/parts.py` (what a rank holds), `format/shard_file.py` (how it is written),
`commit.py` (how it becomes a step), `loader.py`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypeVar

import deepspeed
import numpy as np

from megagpt.checkpoint.agreement import Agreement, in_words
from megagpt.checkpoint.background import Background
from megagpt.checkpoint.commit import Committer, Shard
from megagpt.checkpoint.directory import staging_directory, step_directory
from megagpt.checkpoint.format.manifest import (
    CheckpointState,
    Layout,
    optimizer_file,
    tensor_key,
    weights_file,
)
from megagpt.checkpoint.format.reader import CheckpointReader
from megagpt.checkpoint.format.shard_file import FileRecord, ShardWriter
from megagpt.checkpoint.loader import CheckpointRefused, load_checkpoint
from megagpt.checkpoint.owner import FolderTaken, is_owned, require_owner
from megagpt.checkpoint.state.optimizer_state import optimizer_state
from megagpt.checkpoint.state.parts import held_parts, owned_parts, owned_tensors
from megagpt.checkpoint.state.snapshot import (
    HostCopy,
    Tensors,
    live_tensors,
    random_states,
    restore_random_states,
)
from megagpt.config.schema import CheckpointConfig
from megagpt.parallel.groups import ProcessGroups

_T = TypeVar("_T")


class SaveFailed(OSError):
    """A checkpoint could not be written; the ones before are as they were.

    Args:
        message: Of one line.
        is_final: Whether no later save can succeed either.
    """

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


class Checkpointer:
    """Saves and loads one engine; every rank must make one and call it alike.

    The folder is on a file system that all ranks share; `vocab_size` is without padding; the
    agreement is closed with it.

    Raises:
        CheckpointRefused: On every rank, if not all of them see the same folder, if it cannot be
            written, or if another run is at work in it.
    """

    def __init__(
        self,
        checkpoints: Path,
        engine: deepspeed.DeepSpeedEngine,
        groups: ProcessGroups,
        *,
        layout: Layout,
        vocab_size: int,
        config: CheckpointConfig,
        agreement: Agreement,
    ) -> None:
        self.checkpoints = checkpoints
        self.config = config
        self.layout = layout
        self._engine = engine
        self._rank = groups.rank
        self.agreement = agreement
        self._state = optimizer_state(engine)
        names = {id(p): name for name, p in engine.module.canonical_parameters()}
        self._parts = held_parts(self._state, names, groups, vocab_size=vocab_size)
        self._copy = HostCopy(self._state, self._parts, engine.device)
        self._background = Background()
        self._committer: Committer | None = None  # of rank 0, for all
        self._open_directory()

    def close(self) -> None:
        """Ends a save in the background, the group of its own, and the hold on the folder."""
        self.finish()
        self.agreement.close()
        self._release()

    def abandon(self, timeout_seconds: float) -> None:
        """Gives a save in the background this long to end, where training has failed."""
        # What a thread that goes on has taken stays its own, until the process ends.
        if self._background.ends_within(timeout_seconds):
            self._release()

    def _release(self) -> None:
        if self._committer is not None:
            self._committer.owner.release()

    def _open_directory(self) -> None:
        """Takes the folder, which all ranks must mean."""
        problem = ""
        if self._rank == 0:
            try:
                self._committer = Committer(
                    self.checkpoints, layout=self.layout, config=self.config
                )
            except Exception as error:
                problem = in_words(error)
                if isinstance(error, OSError) and not isinstance(error, FolderTaken):
                    problem = f"{self.checkpoints} cannot be written ({error.strerror})"
        self._token = self.agreement.of_rank_0(
            self._committer.owner.token if self._committer else ""
        )
        if not problem and not is_owned(self.checkpoints, self._token):
            problem = (
                f"{self.checkpoints.absolute()} is not the folder that rank 0 writes to; give "
                "every rank the same --output_dir, on a file system that all hosts share"
            )
        problem = self.agreement.first(problem)
        if problem:
            self._release()
            raise CheckpointRefused(problem)

    # --- saving

    def save(self, state: CheckpointState) -> None:
        """Saves a step; a collective.

        With `async_save` it returns when the state is copied to host memory, and an error comes out
        of a later `save` or `finish`.

        Raises:
            SaveFailed: On every rank, if any rank could not write, now or at the save before.
        """
        self.finish()
        state = dataclasses.replace(
            state, adam_step=self._state.adam_step, loss_scaler=self._state.loss_scaler
        )
        extras = random_states(self._engine.device)
        if self.config.async_save:
            self._together(self._copy.fill)
            self._background.start(lambda: self._write(state, extras, self._copy.tensors()))
        else:
            self._write(state, extras, live_tensors(self._state, self._parts))

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed; other ranks may learn of it later."""
        return self._background.has_failed

    def finish(self) -> None:
        """Waits for a save in the background, in which all ranks succeed or fail together.

        Raises:
            SaveFailed: On every rank, if it failed.
        """
        self._background.wait()

    def _write(
        self, state: CheckpointState, extras: dict[str, np.ndarray], tensors: Tensors
    ) -> None:
        """Writes and commits a step, all ranks together."""
        staging = staging_directory(step_directory(self.checkpoints, state.step))

        def stage() -> None:
            if self._committer is not None:
                self._committer.stage(state.step)

        def commit() -> None:
            if self._committer is not None and shards is not None:
                self._committer.commit(state, shards)

        self._together(stage, staging)
        files = self._together(lambda: self._write_files(staging, extras, tensors), staging)
        parts = ((part.name, part.shape, part.piece) for part in owned_parts(self._parts))
        shards = self.agreement.gather(Shard.of(parts, files))
        self._together(commit, staging)

    def _write_files(
        self, staging: Path, extras: dict[str, np.ndarray], tensors: Tensors
    ) -> dict[str, FileRecord]:
        """Writes this rank's two files, both at once, so that each unit is brought up once."""
        require_owner(self.checkpoints, self._token)
        names = (weights_file(self._rank), optimizer_file(self._rank))
        headers: tuple[dict, dict] = ({}, {name: (v.shape, v.dtype) for name, v in extras.items()})
        for kind, part in owned_tensors(self._parts):
            in_optimizer, key = tensor_key(kind, part.name)
            headers[in_optimizer][key] = (part.stored_shape, np.dtype(np.float32))
        with ExitStack() as stack:
            # A unit that it has brought into memory goes back, whatever happens.
            stack.enter_context(closing(tensors))
            writers = []
            for name, header in zip(names, headers, strict=True):
                writers.append(ShardWriter(staging / name, header))
                stack.callback(writers[-1].abandon)
            for values in extras.values():
                writers[1].write(values)
            for kind, _, values in tensors:
                writers[tensor_key(kind, "")[0]].write(values)
            return {name: w.close() for name, w in zip(names, writers, strict=True)}

    def _together(self, work: Callable[[], _T], staging: Path | None = None) -> _T:
        """Does this rank's part of a save; raises on every rank if any has failed.

        So none waits for another. A staged step that has failed is removed.
        """
        result: _T
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        mine = None if error is None else (in_words(error), isinstance(error, FolderTaken))
        outcomes = self.agreement.failures(mine)
        if not outcomes:
            return result
        # What stands in a folder that another run has taken is that run's.
        is_own = self._committer is not None and is_owned(self.checkpoints, self._token)
        if staging is not None and is_own:
            shutil.rmtree(staging, ignore_errors=True)
        is_taken = any(is_taken for _, is_taken in outcomes.values())
        # Where a run has lost its folder, other errors follow from that.
        rank, problem = next(
            (rank, words) for rank, (words, taken) in outcomes.items() if taken == is_taken
        )
        remedy = "this run ends" if is_taken else "free space or name a writable --output_dir"
        raise SaveFailed(
            f"checkpoint not saved (rank {rank}: {problem}); {remedy}; earlier checkpoints are "
            "untouched",
            is_final=is_taken,
        ) from error

    # --- loading

    def load(self, path: Path) -> tuple[CheckpointState, Path]:
        """Restores weights, moments and counts from a checkpoint of any layout; a collective.

        Args:
            path: A step folder, which must be whole; or a run folder, of which the newest whole
                step is taken.

        Returns:
            The state of the run, and the step folder.

        Raises:
            CheckpointRefused: On every rank, if nothing could be loaded.
        """
        reader = load_checkpoint(
            path, self._state, self._parts, agreement=self.agreement, restore=self._restore
        )
        if self._committer is not None:
            self._committer.follow(reader.directory, reader.manifest)
        return reader.manifest.state, reader.directory

    def _restore(self, reader: CheckpointReader) -> None:
        """Counts, loss scale and generators."""
        manifest = reader.manifest
        self._state.adam_step = manifest.state.adam_step
        self._state.loss_scaler = manifest.state.loss_scaler
        self._engine.global_steps = manifest.state.step
        self._engine.global_samples = manifest.state.consumed_samples
        self._engine.skipped_steps = manifest.state.step - manifest.state.adam_step
        if manifest.layout == self.layout:
            restore_random_states(self._engine.device, lambda name: reader.extra(self._rank, name))
