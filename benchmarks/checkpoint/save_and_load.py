"""Saving and loading beside plain safetensors and beside DeepSpeed, on two ranks, in one run.

- save: each rank's `Checkpointer.save`, beside `safetensors.save_file` of the same tensors by the
  same ranks with the same fsync, and beside `engine.save_checkpoint`, which does not fsync: its
  files are flushed after it, within its time.
- load: a layout loads its own checkpoint and the other's, in both directions; and `load_file` of
  the same bytes. Files are in the page cache.
- stall: how long training stands still for a save in the background, in steps; and how much longer
  the steps are meanwhile.
Sides alternate; figures are medians. Ends with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megagpt.config.command_line import parse_config
from megagpt.config.layout import Layout
from megagpt.testing.corpus import byte_corpus
from megagpt.testing.distributed import run_distributed
from megagpt.testing.report import markdown_table, write_records

ROOT = Path(__file__).resolve().parents[2]

LAYOUTS = ("dp2-zero1", "tp2-zero1")
BARS = {
    "save_bandwidth_ratio": (">=", 0.8),
    "async_stall_steps": ("<=", 0.2),
    "other_layout_load_ratio": ("<=", 2.0),
}
# 29 M parameters: 353 MB of weights and moments.
_MODEL = (
    "--model.num_layers 8 --model.hidden_size 512 --model.num_attention_heads 8 "
    "--model.seq_length 128 --model.vocab_size 8192 --model.vocab_padding_multiple 8 "
    "--batch.micro_batch_size 4 --batch.global_batch_size 16 --training.precision fp32 "
    "--training.train_steps 1000 --training.eval_interval 0 --data.split 1,0,0"
).split()
_STEPS, _SAVE_INTERVAL = 13, 4


def _run(rank: int, layout_name: str, data: Path, output_dir: Path, *words: str) -> Any:
    from megagpt.training.run import prepare_run, resolve_run

    layout = Layout.parse(layout_name)
    config, _, sources = parse_config(
        [
            *_MODEL,
            *layout.arguments(),
            *("--data.path", str(data), "--output_dir", str(output_dir)),
            *words,
        ]
    )
    resolved = resolve_run(
        config, layout.ds_config(), sources=sources, world_size=layout.world_size, device="cpu"
    )
    return prepare_run(resolved, rank=rank)


def _timed(function: Callable[[], Any]) -> float:
    """Seconds until all ranks have done it."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        os.sync()  # what the other sides have left to write is theirs
    dist.barrier()
    begin = time.monotonic()
    function()
    dist.barrier()
    return time.monotonic() - begin


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def measure(rank: int, world_size: int, data: Path, root: Path, repeats: int) -> dict[str, Any]:
    """All figures of this rank; those of rank 0 count, for every time ends in a barrier."""
    from megagpt.training.loop import advance
    from megagpt.training.start import start

    seconds: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        sessions = {}
        for name in LAYOUTS:
            sessions[name] = stack.enter_context(start(_run(rank, name, data, root / name)))
            advance(sessions[name])
        steps = {name: root / name / "checkpoints" / "step_00000001" for name in LAYOUTS}
        for session in sessions.values():
            session.checkpointer.save(session.state)
        ours = sessions[LAYOUTS[0]]
        files = sorted(steps[LAYOUTS[0]].glob(f"*-{rank:05d}.safetensors"))
        for _ in range(repeats):
            _measure_saves(ours, files, root, seconds)
            for target, session in sessions.items():
                for source, step in steps.items():
                    kind = "load same" if source == target else "load other"
                    elapsed = _timed(lambda t=session, s=step: t.checkpointer.load(s))
                    seconds[f"{kind} {target}"].append(elapsed)
            seconds["load plain"].append(_timed(lambda: [_load_file(path) for path in files]))
        num_bytes = sum(path.stat().st_size for path in steps[LAYOUTS[0]].glob("*.safetensors"))
    return {
        "seconds": dict(seconds),
        "bytes": num_bytes,
        "stall": _measure_stall(rank, data, root / "stall"),
    }


def _measure_saves(
    session: Any, files: list[Path], root: Path, seconds: dict[str, list[float]]
) -> None:
    import torch.distributed as dist
    from safetensors.torch import load_file, save_file

    tensors = {path.name: load_file(path) for path in files}
    plain, theirs = root / "plain", root / "deepspeed"
    plain.mkdir(exist_ok=True)

    def write_plainly() -> None:
        for name, values in tensors.items():
            save_file(values, plain / name)
            _flush(plain / name)
        _flush(plain)

    def save_with_deepspeed() -> None:
        session.engine.save_checkpoint(str(theirs), tag="tag", save_latest=False)
        if dist.get_rank() == 0:
            for path in theirs.rglob("*.pt"):
                _flush(path)

    seconds["save plain"].append(_timed(write_plainly))
    seconds["save ours"].append(_timed(lambda: session.checkpointer.save(session.state)))
    seconds["save deepspeed"].append(_timed(save_with_deepspeed))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(plain)
        shutil.rmtree(theirs)
    dist.barrier()


def _load_file(path: Path) -> Any:
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _measure_stall(rank: int, data: Path, output_dir: Path) -> dict[str, float]:
    """A real run that saves in the background; seconds of a step, of a save, of what it costs."""
    from megagpt.training.loop import loop
    from megagpt.training.start import start

    run = _run(
        *(rank, LAYOUTS[0], data, output_dir, "--checkpoint.async_save", "true"),
        *("--checkpoint.save_interval", str(_SAVE_INTERVAL), "--checkpoint.keep_last", "1"),
    )
    ends: list[float] = []
    blocked: list[float] = []

    def on_step(_: Any) -> bool:
        if not ends:
            save = session.checkpointer.save

            def timed_save(state: Any) -> None:
                begin = time.monotonic()
                save(state)
                blocked.append(time.monotonic() - begin)

            session.checkpointer.save = timed_save
        ends.append(time.monotonic())
        return len(ends) == _STEPS

    with start(run) as session:
        loop(session, on_step)
    intervals = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    after_save = [n for n in range(len(intervals)) if (n + 1) % _SAVE_INTERVAL == 0]
    # The first steps find their memory; the one after a save has the writing beside it.
    quiet = [t for n, t in enumerate(intervals) if n not in after_save and n > 0]
    step = statistics.median(quiet)
    # The first save finds the memory of its copy.
    disturbed = [intervals[n] - blocked[i] for i, n in enumerate(after_save)][1:]
    return {
        "step_seconds": step,
        "blocked_seconds": statistics.median(blocked[1:]),
        "first_blocked_seconds": blocked[0],
        "slower_seconds": statistics.median(disturbed) - step,
    }


def summarise(outcome: dict[str, Any]) -> dict[str, Any]:
    """The figures with bars, and what they are made of."""
    seconds = {name: statistics.median(values) for name, values in outcome["seconds"].items()}
    stall = outcome["stall"]
    other = {name: seconds[f"load other {name}"] / seconds[f"load same {name}"] for name in LAYOUTS}
    return {
        "save_bandwidth_ratio": seconds["save plain"] / seconds["save ours"],
        "save_bandwidth_ratio_to_deepspeed": seconds["save deepspeed"] / seconds["save ours"],
        "async_stall_steps": stall["blocked_seconds"] / stall["step_seconds"],
        "async_first_stall_steps": stall["first_blocked_seconds"] / stall["step_seconds"],
        "async_slower_steps": stall["slower_seconds"] / stall["step_seconds"],
        "other_layout_load_ratio": max(other.values()),
        "load_bandwidth_ratio": seconds["load plain"] / seconds[f"load same {LAYOUTS[0]}"],
        "megabytes": outcome["bytes"] / 1e6,
        "mb_per_second": {name: outcome["bytes"] / 1e6 / s for name, s in seconds.items()},
        "seconds": outcome["seconds"],
        "stall": stall,
    }


def main() -> int:
    """Measures and prints; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=5, help="times that each side is measured")
    parser.add_argument(
        "--work_dir", help="on the file system to measure; default: a temporary one"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work_dir) as directory:
        root = Path(directory)
        data = byte_corpus(root, [(ROOT / "LICENSE").read_text() * 40])
        outcome = run_distributed(measure, 2, data, root, options.repeats, timeout_seconds=1500)[0]
    figures = summarise(outcome)
    bandwidths = sorted(figures["mb_per_second"].items())
    rows = [[name, f"{value:,.0f}"] for name, value in bandwidths]
    print(markdown_table([f"{figures['megabytes']:.0f} MB, two ranks", "MB/s"], rows))
    missed = False
    for name, value in figures.items():
        if isinstance(value, float):
            sign, bar = BARS.get(name, ("", 0.0))
            is_met = not sign or (value >= bar if sign == ">=" else value <= bar)
            missed |= not is_met
            note = f"  (bar {sign} {bar}: {'met' if is_met else 'MISSED'})" if sign else ""
            print(f"{name} {value:.3f}{note}")
    write_records(options.json, figures)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
