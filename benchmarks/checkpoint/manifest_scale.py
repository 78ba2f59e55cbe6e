"""What the manifest of a sharded model costs: its bytes, rank 0's commit, and each rank's share.

One process plays the ranks of a world whose ZeRO-3 shards are of the real sizes; their files are
not written, only what the manifest says of them. Times are CPU-seconds of one core.
`benchmarks/scale.py` takes the figures from here.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import tempfile
import time
from pathlib import Path

from megagpt.checkpoint.commit import Shard, tensors_of
from megagpt.checkpoint.format.manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
    CheckpointState,
    Layout,
    check_cover,
    optimizer_file,
    read_manifest,
    read_state,
    weights_file,
    write_manifest,
)
from megagpt.checkpoint.format.shard_file import BLOCK_BYTES, FileRecord
from megagpt.checkpoint.format.slices import Slice, local_slice, overlaps
from megagpt.config.schema import Config

_ELEMENT_BYTES = 4

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class ManifestCosts:
    """Of one model on so many ranks."""

    num_bytes: int
    """Of manifest.json."""
    commit_seconds: float
    """Of rank 0: from what the ranks have sent to the manifest on disk."""
    share_seconds: float
    """Of each rank: parsing, and finding what it holds after a change of the layout."""
    state_seconds: float
    """Of the first rank of a host: reading the state alone."""


def _own_parts(shapes: Shapes, rank: int, ranks: int) -> list[tuple[str, tuple[int, ...], Slice]]:
    """What a rank holds of each parameter, as ZeRO-3 cuts it."""
    parts = []
    for name, shape in shapes.items():
        numel = math.prod(shape)
        size = -(-numel // ranks)
        start, end = size * rank, min(size * (rank + 1), numel)
        part = local_slice(shape, shape, tp_dim=None, tp_rank=0, start=start, end=end)
        if part is not None:
            parts.append((name, shape, part))
    return parts


def _files(rank: int, num_elements: int) -> dict[str, FileRecord]:
    """The two files of a rank, with hashes of the real number and length."""
    records = {}
    for name, kinds in ((weights_file(rank), 1), (optimizer_file(rank), 2)):
        num_bytes = kinds * num_elements * _ELEMENT_BYTES
        hashes = (f"{rank:016x}{block:016x}" for block in range(-(-num_bytes // BLOCK_BYTES)))
        records[name] = FileRecord(num_bytes, tuple(hashes))
    return records


def manifest_costs(config: Config, shapes: Shapes, ranks: int) -> ManifestCosts:
    """Measures each once.

    Args:
        config: Of the run, for the state.
        shapes: Of the whole parameters, by canonical name.
        ranks: Of the world.
    """
    messages = []
    for rank in range(ranks):
        parts = _own_parts(shapes, rank, ranks)
        files = _files(rank, sum(part.size for _, _, part in parts))
        messages.append(pickle.dumps(Shard.of(parts, files)))
    layout = Layout(ranks, zero_stage=3)
    state = CheckpointState(
        step=1, consumed_samples=1, consumed_tokens=1, config=config, data_fingerprint={}
    )
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        begin = time.process_time()
        shards = [pickle.loads(message) for message in messages]
        tensors = tensors_of(shards)
        check_cover(tensors)
        all_files = {name: record for shard in shards for name, record in shard.files.items()}
        write_manifest(
            directory,
            CheckpointManifest(
                state=state, layout=layout, tensors=tensors, files=all_files, versions={}
            ),
        )
        commit_seconds = time.process_time() - begin
        num_bytes = (directory / MANIFEST_FILE).stat().st_size
        share_seconds = min(_share_seconds(directory, shapes, ranks) for _ in range(3))
        begin = time.process_time()
        assert read_state(directory) == state
        state_seconds = time.process_time() - begin
    return ManifestCosts(num_bytes, commit_seconds, share_seconds, state_seconds)


def _share_seconds(directory: Path, shapes: Shapes, ranks: int) -> float:
    """Reads the manifest and finds the pieces of one rank of a world half as large."""
    others = max(1, ranks // 2)
    begin = time.process_time()
    manifest = read_manifest(directory)
    for name, _, part in _own_parts(shapes, others // 2, others):
        found = (overlaps(part, piece.slice) for piece in manifest.tensors[name].meeting(part))
        size = sum(overlap.size for each in found for overlap in each)
        assert size == part.size
    return time.process_time() - begin
