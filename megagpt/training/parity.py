"""Two layouts of one run, compared step by step: the library of `tools/verify_parity.py`.

Each layout is trained for a few steps by `torchrun` on this host, from the same configuration, and
its exact losses and gradient norms come back in a file. Nothing of the run is kept.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megagpt.config.layout import Layout

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


def compare_layouts(
    a: str, b: str, arguments: list[str], *, steps: int, script: Path
) -> list[StepDifference]:
    """Trains both layouts and pairs their steps.

    Args:
        a: Name of a layout, see `megagpt.config.layout`.
        b: Another.
        arguments: The run, as for `launch/pretrain.py`; neither `--ds_config` nor `--output_dir`.
        steps: Steps to train.
        script: What `torchrun` starts; it must call `record_curve`.

    Raises:
        ValueError: If a name is wrong or a layout does not run.
    """
    layouts = [Layout.parse(name) for name in (a, b)]
    for flag in ("--ds_config", "--output_dir"):
        if any(word.partition("=")[0] == flag for word in arguments):
            raise ValueError(f"{flag} is set by the layout here; leave it out")
    curves = [
        _train(name, layout, arguments, steps=steps, script=script)
        for name, layout in zip((a, b), layouts, strict=True)
    ]
    return [
        StepDifference(step, (x[0], y[0]), (x[1], y[1]))
        for step, (x, y) in enumerate(zip(*curves, strict=True), 1)
    ]


def record_curve(arguments: list[str], *, steps: int, output: Path) -> None:
    """One rank of one layout: trains and, on rank 0, writes the curve."""
    from megagpt.training.pretrain import train

    curve: Curve = []

    def on_step(result) -> bool:
        curve.append((result.loss, result.grad_norm))
        return len(curve) == steps

    train(arguments, on_step)
    if os.environ.get("RANK", "0") == "0":
        output.write_text(json.dumps(curve))


def _train(name: str, layout: Layout, arguments: list[str], *, steps: int, script: Path) -> Curve:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "ds_config.json").write_text(json.dumps(layout.ds_config()))
        curve = root / "curve.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(layout.world_size), str(script)),
            *("--record", str(curve), "--steps", str(steps), "--"),
            *arguments,
            *layout.arguments(),
            *("--ds_config", str(root / "ds_config.json"), "--output_dir", str(root / "run")),
        ]
        threads = max(1, (os.cpu_count() or 1) // layout.world_size)
        process = subprocess.Popen(
            command,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that an interrupt ends launcher and ranks alike
        )
        try:
            _, errors = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if process.returncode or not curve.exists():
            told = [line for line in errors.splitlines() if line.startswith("error: ")]
            reason = told[0].removeprefix("error: ") if told else errors.strip()[-2000:]
            raise ValueError(f"layout {name} does not run: {reason}")
        return [tuple(pair) for pair in json.loads(curve.read_text())]
