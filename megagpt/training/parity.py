"""Two layouts of one run, compared step by step: the library of `megagpt parity`.

Each layout is trained for a few steps by `torchrun` on this host, from the same configuration, and
its exact losses and gradient norms come back in a file. Nothing of the run is kept. As a program
this module is one of the ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megagpt.config.command import run_command
from megagpt.config.command_line import parse_config
from megagpt.config.layout import Layout
from megagpt.operations.steps import own_session

TOLERANCES = {"fp32": (2e-6, 1e-4), "bf16": (5e-3, 5e-2), "fp16": (5e-3, 5e-2)}
"""Of loss and gradient norm, relative; see docs/parity.md."""

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


@dataclass(frozen=True)
class StepDifference:
    """One step of both layouts."""

    step: int
    loss: tuple[float, float]
    grad_norm: tuple[float, float]

    @property
    def loss_rel(self) -> float:
        """Relative difference of the losses."""
        return abs(self.loss[0] - self.loss[1]) / abs(self.loss[1])

    @property
    def grad_norm_rel(self) -> float:
        """Relative difference of the gradient norms."""
        return abs(self.grad_norm[0] - self.grad_norm[1]) / abs(self.grad_norm[1])


@dataclass(frozen=True)
class Comparison:
    """All steps of both layouts, and by how much they may differ."""

    steps: list[StepDifference]
    loss_tolerance: float
    grad_norm_tolerance: float
    precision: str

    @property
    def is_equal(self) -> bool:
        """Whether every step is within the tolerances; one that is not a number is not."""
        return all(
            step.loss_rel <= self.loss_tolerance and step.grad_norm_rel <= self.grad_norm_tolerance
            for step in self.steps
        )


def compare_layouts(
    a: str,
    b: str,
    arguments: list[str],
    *,
    steps: int,
    loss_tolerance: float | None = None,
    grad_norm_tolerance: float | None = None,
) -> Comparison:
    """Trains both layouts and pairs their steps.

    Args:
        a: Name of a layout, see `megagpt.config.layout`.
        b: Another.
        arguments: The run, as for `megagpt train`; neither `--ds_config` nor `--output_dir`.
        steps: Steps to train.
        loss_tolerance: Relative; default: that of the precision.
        grad_norm_tolerance: As well; 0 asks for the same bits.

    Raises:
        ValueError: If a name or the number of steps is wrong, or a layout does not run.
    """
    if steps < 1:
        raise ValueError(f"--steps={steps} must be at least 1; give a positive number")
    training = parse_config(arguments)[0].training
    if steps > training.train_steps:
        raise ValueError(
            f"--steps={steps} is more than the run's train_steps={training.train_steps}; give fewer"
        )
    layouts = [Layout.parse(name) for name in (a, b)]
    for flag in ("--ds_config", "--output_dir"):
        if any(word.partition("=")[0] == flag for word in arguments):
            raise ValueError(f"{flag} is set by the layout here; leave it out")
    curves = [
        _train(name, layout, arguments, steps=steps)
        for name, layout in zip((a, b), layouts, strict=True)
    ]
    loss_default, grad_norm_default = TOLERANCES[training.precision]
    return Comparison(
        [
            StepDifference(step, (x[0], y[0]), (x[1], y[1]))
            for step, (x, y) in enumerate(zip(*curves, strict=True), 1)
        ],
        loss_default if loss_tolerance is None else loss_tolerance,
        grad_norm_default if grad_norm_tolerance is None else grad_norm_tolerance,
        training.precision,
    )


def record_curve(words: list[str]) -> None:
    """One rank of one layout: trains and, on rank 0, writes the curve.

    Args:
        words: Steps, file of the curve, and the arguments of the run.
    """
    from megagpt.training.pretrain import pretrain

    steps, output, *arguments = words
    curve: Curve = []

    def on_step(result) -> bool:
        curve.append((result.loss, result.grad_norm))
        return len(curve) == int(steps)

    pretrain(arguments, on_step)
    if os.environ.get("RANK", "0") == "0":
        Path(output).write_text(json.dumps(curve))


def _train(name: str, layout: Layout, arguments: list[str], *, steps: int) -> Curve:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "ds_config.json").write_text(json.dumps(layout.ds_config()))
        curve = root / "curve.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(layout.world_size), "--module", __name__),
            *(str(steps), str(curve)),
            *arguments,
            *layout.arguments(),
            *("--ds_config", str(root / "ds_config.json"), "--output_dir", str(root / "run")),
        ]
        threads = max(1, (os.cpu_count() or 1) // layout.world_size)
        with own_session(
            command,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            _, errors = process.communicate()
        if process.returncode or not curve.exists():
            told = [line for line in errors.splitlines() if line.startswith("error: ")]
            reason = told[0].removeprefix("error: ") if told else errors.strip()[-2000:]
            raise ValueError(f"layout {name} does not run: {reason}")
        return [tuple(pair) for pair in json.loads(curve.read_text())]


if __name__ == "__main__":
    sys.exit(run_command(record_curve))
