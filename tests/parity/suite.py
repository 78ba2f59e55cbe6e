"""Runs cells of the grid through the real trainer and compares them with the oracle.

`make parity` runs all, writes build/parity.json and makes docs/parity.md; the tests run a core, and
the rest as slow tests. Ranks start once for each world size and run all its cells.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import rounding
import torch
from cells import CELLS, Cell

from megagpt.config.command_line import parse_config
from megagpt.operations.prebuild import async_io_problem
from megagpt.testing.corpus import byte_corpus
from megagpt.testing.distributed import DEVICE, most_ranks, release_groups, run_distributed
from megagpt.testing.report import markdown_table, replace_table, write_records

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
FIGURES = {"loss": "max_loss_rel", "grad_norm": "max_grad_norm_rel", "weights": "max_weight_abs"}
"""What a record's figures are called."""


def prepare_data(directory: Path) -> Path:
    """This repository's licence as bytes; returns the prefix."""
    words = (ROOT / "LICENSE").read_text().split()
    # Of many lengths, so that ends of documents fall everywhere, and differ between micro-batches.
    return byte_corpus(
        directory, (" ".join(words[i : i + 3 + i % 23]) for i in range(0, len(words), 2))
    )


def arguments(cell: Cell, data: Path, output_dir: Path) -> list[str]:
    """The command line of a cell."""
    return [
        *"--model.num_layers 4 --model.hidden_size 32 --model.num_attention_heads 4".split(),
        *"--model.seq_length 48 --model.vocab_padding_multiple 8".split(),
        *"--batch.micro_batch_size 2 --batch.global_batch_size 8".split(),
        *"--optimizer.lr 1e-3 --optimizer.min_lr 1e-4 --optimizer.warmup_steps 4".split(),
        *"--optimizer.eps 1e-8 --optimizer.clip_grad 1.5".split(),
        *("--training.train_steps", str(STEPS), "--training.eval_interval", "0"),
        *"--checkpoint.save_interval 0 --data.eod_mask_loss true --data.split 8,1,1".split(),
        *("--data.path", str(data), "--output_dir", str(output_dir)),
        *cell.arguments(),
    ]


def oracle_references(
    rank: int, world_size: int, cells: list[Cell], data: Path, root: Path
) -> dict:
    """What cells are compared with: (truth, unit of rounding) by style and features.

    Each rank makes some of them; there are no collectives.
    """
    import oracle

    configs = {
        cell.reference: with_vocabulary(parse_config(arguments(cell, data, root / "oracle"))[0])
        for cell in cells
    }
    references = {}
    for reference in sorted(configs)[rank::world_size]:
        config = configs[reference]
        truth = oracle.train(config, torch.float64, device=DEVICE)
        honest = (
            oracle.train(config, torch.float32, device=DEVICE, order=order)
            for order in rounding.ORDERS
        )
        unit = rounding.largest(rounding.errors(outcome, truth) for outcome in honest)
        references[reference] = (truth, unit)
    return references


def make_references(
    cells: list[Cell], data: Path, root: Path, *, timeout_seconds: float, function=oracle_references
) -> dict:
    """The references of cells, made by two processes side by side where they can run."""
    ranks = min(2, most_ranks())
    parts = run_distributed(function, ranks, cells, data, root, timeout_seconds=timeout_seconds)
    return {key: reference for part in parts for key, reference in part.items()}


def with_vocabulary(config):
    """The configuration with the byte tokenizer's 256 bytes and the end of document."""
    import dataclasses

    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=257))


def train_cells(rank: int, world_size: int, cells: list[Cell], data: Path, root: Path) -> list:
    """Trains each cell; returns (curve, validation loss, weights of rank 0, drifted weights)."""
    sys.path.insert(0, str(Path(__file__).parent))
    outcomes = []
    for number, cell in enumerate(cells):
        begin = time.monotonic()
        outcomes.append(train_cell(rank, world_size, cell, data, root / f"{world_size}_{number}"))
        release_groups()
        if rank == 0:
            print(f"{cell.name}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    return outcomes


def train_cell(rank: int, world_size: int, cell: Cell, data: Path, output_dir: Path) -> tuple:
    from megagpt.checkpoint.weights import load_weights
    from megagpt.training.loop import loop
    from megagpt.training.run import prepare_run, resolve_run
    from megagpt.training.start import start

    config, _, sources = parse_config(arguments(cell, data, output_dir))
    resolved = resolve_run(
        config, cell.ds_config(), sources=sources, world_size=world_size, device=DEVICE
    )
    run = prepare_run(resolved, rank=rank)
    curve, swapped = [], set()

    def on_step(result) -> None:
        curve.append((result.loss, result.grad_norm, result.num_tokens))
        swapped.update(path.parts[-3] for path in output_dir.glob("nvme/zero_stage_3/*/rank*/*"))

    with start(run) as session:
        last = loop(session, on_step)
    # What a layout says is on NVMe really was: DeepSpeed keeps small tensors in memory.
    assert any("optimizer" in name for name in swapped) == ("nvme" in cell.layout), swapped
    assert any("params" in name for name in swapped) == ("offload_nvme" in cell.layout), swapped
    assert not (output_dir / "nvme").exists()
    # On NVMe the shards are gone with their files.
    drifted = [] if "nvme" in cell.layout else drifted_weights(session)
    weights = {}
    if rank == 0:
        weights = {name: w.numpy() for name, w in load_weights(output_dir)[1].items()}
    return curve, last.validation["valid"], weights, drifted


def drifted_weights(session) -> list[str]:
    """Weights of which not all copies, over dp, tp and pp, have the same bits; on every rank."""
    import torch.distributed as dist

    own = {}
    for name, parameter in session.engine.module.canonical_parameters():
        shard = getattr(parameter, "ds_tensor", None)  # of ZeRO-3, another on each dp rank
        values = parameter if shard is None else shard
        place = (
            name,
            session.groups.tp_rank if hasattr(parameter, "tp_dim") else None,
            None if shard is None else session.groups.dp_rank,
        )
        own[place] = hashlib.sha256(values.detach().float().cpu().numpy().tobytes()).hexdigest()
    everyone: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    copies: dict[tuple, set] = {}
    for digests in everyone:
        for place, digest in digests.items():
            copies.setdefault(place, set()).add(digest)
    return sorted({place[0] for place, digests in copies.items() if len(digests) > 1})


def runnable(cells: list[Cell]) -> list[Cell]:
    """Those that this machine can run: with libaio NVMe's, on GPUs those with a GPU a rank."""
    return [
        cell
        for cell in cells
        if cell.world_size <= most_ranks()
        and (cell.precision != "fp16" or DEVICE == "cuda")
        and ("nvme" not in cell.layout or async_io_problem() is None)
    ]


def run_cells(
    cells: list[Cell], *, num_threads: int = 1, timeout_seconds: float = 2400
) -> list[dict]:
    """Trains cells and compares each with the oracle.

    Args:
        cells: To train.
        num_threads: Of PyTorch, on each rank of a cell; the oracle has one.
        timeout_seconds: For all cells of one world size.

    Returns:
        One record a runnable cell, as in build/parity.json.
    """
    records = {}
    cells = runnable(cells)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        data = prepare_data(root)
        references = make_references(cells, data, root, timeout_seconds=timeout_seconds)
        for world_size in sorted({cell.world_size for cell in cells}):
            chosen = [cell for cell in cells if cell.world_size == world_size]
            by_rank = run_distributed(
                *(train_cells, world_size, chosen, data, root),
                timeout_seconds=timeout_seconds,
                num_threads=num_threads,
            )
            for number, cell in enumerate(chosen):
                curves = [outcomes[number][:2] for outcomes in by_rank]
                assert all(c == curves[0] for c in curves), f"{cell.name}: ranks disagree"
                records[cell] = compare(cell, by_rank[0][number], references[cell.reference])
    return [records[cell] for cell in cells]


def compare(cell: Cell, outcome: tuple, reference: tuple) -> dict:
    """A cell's distance from the oracle, and whether it is within the rule."""
    *training, drifted = outcome
    truth, unit = reference
    measured = rounding.errors(tuple(training), truth)
    return {
        "name": cell.name,
        "layout": cell.layout,
        "style": " ".join([cell.style, *cell.features]),
        "dtype": cell.precision,
        "max_loss_rel": measured.loss,
        "max_grad_norm_rel": measured.grad_norm,
        "max_weight_abs": measured.weights[-1],
        "weight_quantiles": measured.weights,
        **(verdict := rounding.judge(measured, unit, precision=cell.precision)),
        "clipped_steps": sum(norm > 1.5 for _, norm, _ in training[0]),
        "drifted": drifted,
        "ok": not drifted and not verdict["off"],
    }


def cells_table(records: list[dict]) -> str:
    """Each cell's figures, and in parentheses the multiple of honest rounding."""

    def figure(record: dict, key: str) -> str:
        units = record["units"].get(key)
        return f"{record[FIGURES[key]]:.1e}" + ("" if units is None else f" ({units:.1f})")

    return markdown_table(
        ["layout", "model", "type", "loss, relative", "gradient norm, relative", "largest weight"],
        (
            [r["layout"], r["style"], r["dtype"], *(figure(r, key) for key in FIGURES)]
            for r in records
        ),
    )


def machine_table(runs: list[dict]) -> str:
    """Each run over all cells, with the largest multiples of honest rounding."""

    def most(records: list[dict], key: str) -> str:
        return f"{max(r['units'][key] for r in records if r['units']):.1f}"

    return markdown_table(
        ["vector instructions", "threads", "cells equal", "loss", "gradient norm", "weights"],
        (
            [run["cpu_capability"], str(run["num_threads"])]
            + [f"{sum(r['ok'] for r in run['cells'])} of {len(run['cells'])}"]
            + [most(run["cells"], key) for key in FIGURES]
            for run in runs
        ),
    )


def capabilities() -> list[str]:
    """PyTorch's sets of vector instructions that this CPU can run, smallest first."""
    every = ["default", "avx2", "avx512"]
    own = torch.backends.cpu.get_cpu_capability().lower()
    return every[: every.index(own) + 1] if own in every else [own]


def report(records: list[dict], cells: list[Cell], seconds: float) -> bool:
    """Prints each cell; returns whether all were run and are equal."""
    for record in records:
        word = "ok  " if record["ok"] else "FAIL"
        figures = " ".join(
            f"{key} {record[figure]:.1e} ({record['units'].get(key, 0):.1f})"
            for key, figure in FIGURES.items()
        )
        print(f"{word} {record['name']:48} {figures} clipped {record['clipped_steps']}")
    failed = [record["name"] for record in records if not record["ok"]]
    left_out = [cell for cell in cells if cell not in runnable(cells)]
    for cell in left_out:
        print(f"LEFT OUT {cell.name}: {async_io_problem()}")
    print(
        f"{len(records) - len(failed)} of {len(records)} cells equal the oracle, {seconds:.0f} s",
        flush=True,
    )
    return not failed and not left_out


def main() -> int:
    """Runs the suite, or the cells whose names are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--docs", type=Path, help="page whose generated table is replaced")
    parser.add_argument("--cells", help="only cells whose name holds this")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on each rank")
    parser.add_argument(
        "--machine",
        action="store_true",
        help="with each set of vector instructions that this CPU has, and 1 and 2 threads",
    )
    options = parser.parse_args()
    cells = [cell for cell in CELLS if not options.cells or options.cells in cell.name]
    own = torch.backends.cpu.get_cpu_capability().lower()
    settings = [(own, options.threads)]
    if options.machine:
        settings = list(itertools.product(capabilities(), (1, 2)))
    runs, whole = [], not options.cells
    for capability, threads in settings:
        # Ranks are new processes, which read these when they import torch. Where there are more
        # threads than cores, one that waits must not keep a core from one that works.
        os.environ.update(ATEN_CPU_CAPABILITY=capability, OMP_WAIT_POLICY="PASSIVE")
        begin = time.monotonic()
        print(f"vector instructions: {capability}, threads: {threads}", flush=True)
        records = run_cells(cells, num_threads=threads)
        whole &= report(records, cells, time.monotonic() - begin)
        runs.append({"cpu_capability": capability, "num_threads": threads, "cells": records})
        # One run is the list of its cells; of a machine it is the list of runs.
        write_records(options.json, runs if options.machine else records)
    if options.docs and whole:
        if options.machine:
            replace_table(options.docs, "machine", machine_table(runs))
        else:
            replace_table(options.docs, "cells", cells_table(records))
    return 0 if all(record["ok"] for run in runs for record in run["cells"]) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
