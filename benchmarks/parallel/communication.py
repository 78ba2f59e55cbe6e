"""Counts the bytes of each collective in one optimizer step and compares them with formulae.

Every layout is trained by the real loop; its third and fourth step are counted, which must be
the same, and the fourth is counted again by torch's profiler. Two tables: what each collective was
handed, against `traffic.py`; and what a rank sends on a ring, against the papers, with every
excess named. Ends with 1 if a figure is more than 5 % off its formula.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from collective_counter import Call, CollectiveCounter, count_dispatched
from traffic import CAUSES, SCALAR_BYTES, Term, predict
from training_runs import (
    LARGEST_ERROR,
    Case,
    is_within,
    parse_options,
    resolved_config,
    run_cases,
    train,
)

from megagpt.config.layout import Layout
from megagpt.parallel.topology import ParallelTopology
from megagpt.testing.report import markdown_table, write_records

_ARGUMENTS = (
    "--model.num_layers 4 --model.hidden_size 64 --model.num_attention_heads 4 "
    "--model.seq_length 48 --model.vocab_padding_multiple 8 --model.vocab_size 257 "
    "--batch.micro_batch_size 2 --batch.global_batch_size 8"
).split()

# Prefetching keeps what it finds gathered, and with it a part of the weights.
_REUSE_NOTHING = (("stage3_max_reuse_distance", 0), ("stage3_prefetch_bucket_size", 0))
_REDUCE_TO_OWNER = (("use_multi_rank_bucket_allreduce", False),)

CASES = [
    # one rank
    Case("zero0"),
    *(Case(f"zero{stage}", "bf16") for stage in (1, 2, 3)),
    # data parallelism
    *(
        Case(f"dp{size}-zero{stage}", precision)
        for size in (2, 4)
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
        if (stage, precision) != (0, "bf16")  # refused, docs/deepspeed.md
    ),
    Case("dp2-zero2", "bf16", zero=_REDUCE_TO_OWNER),
    Case("dp4-zero1", "fp32", zero=_REDUCE_TO_OWNER),
    Case("dp2-zero3", "bf16", zero=_REUSE_NOTHING),
    Case("dp4-zero3", "bf16", zero=_REUSE_NOTHING),
    # tensor and sequence parallelism
    *(Case(f"tp{size}{sp}-zero0") for size in (2, 4) for sp in ("", "-sp")),
    Case("tp2-sp-zero0", style="llama"),
    Case("tp4-zero0", style="llama"),
    Case("tp4-sp-zero0", style="llama"),
    Case("tp2-zero0-full"),
    Case("tp2-sp-zero1", "bf16"),
    *(Case(f"tp2-dp2-zero{stage}", p) for stage in (1, 3) for p in ("fp32", "bf16")),
    # pipeline
    Case("pp2-zero0"),
    Case("pp2-zero1", "bf16"),
    Case("pp4-zero0"),
    Case("pp4-zero1", "bf16", style="llama"),
    Case("pp2-dp2-zero1", "bf16"),
    Case("tp2-sp-pp2-zero1"),
]


def count_cases(rank: int, world_size: int, cases: list[Case], data: Path, root: Path) -> list:
    """Trains each case on this rank; returns its calls in one step, and those dispatched."""
    outcomes = []
    for number, case in enumerate(cases):
        output_dir = root / f"{world_size}_{number}"
        outcomes.append(_count_case(rank, case, data, output_dir))
        if rank == 0:
            print(case.name, file=sys.stderr, flush=True)
    return outcomes


def _count_case(rank: int, case: Case, data: Path, output_dir: Path) -> tuple[list[Call], Counter]:
    steps: list[list[Call]] = []
    counter: CollectiveCounter
    dispatched: Counter
    profiler = ExitStack()

    def on_step(session: Any) -> bool:
        # A step begins with the logging of the one before, and is as long as any other.
        nonlocal counter, dispatched
        step = session.state.step
        if step == 1:
            counter = CollectiveCounter(lambda group: _axis_of(group, session.groups))
        if step in (3, 4):
            steps.append(counter.stop())
        if step == 4:
            profiler.close()
            return True
        if step == 3:
            dispatched = profiler.enter_context(count_dispatched())
        if step in (2, 3):
            counter.start()
        return False

    train(
        case,
        _ARGUMENTS,
        rank=rank,
        data=data,
        output_dir=output_dir,
        on_step=on_step,
    )
    assert Counter(steps[0]) == Counter(steps[1]), f"{case.name}: two steps differ"
    return steps[1], dispatched


def _axis_of(group: dist.ProcessGroup, groups: Any) -> str:
    """The world, the replica, or the axes along which the group's ranks differ."""
    if group.size() == 1:
        return "none"
    if group.group_name == dist.group.WORLD.group_name:
        return "world"
    if group.group_name == groups.replica_group.group_name:
        return "replica"
    places = [groups.topology.coordinates(rank) for rank in dist.get_process_group_ranks(group)]
    differing = [len(set(values)) > 1 for values in zip(*places, strict=True)]
    axes = zip(("pp", "dp", "tp"), differing, strict=True)
    return " x ".join(axis for axis, differs in axes if differs)


def _row_of(operation: str, axis: str, payload_bytes: float) -> tuple[str, str]:
    """Where a call is counted."""
    if payload_bytes <= SCALAR_BYTES:
        return ("any", "scalars")
    if operation in ("send", "receive"):
        return ("pp", operation)  # DeepSpeed sends over the world's group, within a pipeline only
    return (axis, operation)


def compare(case: Case, outcomes: list[tuple[list[Call], Counter]]) -> dict:
    """The record of a case: figures of the rank that sends most, ratios of the worst rank."""
    config = resolved_config(case, _ARGUMENTS)
    layout = Layout.parse(case.layout)
    topology = ParallelTopology(
        layout.world_size,
        tensor_parallel_size=layout.tensor_parallel_size,
        pipeline_parallel_size=layout.pipeline_parallel_size,
    )
    by_rank = []
    for rank, (calls, _) in enumerate(outcomes):
        pp_rank, _, _ = topology.coordinates(rank)
        by_rank.append(_compare_rank(calls, predict(case, config, pp_rank=pp_rank)))
    most = max(by_rank, key=lambda record: sum(row["sent_bytes"] for row in record["rows"]))
    counted = [Counter(call.operation for call in calls) for calls, _ in outcomes]
    is_complete = all(
        count == dispatched for count, (_, dispatched) in zip(counted, outcomes, strict=True)
    )
    return {
        "case": case.name,
        "ranks": layout.world_size,
        **most,
        "calls_as_dispatched": is_complete,
        "ok": is_complete and all(record["ok"] for record in by_rank),
    }


def _compare_rank(calls: list[Call], terms: list[Term]) -> dict:
    rows: dict[tuple[str, str], dict] = {}

    def row(key: tuple[str, str]) -> dict:
        names = ("calls", "bytes", "formula_bytes", "sent_bytes")
        return rows.setdefault(
            key, {"axis": key[0], "operation": key[1], **dict.fromkeys(names, 0)}
        )

    alone = [call for call in calls if call.group_size == 1]
    for call in calls:
        if call.group_size > 1:
            found = row(_row_of(call.operation, call.axis, call.payload_bytes))
            found["calls"] += 1
            found["bytes"] += call.payload_bytes
            found["sent_bytes"] += call.ring_bytes
    for term in terms:
        key = ("any", "scalars") if term.operation == "scalars" else (term.axis, term.operation)
        if term.payload_bytes:
            row(key)["formula_bytes"] += term.payload_bytes
    values = [rows[key] for key in sorted(rows)]
    return {
        "rows": values,
        "axes": [_axis_record(axis, values, terms) for axis in ("dp", "tp", "pp")],
        "bytes_in_groups_of_one": sum(call.payload_bytes for call in alone),
        "ok": all(is_within(value["bytes"], value["formula_bytes"]) for value in values),
    }


def _axis_record(axis: str, rows: list[dict], terms: list[Term]) -> dict:
    """Bytes sent along an axis, the papers' formula, and the causes of the difference."""
    own = [term for term in terms if term.axis == axis and term.ring_bytes]
    causes: Counter = Counter()
    for term in own:
        for cause, share in term.excess.items():
            causes[cause] += term.ring_bytes * share
    return {
        "axis": axis,
        "sent_bytes": sum(row["sent_bytes"] for row in rows if row["axis"] == axis),
        "paper_bytes": sum(term.paper_bytes for term in own),
        "excess_bytes": {cause: excess for cause, excess in causes.items() if excess},
    }


def collective_table(records: list[dict]) -> str:
    """What each collective was handed."""
    lines = []
    for record in records:
        for row in record["rows"]:
            ratio = row["bytes"] / row["formula_bytes"] if row["formula_bytes"] else float("inf")
            figures = [f"{row[key]:,.0f}" for key in ("calls", "bytes", "formula_bytes")]
            lines.append(
                [record["case"], row["axis"], row["operation"], *figures, f"{ratio:.3f}"]
                + [f"{row['sent_bytes']:,.0f}"]
            )
        if not record["rows"]:
            lines.append([record["case"], "-", "none", "0", "0", "0", "-", "0"])
    header = ["case", "axis", "operation", "calls", "bytes", "formula", "ratio", "sent on a ring"]
    return markdown_table(header, lines)


def paper_table(records: list[dict]) -> str:
    """What a rank sends along each axis, against the papers."""
    lines = []
    for record in records:
        for axis in record["axes"]:
            paper = axis["paper_bytes"]
            if not paper:
                continue
            causes = [
                f"{excess / paper:+.1%} {cause}" for cause, excess in axis["excess_bytes"].items()
            ]
            figures = [f"{axis[key]:,.0f}" for key in ("sent_bytes", "paper_bytes")]
            ratio = f"{axis['sent_bytes'] / paper:.3f}"
            lines.append([record["case"], axis["axis"], *figures, ratio, "; ".join(causes) or "-"])
    header = ["case", "axis", "sent on a ring", "papers", "ratio", "excess and its cause"]
    used = {c for record in records for axis in record["axes"] for c in axis["excess_bytes"]}
    legend = [f"- {name}: {text}" for name, text in CAUSES.items() if name in used]
    return "\n".join([markdown_table(header, lines), "", *legend])


def main() -> int:
    """Counts all cases, or those whose names hold the given words."""
    options = parse_options(__doc__)
    cases = [case for case in CASES if options.cases in case.name]
    outcomes = run_cases(count_cases, cases, timeout_seconds=1500)
    records = [compare(*pair) for pair in zip(cases, outcomes, strict=True)]
    print(f"{collective_table(records)}\n\n{paper_table(records)}\n")
    for record in records:
        if record["ranks"] == 1:
            print(
                f"{record['case']}: nothing sent; {record['bytes_in_groups_of_one']:,} bytes "
                "handed to groups of one rank"
            )
    write_records(options.json, records)
    failed = [record["case"] for record in records if not record["ok"]]
    print(
        f"{len(records) - len(failed)} of {len(records)} cases within {LARGEST_ERROR:.0%} of their "
        f"formula, every call seen by the dispatcher too"
        + (f"; not: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
