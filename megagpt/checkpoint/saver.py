"""Saving and loading the state of a run, whatever the layout; the room's face.

Every rank writes what it owns into a staging folder; when all have succeeded, rank 0 writes the
manifest and renames the folder. Loading reads, for each range that this rank holds, the pieces of
the checkpoint that meet it.
Next files: `parts.py` (what a rank holds), `shard_file.py` (how it is written).
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from megagpt import __version__
from megagpt.checkpoint.directory import (
    complete_steps,
    find_checkpoints,
    publish,
    read_latest,
    remove_leftovers,
    remove_step,
    staging_directory,
    step_directory,
    steps_to_remove,
    write_latest,
)
from megagpt.checkpoint.manifest import (
    KINDS,
    CheckpointManifest,
    CheckpointState,
    Layout,
    Piece,
    TensorRecord,
    check_cover,
    optimizer_file,
    read_manifest,
    tensor_key,
    weights_file,
    write_manifest,
)
from megagpt.checkpoint.optimizer_state import optimizer_state
from megagpt.checkpoint.parts import Part, held_parts, owned_parts, owned_tensors
from megagpt.checkpoint.reader import CheckpointReader, stray_files
from megagpt.checkpoint.shard_file import FileRecord, ShardWriter
from megagpt.config.schema import CheckpointConfig
from megagpt.parallel.groups import ProcessGroups

logger = logging.getLogger("megagpt")

_RANDOM_STATES = ("random.cpu", "random.cuda")
_TIMEOUT = timedelta(hours=2)
"""For one rank to wait for another's files: storage may be slow, which is no hang."""

Tensors = Iterator[tuple[str, Part, np.ndarray]]
"""(kind, part, values) of what this rank writes, in order."""


class SaveFailed(OSError):
    """A checkpoint could not be written; the ones before are as they were."""


class CheckpointRefused(ValueError):
    """What every rank was told of and raises alike, so that one of them need print it."""


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
        CheckpointRefused: On every rank, if not all of them see the same folder.
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
        # Of its own and on the CPU, so that a save in the background meets no message of training.
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._state = optimizer_state(engine)
        names = {id(p): name for name, p in engine.module.canonical_parameters()}
        self._parts = held_parts(self._state, names, groups, vocab_size=vocab_size)
        self._snapshot: dict[tuple[str, str], np.ndarray] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._previous: str | None = None
        self._open_directory()

    def close(self) -> None:
        """Ends a save in the background and the group of its own."""
        self.finish()
        dist.destroy_process_group(self._group)

    def _open_directory(self) -> None:
        """Removes what a killed run left, and sees to it that all ranks mean the same folder."""
        token = f".token_{secrets.token_hex(8)}"
        problem = ""
        if self._groups.rank == 0:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.checkpoints)
                (self.checkpoints / token).touch()
            except OSError as error:
                problem = f"{self.checkpoints} cannot be written ({error.strerror})"
        box = [token]
        # broadcast from rank 0: the name of a file that only its folder has
        dist.broadcast_object_list(box, src=0, group=self._group)
        if not problem and not (self.checkpoints / box[0]).exists():
            problem = (
                f"{self.checkpoints.absolute()} is not the folder that rank 0 writes to; give "
                "every rank the same --output_dir, on a file system that all hosts share"
            )
        problem = self._first(problem)
        if self._groups.rank == 0:
            (self.checkpoints / token).unlink(missing_ok=True)
        if problem:
            raise CheckpointRefused(problem)

    def _first(self, problem: str) -> str:
        """The first rank's problem, told to every rank; empty if none has one."""
        problems: list[str] = [""] * self.layout.world_size
        # all-gather over the world: each rank's problem
        dist.all_gather_object(problems, problem, group=self._group)
        return next((f"rank {rank}: {p}" for rank, p in enumerate(problems) if p), "")

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
            state, adam_step=self._state.adam_step, loss_scaler=self._loss_scaler()
        )
        extras = _random_states()
        if not self.config.async_save:
            self._write(state, extras, self._live_tensors())
            return
        self._copy_to_host()
        self._thread = threading.Thread(
            target=self._write_in_background, args=(state, extras), daemon=True
        )
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed; other ranks may learn of it later."""
        return self._error is not None

    def finish(self) -> None:
        """Waits for a save in the background; a collective.

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
        tensors = ((k, p, self._snapshot[k, p.name]) for k, p in owned_tensors(self._parts))
        try:
            self._write(state, extras, tensors)
        except Exception as error:  # told by `finish`, on the thread that trains
            self._error = error

    def _write(
        self, state: CheckpointState, extras: dict[str, np.ndarray], tensors: Tensors
    ) -> None:
        """Writes and commits a step, all ranks together."""
        target = step_directory(self.checkpoints, state.step)
        staging = staging_directory(target)
        error: Exception | None = None
        if self._groups.rank == 0:
            try:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            except OSError as caught:
                error = caught
        self._agree(error, staging)
        files: dict[str, FileRecord] = {}
        try:
            files = self._write_files(staging, extras, tensors)
        except Exception as caught:
            error = caught
        self._agree(error, staging)
        pieces = [(part.name, part.shape, part.piece) for part in owned_parts(self._parts)]
        gathered: list[Any] | None = None
        if self._groups.rank == 0:
            gathered = [None] * self.layout.world_size
        # gather to rank 0: what each rank wrote
        dist.gather_object((pieces, files), gathered, dst=0, group=self._group)
        if gathered is not None:
            try:
                self._commit(state, staging, target, gathered)
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
        self, state: CheckpointState, staging: Path, target: Path, gathered: list[Any]
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
        )
        sha256 = write_manifest(staging, manifest)
        publish(staging, target)
        self._previous = sha256
        write_latest(self.checkpoints, state.step, sha256)
        self._remove_old_steps(state.step)

    def _remove_old_steps(self, newest: int) -> None:
        """Retention; what cannot be removed is told and does not harm the save."""
        steps = complete_steps(self.checkpoints)
        for step in steps_to_remove(
            list(steps), newest, keep_last=self.config.keep_last, keep_every=self.config.keep_every
        ):
            try:
                remove_step(steps[step])
            except OSError as error:
                logger.warning(f"warning: {steps[step]} cannot be removed ({error.strerror})")

    def _agree(self, error: Exception | None, staging: Path) -> None:
        """Raises on every rank if any has failed, so that none waits for another."""
        message = "" if error is None else " ".join(str(error).split()) or type(error).__name__
        if error is not None and not isinstance(error, OSError):
            message = f"{type(error).__name__}: {message}"
        problem = self._first(message)
        if problem:
            if self._groups.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise SaveFailed(
                f"checkpoint not saved ({problem}); free space or name a writable --output_dir; "
                "earlier checkpoints are untouched"
            ) from error

    def _live_tensors(self) -> Tensors:
        """What this rank owns, straight from the state, one unit in memory at a time."""
        for kind, part, values in self._live_views():
            yield kind, part, values.cpu().numpy()

    def _live_views(self) -> Iterator[tuple[str, Part, torch.Tensor]]:
        for number, parts in enumerate(self._parts):
            with self._state.unit(number, writes=False) as ranges:
                for part, tensors in zip(parts, ranges, strict=True):
                    if part is not None and part.owned is not None:
                        for kind in KINDS:
                            yield kind, part, tensors[kind][slice(*part.owned)]

    def _copy_to_host(self) -> None:
        """Fills the snapshot, whose memory is kept from one save to the next."""
        for kind, part, values in self._live_views():
            copy = self._snapshot.get((kind, part.name))
            if copy is None:
                copy = self._snapshot[kind, part.name] = torch.empty(
                    values.shape, dtype=torch.float32, pin_memory=values.is_cuda
                ).numpy()
            torch.from_numpy(copy).copy_(values, non_blocking=True)
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()

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
        problem = ""
        for directory in find_checkpoints(path):
            if problem:
                logger.info(f"warning: {problem}; the checkpoint before it is taken")
            state, problem = self._try_load(directory)
            if state is not None:
                self._previous = _line(self.checkpoints, directory)
                if strays := stray_files(directory, read_manifest(directory)):
                    logger.info(f"warning: not of {directory} and not read: {', '.join(strays)}")
                return state, directory
        raise CheckpointRefused(f"{problem}; resume from another step_* folder")

    def _try_load(self, directory: Path) -> tuple[CheckpointState | None, str]:
        """The state that was loaded, or None and why, the same on every rank."""
        state, problem = None, ""
        with self._state.loading():
            try:
                with CheckpointReader(directory) as reader:
                    self._load(reader)
                    state = reader.manifest.state
            except (ValueError, OSError) as error:
                problem = " ".join(str(error).split())
            problem = self._first(problem)
        return (None, problem) if problem else (state, "")

    def _load(self, reader: CheckpointReader) -> None:
        manifest = reader.manifest
        for number, parts in enumerate(self._parts):
            with self._state.unit(number, writes=True) as ranges:
                for part, tensors in zip(parts, ranges, strict=True):
                    if part is not None:
                        held = {kind: tensors[kind][: part.slice.size] for kind in KINDS}
                        _read_part(reader, part, held)
        self._state.adam_step = manifest.state.adam_step
        for name, value in manifest.state.loss_scaler.items():
            setattr(self._engine.optimizer.loss_scaler, name, value)
        self._engine.global_steps = manifest.state.step
        self._engine.global_samples = manifest.state.consumed_samples
        self._engine.skipped_steps = manifest.state.step - manifest.state.adam_step
        if manifest.layout == self.layout:
            rank = self._groups.rank
            _set_random_states({name: reader.extra(rank, name) for name in _RANDOM_STATES})

    def _loss_scaler(self) -> dict[str, Any]:
        """Plain values of the fp16 loss scaler; other precisions have one that never changes."""
        if not self._engine.fp16_enabled():
            return {}
        values = vars(self._engine.optimizer.loss_scaler)
        return {k: v for k, v in values.items() if isinstance(v, (bool, int, float))}


def _read_part(reader: CheckpointReader, part: Part, tensors: dict[str, torch.Tensor]) -> None:
    """Reads all kinds of one part, straight into its memory where that is the host's."""
    record = reader.manifest.tensors.get(part.name)
    if record is not None and record.shape != part.shape:
        raise ValueError(
            f"{reader.directory} has {part.name} of shape {record.shape}, this model of "
            f"{part.shape}; it is of another model"
        )
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        targets = {kind: tensor.detach().numpy() for kind, tensor in tensors.items()}
        reader.read_into(part.name, part.slice, targets)
        return
    for kind, tensor in tensors.items():
        values = np.empty(part.slice.size, np.float32)
        reader.read_into(part.name, part.slice, {kind: values})
        tensor.copy_(torch.from_numpy(values))


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


def _line(checkpoints: Path, directory: Path) -> str | None:
    """Hash of the manifest that the next save of this folder follows."""
    if directory.parent.absolute() == checkpoints.absolute():
        return read_manifest(directory).sha256
    latest = read_latest(checkpoints)
    return latest[1] if latest else None
