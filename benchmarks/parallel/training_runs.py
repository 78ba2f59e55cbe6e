"""What both benchmarks share: cases, and training one through the real loop.

Ranks start once for each world size and train all its cases, as in tests/parity/suite.py.
Next files: `communication.py`, `memory.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megagpt.config.command_line import parse_config
from megagpt.config.layout import Layout
from megagpt.config.schema import Config
from megagpt.testing.corpus import byte_corpus
from megagpt.testing.distributed import run_distributed

ROOT = Path(__file__).resolve().parents[2]

_STYLES = {
    # LayerNorm, learned positions, GELU, biases, tied embedding
    "gpt2": "",
    # RMSNorm, rotary, SwiGLU, two key/value heads, QK-norm, untied
    "llama": "--model.normalization rmsnorm --model.position_embedding rope --model.qk_norm true "
    "--model.activation swiglu --model.bias false --model.num_kv_heads 2 "
    "--model.tie_embeddings false",
}

LARGEST_ERROR = 0.05
"""How far a measured figure may be from its formula, relative."""


@dataclass(frozen=True)
class Case:
    """One layout to train."""

    layout: str
    """As `megagpt.config.layout` reads it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    style: Literal["gpt2", "llama"] = "gpt2"
    zero: tuple[tuple[str, Any], ...] = ()
    """Further keys of the DeepSpeed JSON's zero_optimization."""

    @property
    def name(self) -> str:
        """Words that tell it from the others."""
        settings = (f"{key}={json.dumps(value)}" for key, value in self.zero)
        return " ".join([self.layout, self.precision, self.style, *settings])

    def ds_config(self, hidden_size: int) -> dict[str, Any]:
        """The DeepSpeed JSON, with bucket sizes that suit a small model."""
        values = Layout.parse(self.layout).ds_config()
        zero = values["zero_optimization"]
        if zero["stage"] > 0:
            zero["reduce_bucket_size"] = hidden_size**2
        if zero["stage"] == 3:
            zero["stage3_prefetch_bucket_size"] = "auto"
            zero["stage3_param_persistence_threshold"] = "auto"
        zero.update(self.zero)
        return values


def train(
    case: Case,
    arguments: list[str],
    *,
    rank: int,
    data: Path,
    output_dir: Path,
    on_step: Callable[[Any], bool | None],
) -> None:
    """Trains a case until `on_step` returns True.

    Args:
        case: What to train.
        arguments: Flags of `launch/pretrain.py` that are the same for all cases.
        rank: Of this process.
        data: Prefix of the training data.
        output_dir: For what the run writes.
        on_step: Called with the session after each step.
    """
    from megagpt.training.loop import loop
    from megagpt.training.run import prepare_run, resolve_run
    from megagpt.training.start import start

    config, sources = _config(case, [*arguments, "--data.path", str(data)], output_dir)
    # DeepSpeed prints, and its logger keeps the stdout of its import; stdout is for the tables.
    with contextlib.redirect_stdout(sys.stderr):
        resolved = resolve_run(
            config,
            case.ds_config(config.model.hidden_size),
            sources=sources,
            world_size=Layout.parse(case.layout).world_size,
            device="cpu",
        )
        run = prepare_run(resolved, rank=rank)
        with start(run) as session:
            last = loop(session, lambda _: on_step(session))
    assert last is None, "training ended before enough steps were seen"


def resolved_config(case: Case, arguments: list[str]) -> Config:
    """The configuration of a case, for formulae."""
    return _config(case, arguments, Path("unused"))[0]


def _config(case: Case, arguments: list[str], output_dir: Path) -> tuple[Config, dict]:
    config, _, sources = parse_config(
        [
            *arguments,
            *_STYLES[case.style].split(),
            *Layout.parse(case.layout).arguments(),
            *("--training.precision", case.precision, "--training.train_steps", "100"),
            *("--training.eval_interval", "0", "--checkpoint.save_interval", "0"),
            *("--data.split", "1,0,0", "--output_dir", str(output_dir)),
        ]
    )
    return config, sources


def run_cases(function: Callable, cases: list[Case], *, timeout_seconds: float) -> list[list]:
    """Calls function(rank, world_size, cases, data, root) on fresh ranks of each world size.

    Args:
        function: Returns one outcome for each of the cases that it is given.
        cases: Of any world sizes.
        timeout_seconds: For all the cases of one world size.

    Returns:
        For each case the outcomes of its ranks.
    """
    outcomes: dict[Case, list] = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        # This repository's licence, as one document.
        data = byte_corpus(root, [(ROOT / "LICENSE").read_text() * 40])
        for world_size in sorted({Layout.parse(case.layout).world_size for case in cases}):
            chosen = [c for c in cases if Layout.parse(c.layout).world_size == world_size]
            by_rank = run_distributed(
                function, world_size, chosen, data, root, timeout_seconds=timeout_seconds
            )
            for number, case in enumerate(chosen):
                outcomes[case] = [outcome[number] for outcome in by_rank]
    return [outcomes[case] for case in cases]


def is_within(measured: float, predicted: float) -> bool:
    """Whether a measurement agrees with its formula."""
    return abs(measured - predicted) <= LARGEST_ERROR * predicted


def parse_options(description: str | None) -> argparse.Namespace:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--cases", default="", help="only cases whose name holds this")
    return parser.parse_args()
