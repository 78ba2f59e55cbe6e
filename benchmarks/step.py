"""Tokens a second of a training step on this machine's CPU, beside transformers' GPT-2.

    python benchmarks/step.py --json build/step.json [--model 124m] [--rounds 3] [--only WORDS]

Each cell (who, ZeRO stage, processes) is trained in fresh processes, the cells in turn, several
rounds; what counts is the median over rounds of a run's median step. In the same run: the best that
a matrix product does here, squares and the model's own, which the model's FLOPs are a share of
(attention causal: half of the square). bf16 where the processor has its arithmetic, else fp32.
Bars: vs_transformers_deepspeed and vs_best_peer from the same ZeRO stage and processes, and the
best peer that keeps fp32 master weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megagpt.testing.corpus import byte_corpus
from megagpt.testing.distributed import run_distributed
from megagpt.testing.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
BARS = {
    "vs_transformers_deepspeed": 1.3,
    "vs_best_peer": 1.25,
    "zero3_two_processes_ratio": 0.8,
    "gemm_peak_share": 0.62,
}
"""At least."""
_THREADS = 2
_WARM_UP, _STEPS = 2, 4
_TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class Shape:
    """A GPT-2."""

    num_layers: int = 8
    hidden_size: int = 512
    num_heads: int = 8
    seq_length: int = 512
    vocab_size: int = 32000
    micro_batch_size: int = 4
    precision: str = "bf16"

    @property
    def tokens(self) -> int:
        """Of one step of all processes together."""
        return self.micro_batch_size * self.seq_length

    @property
    def flops(self) -> float:
        """Of one step: forward once, backward twice; causal attention at half of the square."""
        h, layers = self.hidden_size, self.num_layers
        products = 12 * layers * h * h + h * self.vocab_size
        return self.tokens * (6.0 * products + 6.0 * layers * h * self.seq_length)

    def arguments(self) -> list[str]:
        """Flags of our own run."""
        return [
            *("--model.num_layers", str(self.num_layers)),
            *("--model.hidden_size", str(self.hidden_size)),
            *("--model.num_attention_heads", str(self.num_heads)),
            *("--model.seq_length", str(self.seq_length)),
            *("--model.vocab_size", str(self.vocab_size)),
            *("--training.precision", self.precision),
            *("--optimizer.clip_grad", "1.0"),
        ]


SHAPES = {
    "small": Shape(),
    "124m": Shape(12, 768, 12, 1024, 50257, 2),
}


@dataclass(frozen=True)
class Cell:
    """One thing that is timed."""

    who: str
    """megagpt, transformers (under DeepSpeed), or torch (transformers' model without it)."""
    stage: int = 0
    num_processes: int = 1

    @property
    def name(self) -> str:
        """In the table."""
        zero = "" if self.who == "torch" else f" ZeRO-{self.stage}"
        return f"{self.who}{zero}, {self.num_processes} process(es)"


CELLS = (
    *(Cell(who, s, p) for s in (1, 3) for p in (1, 2) for who in ("megagpt", "transformers")),
    Cell("torch"),
)


def _seconds_of_steps(take_step: Any) -> list[float]:
    seconds = []
    for number in range(_WARM_UP + _STEPS):
        begin = time.perf_counter()
        take_step()
        if number >= _WARM_UP:
            seconds.append(time.perf_counter() - begin)
    return seconds


def train_megagpt(rank: int, size: int, cell: Cell, shape: Shape, data: str, out: str) -> list:
    """Our own loop: data, step and followers; a step's time is what the run itself logs."""
    from megagpt.config.command_line import parse_config
    from megagpt.operations.hardware import keep_freed_memory
    from megagpt.training.loop import loop
    from megagpt.training.run import prepare_run, resolve_run
    from megagpt.training.start import start

    flags = [
        *shape.arguments(),
        *("--batch.micro_batch_size", str(shape.micro_batch_size // size)),
        *("--batch.global_batch_size", str(shape.micro_batch_size)),
        *("--training.train_steps", "100", "--training.eval_interval", "0"),
        *("--checkpoint.save_interval", "0", "--data.split", "1,0,0", "--data.path", data),
        *("--output_dir", out),
    ]
    keep_freed_memory()  # as `pretrain` does
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("megagpt").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    ends = []

    def on_step(_: Any) -> bool:
        ends.append(time.perf_counter())
        return len(ends) > _WARM_UP + _STEPS

    with contextlib.redirect_stdout(sys.stderr):
        config, _, sources = parse_config(flags)
        ds_config = {"zero_optimization": {"stage": cell.stage}}
        resolved = resolve_run(config, ds_config, sources=sources, world_size=size, device="cpu")
        run = prepare_run(resolved, rank=rank)
        with start(run) as session:
            loop(session, on_step)
    return [b - a for a, b in zip(ends, ends[1:], strict=False)][_WARM_UP:]


def train_transformers(rank: int, size: int, cell: Cell, shape: Shape) -> list[float]:
    """Transformers' GPT-2, with DeepSpeed as its documentation sets it up, or in plain torch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.seq_length,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    generator = np.random.default_rng(rank)
    samples = shape.micro_batch_size // size

    def batch() -> torch.Tensor:
        return torch.from_numpy(
            generator.integers(0, shape.vocab_size, (samples, shape.seq_length))
        )

    if cell.who == "torch":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        is_bf16 = shape.precision == "bf16"

        def take_step() -> None:
            tokens = batch()
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                loss = model(tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

        return _seconds_of_steps(take_step)

    import deepspeed

    ds_config = {
        "train_micro_batch_size_per_gpu": samples,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": shape.precision == "bf16"},
        "zero_optimization": {"stage": cell.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    with contextlib.redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=ds_config
        )

    def take_engine_step() -> None:
        tokens = batch()
        loss = engine(tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        loss.item()

    return _seconds_of_steps(take_engine_step)


def gemm_peak(rank: int, size: int, shape: Shape) -> float:
    """The most FLOP/s of squares of 1,024 to 4,096 and of the model's own products."""
    h, t, v = shape.hidden_size, shape.tokens, shape.vocab_size
    products = [(n, n, n) for n in (1024, 2048, 4096)]
    products += [(t, h, 4 * h), (t, 4 * h, h), (t, h, v), (v, t, h)]
    dtype = torch.bfloat16 if shape.precision == "bf16" else torch.float32
    best = 0.0
    for m, k, n in products:
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).t()
        for _ in range(8):
            begin = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2.0 * m * k * n / (time.perf_counter() - begin))
    return best


def has_bf16_arithmetic() -> bool:
    """Whether this processor multiplies bf16."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def measure(cell: Cell, shape: Shape, root: Path, data: str, number: int) -> float:
    """Tokens a second of all processes, over the median step of the slowest."""
    size = cell.num_processes
    common = {"num_threads": _THREADS // size, "timeout_seconds": _TIMEOUT_SECONDS}
    if cell.who == "megagpt":
        out = str(root / f"run{number}")
        by_rank = run_distributed(train_megagpt, size, cell, shape, data, out, **common)
    else:
        by_rank = run_distributed(train_transformers, size, cell, shape, **common)
    return shape.tokens / max(statistics.median(seconds) for seconds in by_rank)


def figures(speed: dict[Cell, float], peak: float, shape: Shape) -> dict[str, float]:
    """The ratios that have bars."""

    def of(who: str, stage: int, processes: int) -> float:
        return speed.get(Cell(who, stage, processes), float("nan"))

    ours = of("megagpt", 1, 1)
    peers = [of("transformers", 1, 1), of("torch", 0, 1)]
    return {
        "vs_transformers_deepspeed": min(
            of("megagpt", s, p) / of("transformers", s, p) for s in (1, 3) for p in (1, 2)
        ),
        "vs_best_peer": ours / max(peers),
        "zero3_two_processes_ratio": of("megagpt", 3, 2) / ours,
        "gemm_peak_share": ours / shape.tokens * shape.flops / peak,
    }


def main() -> None:
    """Measures, prints the table, writes the JSON; exit code 1 below a bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--model", choices=SHAPES, default="small", help="shape of the GPT-2")
    parser.add_argument("--rounds", type=int, default=3, help="times that each cell is trained")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.model]
    if not has_bf16_arithmetic():
        shape = Shape(**{**asdict(shape), "precision": "fp32"})
        print("no bf16 arithmetic in this processor: all is fp32", file=sys.stderr)
    cells = [cell for cell in CELLS if arguments.only in cell.name]
    runs: dict[Cell, list[float]] = {cell: [] for cell in cells}
    peaks = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        # This repository's licence, as one document; which tokens they are costs nothing.
        data = str(byte_corpus(root, [(ROOT / "LICENSE").read_text() * 40]))
        for number in range(arguments.rounds):
            peaks += run_distributed(gemm_peak, 1, shape, num_threads=_THREADS)
            for place, cell in enumerate(cells):
                runs[cell].append(measure(cell, shape, root, data, number * 100 + place))
                print(f"{cell.name}: {runs[cell][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    speed = {cell: statistics.median(values) for cell, values in runs.items()}
    peak = max(peaks)
    share = {cell: value / shape.tokens * shape.flops / peak for cell, value in speed.items()}
    rows = [
        [c.name, f"{speed[c]:.0f}", f"{100 * share[c]:.1f} %", str([round(x) for x in runs[c]])]
        for c in cells
    ]
    print(markdown_table(["cell", "tokens/s", "of GEMM peak", "runs"], rows))
    print(f"GEMM peak {peak / 1e9:.0f} GFLOP/s, {shape.precision}, {_THREADS} threads")
    if len(cells) < len(CELLS):
        return
    measured = figures(speed, peak, shape)
    for name, value in measured.items():
        print(f"{name} {value:.3f} (bar {BARS[name]})")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            **measured,
            "bars": BARS,
            "shape": asdict(shape),
            "gemm_peak_gflops": peak / 1e9,
            "tokens_per_second": {cell.name: values for cell, values in runs.items()},
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(any(value < BARS[name] for name, value in measured.items()))


if __name__ == "__main__":
    main()
