"""Saving and loading the state of a run, whatever the layout; the room's face.

Every rank writes what it owns into a staging folder; when all have succeeded, rank 0 writes the
manifest and renames the folder. Loading reads, for each range that this rank holds, the pieces of
the checkpoint that meet it.
Next files: `optimizer_state.py` (where the state is), `shard_file.py` (how it is written).
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
from datetime import datetime, timezone
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
    tensor_key,
    weights_file,
    write_manifest,
)
from megagpt.checkpoint.optimizer_state import Held, optimizer_state
from megagpt.checkpoint.reader import CheckpointReader
from megagpt.checkpoint.shard_file import FileRecord, ShardWriter
from megagpt.checkpoint.slices import Slice, local_slice
from megagpt.config.schema import CheckpointConfig
from megagpt.model.initialization import VOCABULARY_WEIGHTS
from megagpt.parallel.groups import ProcessGroups

logger = logging.getLogger("megagpt")

_RANDOM_STATES = ("random.cpu", "random.cuda")


class SaveFailed(OSError):
    """A checkpoint could not be written; the ones before are as they were."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """A range that this rank holds: its part of the whole tensor, and what of it the rank owns."""

    name: str
    shape: tuple[int, ...]
    slice: Slice
    owned: tuple[int, int] | None
    """Range of the held elements that this rank writes; another rank holds the same otherwise."""

    @property
    def piece(self) -> Slice:
        """The part that is written."""
        assert self.owned is not None
        begin, end = (self.slice.start + at for at in self.owned)
        return dataclasses.replace(self.slice, start=begin, end=end)


class Checkpointer:
    """Saves and loads one engine; every rank must make one and call it alike.

    Args:
        checkpoints: Folder of the steps, on a file system that all ranks share.
        engine: Of any layout.
        groups: Of the layout.
        layout: The same, as the manifest tells it.
        config: How often and how many.
    """

    def __init__(
        self,
        checkpoints: Path,
        engine: deepspeed.DeepSpeedEngine,
        groups: ProcessGroups,
        *,
        layout: Layout,
        config: CheckpointConfig,
    ) -> None:
        self.checkpoints = checkpoints
        self.config = config
        self.layout = layout
        self._engine = engine
        self._groups = groups
        self._state = optimizer_state(engine)
        self._names = {id(p): name for name, p in engine.module.canonical_parameters()}
        # Of its own and on the CPU, so that a save in the background meets no message of training.
        self._group = dist.new_group(backend="gloo")
        self._snapshot: dict[tuple[str, str], np.ndarray] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._previous: str | None = None
        if groups.rank == 0:
            remove_leftovers(checkpoints)
        dist.barrier(group=self._group)  # nobody looks before that is done

    def close(self) -> None:
        """Ends a save in the background and the group of its own."""
        self.finish()
        dist.destroy_process_group(self._group)

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
        parts = self._parts(vocab_size=state.config.model.vocab_size)
        if not self.config.async_save or self._state.is_swapped:
            self._write(state, parts, extras, self._live_tensors(parts))
            return
        self._copy_to_host(parts)
        self._thread = threading.Thread(
            target=self._write_in_background, args=(state, parts, extras), daemon=True
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

    def _write_in_background(
        self, state: CheckpointState, parts: list[list[_Part]], extras: dict[str, np.ndarray]
    ) -> None:
        tensors = ((kind, part, self._snapshot[kind, part.name]) for kind, part in _order(parts))
        try:
            self._write(state, parts, extras, tensors)
        except Exception as error:  # told by `finish`, on the thread that trains
            self._error = error

    def _write(
        self,
        state: CheckpointState,
        parts: list[list[_Part]],
        extras: dict[str, np.ndarray],
        tensors: Iterator[tuple[str, _Part, np.ndarray]],
    ) -> None:
        """Writes and commits a step, all ranks together."""
        target = step_directory(self.checkpoints, state.step)
        staging = self._open_staging(target)
        files: dict[str, FileRecord] = {}
        error: Exception | None = None
        try:
            files = _write_files(staging, self._groups.rank, parts, extras, tensors)
        except Exception as caught:
            error = caught
        self._agree(error, staging)
        pieces = [(p.name, p.shape, p.piece) for unit in parts for p in unit if p.owned]
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

    def _open_staging(self, target: Path) -> Path:
        """Makes the staging folder and sees to it that all ranks mean the same one."""
        staging = staging_directory(target)
        error: Exception | None = None
        token = [f".token_{secrets.token_hex(8)}"]
        if self._groups.rank == 0:
            try:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
                (staging / token[0]).touch()
            except OSError as caught:
                error = caught
        # broadcast from rank 0: the name of a file that only its folder has
        dist.broadcast_object_list(token, src=0, group=self._group)
        if error is None and not (staging / token[0]).exists():
            error = OSError(
                f"{staging.parent.absolute()} is not the folder that rank 0 writes to; give every "
                "rank the same --output_dir, on a file system that all hosts share"
            )
        self._agree(error, staging)
        if self._groups.rank == 0:
            (staging / token[0]).unlink(missing_ok=True)
        return staging

    def _commit(
        self, state: CheckpointState, staging: Path, target: Path, gathered: list[Any]
    ) -> None:
        tensors: dict[str, TensorRecord] = {}
        files: dict[str, FileRecord] = {}
        for shard, (pieces, written) in enumerate(gathered):
            files |= written
            for name, shape, part in pieces:
                before = tensors[name].pieces if name in tensors else ()
                tensors[name] = TensorRecord(shape, (*before, Piece(shard, part)))
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
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            previous=self._previous,
        )
        sha256 = write_manifest(staging, manifest)
        publish(staging, target)
        write_latest(self.checkpoints, state.step, sha256)
        self._previous = sha256
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
        if isinstance(error, OSError):
            message = " ".join(str(error).split())
        else:
            message = "" if error is None else f"{type(error).__name__}: {error}"
        messages: list[str] = [""] * self.layout.world_size
        # all-gather over the world: each rank's error
        dist.all_gather_object(messages, message, group=self._group)
        failed = [f"rank {rank}: {m}" for rank, m in enumerate(messages) if m]
        if failed:
            if self._groups.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise SaveFailed(
                f"checkpoint not saved ({'; '.join(failed)}); free space or name a writable "
                "--output_dir; earlier checkpoints are untouched"
            ) from error

    # --- what this rank holds

    def _parts(self, *, vocab_size: int | None) -> list[list[_Part]]:
        """The parts of the model that this rank holds, by unit."""
        return [
            [part for held in unit if (part := self._part(held, vocab_size)) is not None]
            for unit in self._state.units
        ]

    def _part(self, held: Held, vocab_size: int | None) -> _Part | None:
        """Which part of the whole tensor a range is; None if all of it is padding."""
        parameter: Any = held.parameter
        name = self._names[id(parameter)]
        local_shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        tp_dim = getattr(parameter, "tp_dim", None)
        shape = list(local_shape)
        if tp_dim is not None:
            shape[tp_dim] *= self.layout.tensor_parallel_size
        if name in VOCABULARY_WEIGHTS:
            assert vocab_size is not None
            shape[0] = vocab_size
        part = local_slice(
            tuple(shape),
            local_shape,
            tp_dim=tp_dim,
            tp_rank=self._groups.tp_rank,
            start=held.start,
            end=held.end,
        )
        if part is None:
            return None
        return _Part(name, tuple(shape), part, self._owned(parameter, tp_dim, part.size))

    def _owned(self, parameter: Any, tp_dim: int | None, size: int) -> tuple[int, int] | None:
        """Of what several ranks hold alike, the range that this one writes."""
        if tp_dim is None and self._groups.tp_rank > 0:
            return None
        if getattr(parameter, "ds_pipe_replicated", False):
            return None  # the first stage has the tied weight too
        if not self._state.is_replicated:
            return 0, size
        dp_size, dp_rank = self._groups.topology.data_parallel_size, self._groups.dp_rank
        begin, end = size * dp_rank // dp_size, size * (dp_rank + 1) // dp_size
        return (begin, end) if begin < end else None

    def _live_tensors(self, parts: list[list[_Part]]) -> Iterator[tuple[str, _Part, np.ndarray]]:
        """What this rank owns, straight from the state, one unit in memory at a time."""
        for kind, part, values in self._live_views(parts):
            yield kind, part, values.cpu().numpy()

    def _live_views(self, parts: list[list[_Part]]) -> Iterator[tuple[str, _Part, torch.Tensor]]:
        for number, unit in enumerate(parts):
            with self._state.unit(number, writes=False) as ranges:
                for part, tensors in self._paired(number, unit, ranges):
                    if part.owned is not None:
                        for kind in KINDS:
                            yield kind, part, tensors[kind][part.owned[0] : part.owned[1]]

    def _paired(
        self, number: int, unit: list[_Part], ranges: list[dict[str, torch.Tensor]]
    ) -> Iterator[tuple[_Part, dict[str, torch.Tensor]]]:
        """The parts of a unit with their tensors; ranges that are all padding have no part."""
        by_name = {
            self._names[id(held.parameter)]: tensors
            for held, tensors in zip(self._state.units[number], ranges, strict=True)
        }
        for part in unit:
            yield part, by_name[part.name]

    def _copy_to_host(self, parts: list[list[_Part]]) -> None:
        """Fills the snapshot, whose memory is kept from one save to the next."""
        for kind, part, values in self._live_views(parts):
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
            ValueError: On every rank, if nothing could be loaded.
        """
        candidates = find_checkpoints(path)
        for directory in candidates:
            state, problem = self._try_load(directory)
            if state is not None:
                if self._groups.rank == 0:
                    self._previous = _line(self.checkpoints, directory)
                return state, directory
            if directory != candidates[-1]:
                logger.warning(f"warning: {problem}; the checkpoint before it is taken")
        raise ValueError(f"{problem}; resume from another step_* folder")

    def _try_load(self, directory: Path) -> tuple[CheckpointState | None, str]:
        """The state that was loaded, or None and why, the same on every rank."""
        state, problem = None, ""
        with self._state.loading():
            try:
                with CheckpointReader(directory) as reader:
                    self._load(reader)
                    state = reader.manifest.state
            except (ValueError, OSError) as caught:
                problem = " ".join(str(caught).split())
            problems: list[str] = [""] * self.layout.world_size
            # all-gather over the world: each rank's problem
            dist.all_gather_object(problems, problem, group=self._group)
        problem = next((p for p in problems if p), "")
        return (None, problem) if problem else (state, "")

    def _load(self, reader: CheckpointReader) -> None:
        manifest = reader.manifest
        parts = self._parts(vocab_size=manifest.state.config.model.vocab_size)
        for number, unit in enumerate(parts):
            with self._state.unit(number, writes=True) as ranges:
                for part, tensors in self._paired(number, unit, ranges):
                    held = {kind: tensors[kind][: part.slice.size] for kind in KINDS}
                    _read_part(reader, part, held)
        self._state.adam_step = manifest.state.adam_step
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        for name, value in manifest.state.loss_scaler.items():
            setattr(scaler, name, value)
        self._engine.global_steps = manifest.state.step
        self._engine.global_samples = manifest.state.consumed_samples
        self._engine.skipped_steps = manifest.state.step - manifest.state.adam_step
        if manifest.layout == self.layout:
            _set_random_states(
                {name: reader.extra(self._groups.rank, name) for name in _RANDOM_STATES}
            )

    def _loss_scaler(self) -> dict[str, Any]:
        """Plain values of the fp16 loss scaler; other precisions have one that never changes."""
        if not self._engine.fp16_enabled():
            return {}
        values = vars(self._engine.optimizer.loss_scaler)
        return {k: v for k, v in values.items() if isinstance(v, (bool, int, float))}


def _order(parts: list[list[_Part]]) -> Iterator[tuple[str, _Part]]:
    """The order in which tensors are written."""
    for unit in parts:
        for part in unit:
            if part.owned is not None:
                for kind in KINDS:
                    yield kind, part


def _write_files(
    staging: Path,
    shard: int,
    parts: list[list[_Part]],
    extras: dict[str, np.ndarray],
    tensors: Iterator[tuple[str, _Part, np.ndarray]],
) -> dict[str, FileRecord]:
    """Writes this rank's two files, both at once, so that each tensor is brought up once."""
    names = (weights_file(shard), optimizer_file(shard))
    headers: tuple[dict, dict] = ({}, {name: (v.shape, v.dtype) for name, v in extras.items()})
    for kind, part in _order(parts):
        in_optimizer, key = tensor_key(kind, part.name)
        piece = part.piece
        shape = part_shape(part.shape, piece)
        headers[in_optimizer][key] = (shape, np.dtype(np.float32))
    with ExitStack() as stack:
        writers = []
        for name, header in zip(names, headers, strict=True):
            writers.append(ShardWriter(staging / name, header))
            stack.callback(writers[-1].abandon)
        for values in extras.values():
            writers[1].write(values)
        for kind, _, values in tensors:
            writers[kind != "weight"].write(values)
        return {name: w.close() for name, w in zip(names, writers, strict=True)}


def part_shape(shape: tuple[int, ...], piece: Slice) -> tuple[int, ...]:
    """The shape a piece is stored in: its box where it is all of one, else flat."""
    if len(shape) == 2 and piece.is_whole_box:
        return piece.rows[1] - piece.rows[0], piece.width
    return (piece.size,)


def _read_part(reader: CheckpointReader, part: _Part, tensors: dict[str, torch.Tensor]) -> None:
    """Reads all kinds of one part, straight into its memory where that is the host's."""
    if all(t.device.type == "cpu" for t in tensors.values()):
        reader.read_into(part.name, part.slice, {k: t.detach().numpy() for k, t in tensors.items()})
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
        with CheckpointReader(directory) as reader:
            return reader.manifest.sha256
    latest = read_latest(checkpoints)
    return latest[1] if latest else None
