"""Saving and loading the state of a run, whatever the layout; the room's face.

Every rank writes what it owns into a staging folder; when all have succeeded, rank 0 writes the
manifest and renames the folder. Loading reads, for each range that this rank holds, the pieces of
the checkpoint that meet it.
Next files: `parts.py` (what a rank holds), `shard_file.py` (how it is written).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import shutil
import threading
from contextlib import ExitStack, closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch

from megagpt import __version__
from megagpt.checkpoint.agreement import Agreement, in_words
from megagpt.checkpoint.directory import (
    newest_sha256,
    publish,
    remove_leftovers,
    remove_step,
    staging_directory,
    step_directory,
    steps_to_remove,
    write_latest,
)
from megagpt.checkpoint.format.manifest import (
    CheckpointManifest,
    CheckpointState,
    Layout,
    Piece,
    TensorRecord,
    check_cover,
    optimizer_file,
    read_links,
    tensor_key,
    weights_file,
    write_manifest,
)
from megagpt.checkpoint.format.reader import CheckpointReader
from megagpt.checkpoint.format.shard_file import FileRecord, ShardWriter
from megagpt.checkpoint.loader import CheckpointRefused, load_checkpoint
from megagpt.checkpoint.owner import FolderTaken, Ownership, is_owned, require_owner
from megagpt.checkpoint.state.optimizer_state import optimizer_state
from megagpt.checkpoint.state.parts import held_parts, owned_parts, owned_tensors
from megagpt.checkpoint.state.snapshot import HostCopy, Tensors, live_tensors
from megagpt.config.schema import CheckpointConfig
from megagpt.parallel.groups import ProcessGroups

logger = logging.getLogger("megagpt")

_RANDOM_STATES = ("random.cpu", "random.cuda")


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

    Args:
        checkpoints: Folder of the steps, on a file system that all ranks share.
        engine: Of any layout.
        groups: Of the layout.
        layout: The same, as the manifest tells it.
        vocab_size: Of the model, without padding.
        config: How often and how many.

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
    ) -> None:
        self.checkpoints = checkpoints
        self.config = config
        self.layout = layout
        self._engine = engine
        self._groups = groups
        self._agreement = Agreement()
        self._state = optimizer_state(engine)
        names = {id(p): name for name, p in engine.module.canonical_parameters()}
        self._parts = held_parts(self._state, names, groups, vocab_size=vocab_size)
        self._copy = HostCopy(self._state, self._parts, engine.device)
        self._owner: Ownership | None = None  # of rank 0, for all
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._previous: str | None = None  # as in the manifest, of the next save
        self._line: tuple[tuple[int, str], ...] = ()
        self._open_directory()

    def close(self) -> None:
        """Ends a save in the background, the group of its own, and the hold on the folder."""
        self.finish()
        self._agreement.close()
        if self._owner is not None:
            self._owner.release()

    def abandon(self, timeout_seconds: float) -> None:
        """Gives a save in the background this long to end, where training has failed."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                return  # what it has taken stays its own, until the process ends
        if self._owner is not None:
            self._owner.release()

    def _open_directory(self) -> None:
        """Takes the folder, which all ranks must mean, and removes what a killed run left."""
        problem = ""
        if self._groups.rank == 0:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                self._owner = Ownership(self.checkpoints)
                self._previous = newest_sha256(self.checkpoints)
                if not is_owned(self.checkpoints, self._owner.token):
                    raise FolderTaken(f"{self.checkpoints} was taken by a run that started with it")
            except FolderTaken as error:
                problem = str(error)
            except OSError as error:
                problem = f"{self.checkpoints} cannot be written ({error.strerror})"
            except Exception as error:
                problem = in_words(error)
        self._token = self._agreement.of_rank_0(self._owner.token if self._owner else "")
        if not problem and not is_owned(self.checkpoints, self._token):
            problem = (
                f"{self.checkpoints.absolute()} is not the folder that rank 0 writes to; give "
                "every rank the same --output_dir, on a file system that all hosts share"
            )
        problem = self._agreement.first(problem)
        if problem:
            if self._owner is not None:
                self._owner.release()
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
        extras = _random_states()
        if not self.config.async_save:
            self._write(state, extras, live_tensors(self._state, self._parts))
            return
        error: Exception | None = None
        try:
            self._copy.fill()
        except Exception as caught:
            error = caught
        self._agree(error)
        self._thread = threading.Thread(
            target=self._write_in_background, args=(state, extras), daemon=True
        )
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed; other ranks may learn of it later."""
        return self._error is not None

    def finish(self) -> None:
        """Waits for a save in the background, in which all ranks succeed or fail together.

        Raises:
            SaveFailed: On every rank, if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_in_background(self, state: CheckpointState, extras: dict[str, np.ndarray]) -> None:
        try:
            self._write(state, extras, self._copy.tensors())
        except Exception as error:  # told by `finish`, on the thread that trains
            self._error = error

    def _write(
        self, state: CheckpointState, extras: dict[str, np.ndarray], tensors: Tensors
    ) -> None:
        """Writes and commits a step, all ranks together."""
        target = step_directory(self.checkpoints, state.step)
        staging = staging_directory(target)
        error: Exception | None = None
        if self._owner is not None:
            try:
                self._owner.require()
                remove_leftovers(self.checkpoints)
                staging.mkdir()
            except OSError as caught:
                error = caught
        self._agree(error, staging)
        files: dict[str, FileRecord] = {}
        try:
            require_owner(self.checkpoints, self._token)
            files = self._write_files(staging, extras, tensors)
        except Exception as caught:
            error = caught
        self._agree(error, staging)
        pieces = [(part.name, part.shape, part.piece) for part in owned_parts(self._parts)]
        gathered = self._agreement.gather((pieces, files))
        if gathered is not None and self._owner is not None:
            try:
                self._commit(state, staging, target, gathered, self._owner)
            except Exception as caught:
                error = caught
        self._agree(error, staging)

    def _write_files(
        self, staging: Path, extras: dict[str, np.ndarray], tensors: Tensors
    ) -> dict[str, FileRecord]:
        """Writes this rank's two files, both at once, so that each unit is brought up once."""
        names = (weights_file(self._groups.rank), optimizer_file(self._groups.rank))
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

    def _commit(
        self,
        state: CheckpointState,
        staging: Path,
        target: Path,
        gathered: list[Any],
        owner: Ownership,
    ) -> None:
        pieces: dict[str, tuple[tuple[int, ...], list[Piece]]] = {}
        files: dict[str, FileRecord] = {}
        for shard, (parts, written) in enumerate(gathered):
            files |= written
            for name, shape, piece in parts:
                pieces.setdefault(name, (shape, []))[1].append(Piece(shard, piece))
        tensors = {name: TensorRecord(shape, tuple(all_)) for name, (shape, all_) in pieces.items()}
        check_cover(tensors)
        manifest = CheckpointManifest(
            state=state,
            layout=self.layout,
            tensors=tensors,
            files=files,
            versions={
                "megagpt": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
            },
            created=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            previous=self._previous,
            line=tuple(each for each in self._line if not self._is_gone(*each, state.step)),
        )
        owner.require()
        sha256 = write_manifest(staging, manifest)
        owner.require()
        problem: OSError | None = None
        try:
            publish(staging, target)
        except OSError as error:
            if staging.exists():
                raise
            problem = error
        self._previous, self._line = sha256, ((state.step, sha256), *manifest.line)
        try:
            owner.require()
            write_latest(self.checkpoints, state.step, sha256)
        except OSError as error:
            problem = error
        if problem is not None:
            raise type(problem)(f"{target} is complete, but not named or not safe yet: {problem}")
        self._remove_old_steps(owner)

    def _is_gone(self, step: int, sha256: str, next_step: int) -> bool:
        """Whether another has its place, or will have; what cannot be read now may come back."""
        directory = step_directory(self.checkpoints, step)
        links = read_links(directory)
        is_other = links is not None and links.sha256 != sha256
        return is_other or step >= next_step or not os.path.lexists(directory)

    def _remove_old_steps(self, owner: Ownership) -> None:
        """Retention; what cannot be removed is told and does not harm the save."""
        keep_last, keep_every = self.config.keep_last, self.config.keep_every
        line = dict(self._line)
        for step in steps_to_remove(list(line), keep_last=keep_last, keep_every=keep_every):
            directory = step_directory(self.checkpoints, step)
            links = read_links(directory)
            try:
                if links is not None and links.sha256 == line[step]:
                    owner.require()
                    remove_step(directory)
            except OSError as error:
                logger.warning(f"warning: {directory} cannot be removed ({error})")

    def _agree(self, error: Exception | None, staging: Path | None = None) -> None:
        """Raises on every rank if any has failed, so that none waits for another."""
        outcomes = self._agreement.all((in_words(error), isinstance(error, FolderTaken)))
        if not any(problem for problem, _ in outcomes):
            return
        # What stands in a folder that another run has taken is that run's.
        is_own = self._owner is not None and is_owned(self.checkpoints, self._token)
        if staging is not None and is_own:
            shutil.rmtree(staging, ignore_errors=True)
        is_taken = any(is_taken for _, is_taken in outcomes)
        # Where a run has lost its folder, other errors follow from that.
        rank, (problem, _) = next(
            (rank, each) for rank, each in enumerate(outcomes) if each[0] and each[1] == is_taken
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
            path, self._state, self._parts, agreement=self._agreement, restore=self._restore
        )
        directory, manifest = reader.directory, reader.manifest
        if _is_same_folder(directory.parent, self.checkpoints):
            self._line = ((manifest.state.step, manifest.sha256), *manifest.line)
        return manifest.state, directory

    def _restore(self, reader: CheckpointReader) -> None:
        """Counts, loss scale and generators."""
        manifest = reader.manifest
        self._state.adam_step = manifest.state.adam_step
        self._state.loss_scaler = manifest.state.loss_scaler
        self._engine.global_steps = manifest.state.step
        self._engine.global_samples = manifest.state.consumed_samples
        self._engine.skipped_steps = manifest.state.step - manifest.state.adam_step
        if manifest.layout == self.layout:
            rank = self._groups.rank
            _set_random_states({name: reader.extra(rank, name) for name in _RANDOM_STATES})


def _random_states() -> dict[str, np.ndarray]:
    """Torch's generators; training draws nothing from them, what a user adds to it may."""
    states = {"random.cpu": torch.get_rng_state().numpy()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state().numpy()
    return states


def _set_random_states(states: dict[str, np.ndarray | None]) -> None:
    cpu, cuda = states["random.cpu"], states["random.cuda"]
    if cpu is not None:
        torch.set_rng_state(torch.from_numpy(cpu))
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(cuda))


def _is_same_folder(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except OSError:
        return False
