"""Runs cells of the grid through the real trainer and compares them with the oracle.

`make parity` runs all, writes build/parity.json and makes docs/parity.md; the tests run a core, and
the rest as slow tests. Ranks start once for each world size and run all its cells.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from cells import CELLS, TOLERANCES, Cell

from megagpt.config.command_line import parse_config
from megagpt.config.layout import Layout
from megagpt.operations.prebuild import async_io_problem
from megagpt.testing.corpus import byte_corpus
from megagpt.testing.distributed import run_distributed

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
NOISE = ("attention.key.bias",)
"""Weights without a gradient where positions are not rotary: Adam amplifies rounding there."""


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


def oracle_curves(rank: int, world_size: int, cells: list[Cell], data: Path, root: Path) -> dict:
    """The oracle's (curve, validation loss, weights) of every style and feature set needed."""
    import oracle

    references = {}
    for cell in cells:
        if cell.reference not in references:
            config = with_vocabulary(parse_config(arguments(cell, data, root / "oracle"))[0])
            curve, validation, weights = oracle.train(config)
            weights = {name: w.numpy() for name, w in weights.items()}
            references[cell.reference] = (curve, validation, weights)
    return references


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
        if rank == 0:
            print(f"{cell.name}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    return outcomes


def train_cell(rank: int, world_size: int, cell: Cell, data: Path, output_dir: Path) -> tuple:
    from megagpt.checkpoint.weights import load_weights
    from megagpt.training.loop import loop
    from megagpt.training.run import World, prepare_run
    from megagpt.training.start import start

    config, _, sources = parse_config(arguments(cell, data, output_dir))
    run = prepare_run(
        config,
        Layout.parse(cell.layout).ds_config(),
        ds_config_path=cell.layout,
        sources=sources,
        world=World(rank, world_size),
        device="cpu",
    )
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
        own[place] = hashlib.sha256(values.detach().float().numpy().tobytes()).hexdigest()
    everyone: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    copies: dict[tuple, set] = {}
    for digests in everyone:
        for place, digest in digests.items():
            copies.setdefault(place, set()).add(digest)
    return sorted({place[0] for place, digests in copies.items() if len(digests) > 1})


def runnable(cells: list[Cell]) -> list[Cell]:
    """Those that this machine can run: all, or without libaio all but NVMe's."""
    return [c for c in cells if "nvme" not in c.layout or async_io_problem() is None]


def run_cells(cells: list[Cell], *, timeout_seconds: float = 1500) -> list[dict]:
    """Trains cells and compares each with the oracle.

    Returns:
        One record a cell, as in build/parity.json; none for NVMe where libaio is missing.
    """
    records = {}
    cells = runnable(cells)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        data = prepare_data(root)
        common = (data, root)
        references = run_distributed(
            oracle_curves, 1, cells, *common, timeout_seconds=timeout_seconds
        )[0]
        for world_size in sorted({cell.world_size for cell in cells}):
            chosen = [cell for cell in cells if cell.world_size == world_size]
            by_rank = run_distributed(
                train_cells, world_size, chosen, *common, timeout_seconds=timeout_seconds
            )
            for number, cell in enumerate(chosen):
                curves = [outcomes[number][:2] for outcomes in by_rank]
                assert all(c == curves[0] for c in curves), f"{cell.name}: ranks disagree"
                records[cell] = compare(cell, by_rank[0][number], references[cell.reference])
    return [records[cell] for cell in cells]


def compare(cell: Cell, outcome: tuple, reference: tuple) -> dict:
    """The largest differences of a cell from the oracle, and whether they are within tolerance."""
    curve, validation, weights, drifted = outcome
    expected, expected_validation, expected_weights = reference
    assert len(curve) == len(expected) == STEPS
    assert [tokens for *_, tokens in curve] == [tokens for *_, tokens in expected]

    def largest(column: int) -> float:
        # numpy's, for Python's max() passes over a NaN.
        return float(
            np.max(
                [
                    abs(a[column] - b[column]) / abs(b[column])
                    for a, b in zip(curve, expected, strict=True)
                ]
            )
        )

    real = {n: w for n, w in expected_weights.items() if not n.endswith(NOISE)}
    assert weights.keys() == expected_weights.keys()
    differences = [
        abs(weights[name] - whole[: len(weights[name])]).max() for name, whole in real.items()
    ]
    measured = {
        "loss": float(
            np.max([largest(0), abs(validation - expected_validation) / expected_validation])
        ),
        "grad_norm": largest(1),
        "weight": float(np.max(differences)),
    }
    tolerances = TOLERANCES[cell.precision]
    return {
        "name": cell.name,
        "layout": cell.layout,
        "style": " ".join([cell.style, *cell.features]),
        "dtype": cell.precision,
        "max_loss_rel": measured["loss"],
        "max_grad_norm_rel": measured["grad_norm"],
        "max_weight_abs": measured["weight"],
        "max_weight_rel": measured["weight"] / max(float(abs(w).max()) for w in real.values()),
        "tolerances": tolerances,
        "clipped_steps": sum(norm > 1.5 for _, norm, _ in curve),
        "drifted": drifted,
        # A NaN is not within a tolerance.
        "ok": not drifted and all(measured[key] <= limit for key, limit in tolerances.items()),
    }


def markdown(records: list[dict]) -> str:
    """The generated part of docs/parity.md."""
    lines = [
        "| layout | model | type | loss, relative | gradient norm, relative | weights, absolute |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        limits = r["tolerances"]
        lines.append(
            f"| {r['layout']} | {r['style']} | {r['dtype']} | {r['max_loss_rel']:.1e} "
            f"({limits['loss']:.0e}) | "
            + " | ".join(
                f"{r[key]:.1e}" + (f" ({limits[name]:.0e})" if name in limits else "")
                for key, name in (
                    ("max_grad_norm_rel", "grad_norm"),
                    ("max_weight_abs", "weight"),
                )
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the suite, or the cells whose names are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--docs", type=Path, help="page whose generated table is replaced")
    parser.add_argument("--cells", help="only cells whose name holds this")
    options = parser.parse_args()
    cells = [cell for cell in CELLS if not options.cells or options.cells in cell.name]
    begin = time.monotonic()
    records = run_cells(cells)
    for record in records:
        print(
            f"{'ok  ' if record['ok'] else 'FAIL'} {record['name']:48} loss "
            f"{record['max_loss_rel']:.1e} norm {record['max_grad_norm_rel']:.1e} weight "
            f"{record['max_weight_abs']:.1e} clipped {record['clipped_steps']}"
        )
    failed = [record["name"] for record in records if not record["ok"]]
    left_out = [cell for cell in cells if cell not in runnable(cells)]
    for cell in left_out:
        print(f"LEFT OUT {cell.name}: {async_io_problem()}")
    print(
        f"{len(records) - len(failed)} of {len(records)} cells equal the oracle, "
        f"{time.monotonic() - begin:.0f} s"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    if options.docs and not failed and not left_out and not options.cells:
        head, _, rest = options.docs.read_text().partition("<!-- cells -->\n")
        tail = rest.partition("<!-- end of cells -->\n")[2]
        table = f"<!-- cells -->\n{markdown(records)}<!-- end of cells -->\n"
        options.docs.write_text(head + table + tail)
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
