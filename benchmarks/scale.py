"""What starting, saving and loading cost at 1 to 4,096 ranks, for models of 8 and 175 billion.

One process does what one rank of each world does, with the project's own code on the real shapes
and the real cuts, under ZeRO-3; nothing is sent, so that what ranks send is counted instead. Times
are CPU-seconds of one core. A rank's share must not grow with the number of ranks: the exponent is
the slope of its logarithm over that of the ranks, from 64 ranks on, where what is below 10 ms
counts as 10 ms. Ends with 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "checkpoint"))
from manifest_scale import manifest_costs  # noqa: E402

from megagpt.config.layout import Layout  # noqa: E402
from megagpt.config.presets import PRESETS  # noqa: E402
from megagpt.config.schema import (  # noqa: E402
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from megagpt.data.datasets import build_datasets  # noqa: E402
from megagpt.data.indexed.dataset import token_dtype  # noqa: E402
from megagpt.data.indexed.writer import IndexedDatasetWriter  # noqa: E402
from megagpt.data.samples.sampler import BatchSampler  # noqa: E402
from megagpt.model.gpt import GPTModel  # noqa: E402
from megagpt.model.initialization import initial_range  # noqa: E402
from megagpt.parallel import groups  # noqa: E402
from megagpt.parallel.topology import ParallelTopology  # noqa: E402
from megagpt.testing.report import markdown_table, write_records  # noqa: E402
from megagpt.training.run import resolve_run  # noqa: E402

RANKS = (1, 64, 1024, 4096)
MODELS: dict[str, ModelConfig] = {
    "8B": ModelConfig(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_kv_heads=8,
        ffn_hidden_size=14336,
        seq_length=8192,
        vocab_size=128256,
        normalization="rmsnorm",
        position_embedding="rope",
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
    ),
    "175B": dataclasses.replace(PRESETS["gpt3-175b"], vocab_size=50257),
}
MOST_EXPONENT = 0.1
"""Of what each rank does."""
EXEMPT = {"manifest": 1.0, "commit of rank 0": 1.0, "process groups": math.inf}
"""Exponents of what is not a rank's share; the rendezvous of groups is counted, not timed."""
AT_MOST = {
    ("initial values", "175B", 1024): ("seconds", 3.0),
    ("manifest", "175B", 1024): ("bytes", 12e6),
    ("commit of rank 0", "175B", 1024): ("seconds", 3.0),
    ("parse and plan", "175B", 1024): ("seconds", 3.0),
}
"""Bars of single rows."""
_FLOOR_SECONDS = 0.01
_MOST_DRAWN = 1 << 28
_DOCUMENTS, _DOCUMENT_TOKENS = 200_000, 60

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass
class Row:
    """What one thing costs one rank of a world; seconds are of one core."""

    what: str
    model: str
    ranks: int
    seconds: float | None = None
    bytes: int | None = None
    calls: int | None = None
    """Collective calls, where they are counted."""
    exponent: float | None = None
    """Of all rows of the same thing and model."""
    note: str = ""


def run_config(model: ModelConfig, ranks: int, data: Path) -> Config:
    """A run of four micro-batches of one sample a rank and step."""
    return Config(
        model=model,
        batch=BatchConfig(micro_batch_size=1, global_batch_size=4 * ranks),
        training=TrainingConfig(precision="bf16"),
        data=DataConfig(path=str(data), split="1,0,0"),
    )


def settings(name: str, config: Config, ranks: int) -> Iterator[Row]:
    """Resolving the configuration against the DeepSpeed JSON."""
    ds_config = Layout(data_parallel_size=ranks, zero_stage=3).ds_config()

    def resolve() -> None:
        resolve_run(config, ds_config, sources={"ds_config": "ds"}, world_size=ranks, device="cuda")

    yield Row("settings", name, ranks, _seconds(resolve, repeats=3))


def process_groups(name: str, config: Config, ranks: int) -> Iterator[Row]:
    """Calls that make the groups under NCCL, on a stand-in for torch.distributed."""
    calls: list[list[list[int]]] = []

    def split_group(split_ranks: list[list[int]]) -> object:
        calls.append(split_ranks)
        return object()

    stand_in = SimpleNamespace(
        get_rank=lambda: ranks - 1,
        get_world_size=lambda: ranks,
        get_backend=lambda: "nccl",
        group=SimpleNamespace(WORLD=SimpleNamespace(bound_device_id="cuda:0")),
        split_group=split_group,
    )
    real, groups.dist = groups.dist, stand_in  # type: ignore[assignment]
    try:
        groups.ProcessGroups(ParallelTopology(ranks))
    finally:
        groups.dist = real
    yield Row("process groups", name, ranks, calls=len(calls))


def initial_values(name: str, config: Config, shapes: Shapes, ranks: int) -> Iterator[Row]:
    """Drawing one rank's shard of every parameter, on one core."""
    total = sum(math.prod(shape) for shape in shapes.values())
    share = min(1.0, _MOST_DRAWN * ranks / total)  # of each shard that is drawn
    rank, num_drawn = ranks // 2, 0
    begin = time.process_time()
    for parameter, shape in shapes.items():
        numel = math.prod(shape)
        size = -(-numel // ranks)
        start, end = size * rank, min(size * (rank + 1), numel)
        stop = start + math.ceil((end - start) * share)
        for first in range(start, stop, 1 << 22):
            drawn = initial_range(
                parameter,
                shape,
                first,
                min(stop, first + (1 << 22)),
                config=config.model,
                seed=1,
                device=torch.device("cpu"),
            )
            num_drawn += drawn.numel()
    seconds = (time.process_time() - begin) / share
    note = "" if share == 1 else f"{num_drawn:,} values drawn, scaled to all"
    yield Row("initial values", name, ranks, seconds, 2 * total // ranks, note=note)


def order(name: str, config: Config, ranks: int) -> Iterator[Row]:
    """The order of an epoch, which one process of a host builds, and what each then reads of it."""
    built: list[Any] = []

    def build() -> None:
        built.append(build_datasets(config.data, seq_length=64, seed=1)["train"])

    with tempfile.TemporaryDirectory() as cache:
        data = dataclasses.replace(config.data, index_cache=cache)
        config = dataclasses.replace(config, data=data)
        yield Row("order", name, ranks, _seconds(build, repeats=1))  # the first of a host
        num_bytes = sum(path.stat().st_size for path in Path(cache).rglob("*.npy"))
        yield Row("index", name, ranks, _seconds(build, repeats=3), num_bytes)
    sampler = BatchSampler(
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=1,
        dp_rank=ranks - 1,
        dp_size=ranks,
    )

    def read() -> None:
        for indices in sampler.micro_batches(0):
            built[-1].gather(indices)

    yield Row("samples of a step", name, ranks, _seconds(read, repeats=3))


def checkpoint(name: str, config: Config, shapes: Shapes, ranks: int) -> Iterator[Row]:
    """The manifest, from rank 0's commit to each rank's plan."""
    costs = manifest_costs(config, shapes, ranks)
    yield Row("manifest", name, ranks, bytes=costs.num_bytes)
    yield Row("commit of rank 0", name, ranks, costs.commit_seconds)
    yield Row("parse and plan", name, ranks, costs.share_seconds)
    yield Row("state of the first of a host", name, ranks, costs.state_seconds)


def _seconds(work: Callable[[], object], *, repeats: int) -> float:
    """The least of several times."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def shapes_of(model: ModelConfig) -> Shapes:
    """Of the parameters, by canonical name; no memory is taken."""
    with torch.device("meta"):
        whole = GPTModel(model)
    return {name: tuple(p.shape) for name, p in whole.canonical_parameters()}


def exponent(rows: list[Row]) -> float | None:
    """The larger slope of seconds and bytes over ranks, in logarithms, from 64 ranks on."""
    large = [row for row in rows if row.ranks >= 64]
    slopes = []
    for values in (
        [None if r.seconds is None else max(r.seconds, _FLOOR_SECONDS) for r in large],
        [r.bytes for r in large],
        [r.calls for r in large],
    ):
        if None not in values:
            logarithms = np.log(np.array(values, dtype=np.float64))
            slopes.append(float(np.polyfit(np.log([r.ranks for r in large]), logarithms, 1)[0]))
    return max(slopes, default=None)


def missed(rows: list[Row]) -> list[str]:
    """The bars that are not met, in words."""
    problems = []
    for row in rows:
        most = EXEMPT.get(row.what, MOST_EXPONENT)
        if row.ranks == RANKS[-1] and row.exponent is not None and row.exponent > most:
            problems.append(f"{row.what}, {row.model}: exponent {row.exponent:.2f} > {most}")
        unit, most = AT_MOST.get((row.what, row.model, row.ranks), ("", math.inf))
        if unit and getattr(row, unit) > most:
            problems.append(
                f"{row.what}, {row.model}, {row.ranks} ranks: {getattr(row, unit):.3g} {unit} > "
                f"{most:g}"
            )
    return problems


def table(rows: list[Row]) -> str:
    """A line for each thing and model: seconds or bytes by ranks, and the exponent."""

    def cell(row: Row) -> str:
        parts = [] if row.seconds is None else [f"{row.seconds:.3g} s"]
        parts += [] if row.bytes is None else [f"{row.bytes / 1e6:,.3g} MB"]
        parts += [] if row.calls is None else [f"{row.calls} calls"]
        return ", ".join(parts) + ("*" if row.note else "")

    lines = []
    for (what, model), group in itertools.groupby(rows, key=lambda row: (row.what, row.model)):
        own = list(group)
        slope = own[-1].exponent
        lines.append([what, model, *map(cell, own), "-" if slope is None else f"{slope:.2f}"])
    return markdown_table(["what", "model", *map(str, RANKS), "exponent"], lines)


def measure(data: Path) -> Iterator[Row]:
    """Every row, model by model."""
    for name, model in MODELS.items():
        shapes = shapes_of(model)
        for ranks in RANKS:
            config = run_config(model, ranks, data)
            print(f"{name}, {ranks} ranks", file=sys.stderr, flush=True)
            yield from settings(name, config, ranks)
            yield from process_groups(name, config, ranks)
            yield from order(name, config, ranks)
            yield from initial_values(name, config, shapes, ranks)
            yield from checkpoint(name, config, shapes, ranks)


def write_pair(prefix: Path) -> None:
    """A pair of many short documents, whose order takes as long as that of long ones."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 2 * _DOCUMENT_TOKENS, _DOCUMENTS).astype(np.int32)
    with IndexedDatasetWriter(str(prefix), token_dtype(50_000)) as writer:
        writer.add_tokens(generator.integers(1, 50_000, int(lengths.sum()), dtype=writer.dtype))
        writer.add_lengths(lengths, np.ones(len(lengths), dtype=np.int64))


def main() -> int:
    """Measures, prints the table and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pair"
        write_pair(data)
        rows = list(measure(data))
    rows.sort(key=lambda row: (list(MODELS).index(row.model), _PLACE[row.what]))
    for _, group in itertools.groupby(rows, key=lambda row: (row.what, row.model)):
        own = list(group)
        slope = exponent(own)
        for row in own:
            row.exponent = slope
    print(table(rows))
    write_records(options.json, [dataclasses.asdict(row) for row in rows])
    problems = missed(rows)
    print(json.dumps({"missed": problems}) if problems else "all bars are met")
    return 1 if problems else 0


_PLACE = {
    what: place
    for place, what in enumerate(
        (
            *("settings", "process groups", "order", "index", "samples of a step"),
            *("initial values", "manifest", "commit of rank 0", "parse and plan"),
            "state of the first of a host",
        )
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
