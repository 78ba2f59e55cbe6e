"""Trains a run under two layouts for a few steps and compares loss and gradient norm of each step.

Example: verify_parity.py --a dp1-zero0 --b tp2-pp2-zero1 --steps 10 -- --config run.yaml
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megagpt.config.command import run_command
from megagpt.config.command_line import parse_config
from megagpt.config.layout import WORDS
from megagpt.training.parity import compare_layouts, record_curve

TOLERANCES = {"fp32": (2e-6, 1e-4), "bf16": (5e-3, 5e-2), "fp16": (5e-3, 5e-2)}
"""Of loss and gradient norm, relative; see docs/parity.md."""


def main(arguments: list[str]) -> int:
    """Parses the command line, runs both layouts, prints the table.

    Returns:
        0 if every step is within the tolerances, else 1.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--a", help=f"a layout, words joined by '-': {WORDS}")
    parser.add_argument("--b", help="the layout it is compared with")
    parser.add_argument("--steps", type=int, default=10, help="steps to train (default 10)")
    parser.add_argument("--loss_tolerance", type=float, help="relative (fp32: 2e-6)")
    parser.add_argument("--grad_norm_tolerance", type=float, help="relative (fp32: 1e-4)")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # this is one rank
    parser.add_argument("run", nargs="*", help="after --, the run as for launch/pretrain.py")
    options = parser.parse_args(arguments)
    if options.record:
        record_curve(options.run, steps=options.steps, output=options.record)
        return 0
    if not (options.a and options.b):
        raise ValueError("two layouts are compared; give --a LAYOUT and --b LAYOUT")
    if options.steps < 1:
        raise ValueError(f"--steps={options.steps} must be at least 1; give a positive number")
    config, _, _ = parse_config(options.run)
    if options.steps > config.training.train_steps:
        raise ValueError(
            f"--steps={options.steps} is more than the run's train_steps="
            f"{config.training.train_steps}; give fewer"
        )
    differences = compare_layouts(
        options.a, options.b, options.run, steps=options.steps, script=Path(__file__).resolve()
    )
    loss_limit, norm_limit = TOLERANCES[config.training.precision]
    # 0 is a tolerance too: bit for bit.
    if options.loss_tolerance is not None:
        loss_limit = options.loss_tolerance
    if options.grad_norm_tolerance is not None:
        norm_limit = options.grad_norm_tolerance
    print(f"step  loss {options.a}  loss {options.b}  difference  gradient norms  difference")
    for d in differences:
        print(
            f"{d.step:4d}  {d.loss[0]:.9f}  {d.loss[1]:.9f}  {d.loss_rel:.1e}  "
            f"{d.grad_norm[0]:.6f}  {d.grad_norm[1]:.6f}  {d.grad_norm_rel:.1e}"
        )
    # Written so that a NaN is not within.
    within = all(d.loss_rel <= loss_limit and d.grad_norm_rel <= norm_limit for d in differences)
    print(
        f"{'equal' if within else 'DIFFERENT'}: tolerances loss {loss_limit:.0e}, gradient norm "
        f"{norm_limit:.0e}, precision {config.training.precision}"
    )
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
