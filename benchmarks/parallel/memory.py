"""Measures what a rank holds of the model, and compares it with ZeRO's and Megatron's formulae.

Every layout is trained by the real loop. In the third step all tensors of the process are
walked twice, each storage counted once: after the last backward, before gradients are reduced, and
just before the optimizer's update. What is held is taken from the second, but the gradients of ZeRO
0 and 1, whole until they are reduced, from the first; what the first has beyond that is "under
way", with an upper limit for a formula. Buffers that live inside a collective only are not seen.
Two tables: each kind of tensor against its formula, and the total against the papers, with every
excess named. Ends with 1 if a figure is more than 5 % off, or more is under way than allowed.
Next file: `holding.py`, the formulae.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from holding import CAUSES, UNDER_WAY, Term, most_under_way_bytes, predict
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

# 1.1 M parameters, so that alignment to the ranks is far below the tolerance.
_ARGUMENTS = (
    "--model.num_layers 4 --model.hidden_size 128 --model.num_attention_heads 4 "
    "--model.seq_length 64 --model.vocab_padding_multiple 8 --model.vocab_size 2000 "
    "--batch.micro_batch_size 1 --batch.global_batch_size 8"
).split()

CASES = [
    Case("zero0"),
    Case("zero1", "bf16"),
    Case("zero3", "bf16"),
    *(
        Case(f"dp{size}-zero{stage}", precision)
        for size in (2, 4)
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
        if (stage, precision) != (0, "bf16")  # refused, docs/deepspeed.md
    ),
    *(
        Case(f"tp{size}-zero{stage}", precision)
        for size in (2, 4)
        for stage, precision in ((0, "fp32"), (1, "bf16"), (3, "bf16"))
    ),
    *(
        Case(f"tp2-dp2-zero{stage}", precision)
        for stage, precision in ((1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"))
    ),
]

_SMALLEST_BYTES = 64
"""Of a storage that is counted; scalars are not."""

_GRADIENT_BUFFERS = (
    "averaged_gradients",
    "all_grad_tensors",
    "fp32_groups_gradients_flat",
    "grad_partitions_flat_buffer",
)
"""Attributes of DeepSpeed's optimizers."""


def measure_cases(rank: int, world_size: int, cases: list[Case], data: Path, root: Path) -> list:
    """Trains each case on this rank; returns bytes by kind at the two moments of one step."""
    outcomes = []
    for number, case in enumerate(cases):
        outcomes.append(_measure_case(rank, case, data, root / f"{world_size}_{number}"))
        if rank == 0:
            print(case.name, file=sys.stderr, flush=True)
    return outcomes


def _measure_case(rank: int, case: Case, data: Path, output_dir: Path) -> list[Counter]:
    moments: list[Counter] = []
    gc.collect()
    # Engines of earlier cases do not die. Held here, so that no new storage takes their address.
    before = list(_live_tensors())
    known = {_address(tensor) for tensor in before}

    def on_step(session: Any) -> bool:
        if session.state.step == 2:
            engine = session.engine

            def measured_before(function: Any) -> Any:
                def measure_and_call(*arguments: Any, **options: Any) -> Any:
                    if engine.is_gradient_accumulation_boundary():
                        moments.append(_bytes_by_kind(engine, known))
                    return function(*arguments, **options)

                return measure_and_call

            engine.allreduce_gradients = measured_before(engine.allreduce_gradients)
            engine.optimizer.step = measured_before(engine.optimizer.step)
        return session.state.step == 3

    train(
        case,
        _ARGUMENTS,
        rank=rank,
        data=data,
        output_dir=output_dir,
        on_step=on_step,
    )
    assert len(moments) == 2, f"{case.name}: {len(moments)} moments"
    return moments


def _live_tensors() -> Iterator[torch.Tensor]:
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad  # no Python object until it is asked for


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes_by_kind(engine: Any, known: set[int]) -> Counter:
    """Bytes of all storages that are not known, each counted once, under the kind it serves."""
    gc.collect()
    kinds: dict[int, str] = {}
    for kind, tensor in _named_tensors(engine):
        kinds.setdefault(_address(tensor), kind)
    sizes = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about types that torch has deprecated
        for tensor in _live_tensors():
            sizes[_address(tensor)] = tensor.untyped_storage().nbytes()
    total: Counter = Counter()
    for address, num_bytes in sizes.items():
        if address not in known and num_bytes >= _SMALLEST_BYTES:
            total[kinds.get(address, "other")] += num_bytes
    return total


def _named_tensors(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(kind, tensor) of what engine and optimizer hold; the first kind of a storage counts."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = list(engine.module.parameters())
    for parameter in parameters:
        yield "parameters", parameter.data
        yield from _all_tensors("parameters", getattr(parameter, "ds_tensor", None))
    for state in inner.state.values():
        yield from _all_tensors("moments", list(state.values()))
    masters = [parameter for group in inner.param_groups for parameter in group["params"]]
    masters += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    for master in masters:
        yield "master weights", master.data
        yield from _all_tensors("gradients", master.grad)
    for parameter in parameters:
        yield from _all_tensors(
            "gradients", [parameter.grad, getattr(parameter, "grad_accum", None)]
        )
    for name in _GRADIENT_BUFFERS:
        yield from _all_tensors("gradients", getattr(optimizer, name, None))
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        yield from _all_tensors("buckets", list(vars(bucket).values()))


def _all_tensors(kind: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield kind, value
    elif isinstance(value, dict):
        yield from _all_tensors(kind, list(value.values()))
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _all_tensors(kind, element)


def _held(case: Case, after_backward: Counter, before_update: Counter) -> Counter:
    """What counts as held; see the module's docstring."""
    held = Counter(before_update)
    if Layout.parse(case.layout).zero_stage <= 1:
        held["gradients"] = after_backward["gradients"]
    return held


def compare(case: Case, outcomes: list[list[Counter]]) -> dict:
    """The record of a case: figures of the rank that holds most, verdict over all ranks."""
    config, layout = resolved_config(case, _ARGUMENTS), Layout.parse(case.layout)
    limit = most_under_way_bytes(case, config)
    topology = ParallelTopology(layout.world_size, tensor_parallel_size=layout.tensor_parallel_size)
    by_rank = []
    for rank, (after_backward, before_update) in enumerate(outcomes):
        _, dp_rank, _ = topology.coordinates(rank)
        held = _held(case, after_backward, before_update)
        under_way = max(0, after_backward.total() - held.total())
        by_rank.append(_compare_rank(held, predict(case, config, dp_rank=dp_rank)))
        by_rank[-1] |= {"under_way_bytes": under_way, "under_way_limit_bytes": limit}
        by_rank[-1]["ok"] &= under_way <= limit
    most = max(by_rank, key=lambda record: sum(record["bytes"].values()))
    return {
        "case": case.name,
        "ranks": layout.world_size,
        **most,
        "under_way_bytes": max(record["under_way_bytes"] for record in by_rank),
        "ok": all(record["ok"] for record in by_rank),
    }


def _compare_rank(held: Counter, terms: Iterable[Term]) -> dict:
    formula: Counter = Counter()
    causes: Counter = Counter()
    for term in terms:
        formula[term.kind] += term.num_bytes
        causes.update(term.excess_bytes)
    unexplained = sum(num_bytes for kind, num_bytes in held.items() if kind not in formula)
    return {
        "bytes": dict(held),
        "formula_bytes": dict(formula),
        "paper_bytes": formula.total() - causes.total(),
        "excess_bytes": {cause: excess for cause, excess in causes.items() if abs(excess) >= 1},
        "ok": all(is_within(held[kind], num_bytes) for kind, num_bytes in formula.items())
        and unexplained <= LARGEST_ERROR * formula.total(),
    }


_KINDS = ("parameters", "gradients", "master weights", "moments", "buckets", "other")


def kind_table(records: list[dict]) -> str:
    """Each kind of tensor: bytes held, formula, ratio."""
    rows = []
    for record in records:
        for kind in _KINDS:
            measured = record["bytes"].get(kind, 0)
            predicted = record["formula_bytes"].get(kind, 0)
            if measured or predicted:
                ratio = f"{measured / predicted:.3f}" if predicted else "-"
                rows.append([record["case"], kind, f"{measured:,}", f"{predicted:,.0f}", ratio])
        figures = [f"{record[key]:,.0f}" for key in ("under_way_bytes", "under_way_limit_bytes")]
        rows.append([record["case"], "under way", figures[0], f"at most {figures[1]}", "-"])
    return markdown_table(["case", "what", "bytes", "formula", "ratio"], rows)


def paper_table(records: list[dict]) -> str:
    """The total against the papers."""
    rows = []
    for record in records:
        paper, measured = record["paper_bytes"], sum(record["bytes"].values())
        causes = [f"{e / paper:+.1%} {cause}" for cause, e in record["excess_bytes"].items()]
        ratio = f"{measured / paper:.3f}"
        rows.append(
            [record["case"], f"{measured:,}", f"{paper:,.0f}", ratio, "; ".join(causes) or "-"]
        )
    used = {cause for record in records for cause in record["excess_bytes"]}
    legend = [f"- {name}: {text}" for name, text in CAUSES.items() if name in used]
    header = ["case", "bytes", "papers", "ratio", "excess and its cause"]
    return "\n".join([markdown_table(header, rows), "", *legend, f"- under way: {UNDER_WAY}"])


def main() -> int:
    """Measures all cases, or those whose names hold the given words."""
    options = parse_options(__doc__)
    cases = [case for case in CASES if options.cases in case.name]
    outcomes = run_cases(measure_cases, cases, timeout_seconds=1500)
    records = [compare(*pair) for pair in zip(cases, outcomes, strict=True)]
    print(f"{kind_table(records)}\n\n{paper_table(records)}\n")
    write_records(options.json, records)
    failed = [record["case"] for record in records if not record["ok"]]
    print(
        f"{len(records) - len(failed)} of {len(records)} cases within {LARGEST_ERROR:.0%} of their "
        "formula" + (f"; not: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
