"""Trains a run under two layouts and compares the losses and norms of each step.

Example: megagpt parity --a dp1-zero0 --b tp2-pp2-zero1 --steps 10 -- --config run.yaml
"""

from __future__ import annotations

import argparse

from megagpt.config.command import EXIT_ERROR
from megagpt.config.layout import WORDS
from megagpt.training.parity import compare_layouts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--a", help=f"a layout, words joined by '-': {WORDS}")
    add("--b", help="the layout it is compared with")
    add("--steps", type=int, default=10, help="steps to train (default 10)")
    add("--loss_tolerance", type=float, help="relative (fp32: 2e-6)")
    add("--grad_norm_tolerance", type=float, help="relative (fp32: 1e-4)")
    add("run", nargs="*", help="after --, the run as for megagpt train")


def main(options: argparse.Namespace) -> int:
    """Runs both layouts and prints the table; 0 if every step is within the tolerances."""
    if not (options.a and options.b):
        raise ValueError("two layouts are compared; give --a LAYOUT and --b LAYOUT")
    compared = compare_layouts(
        options.a,
        options.b,
        options.run,
        steps=options.steps,
        loss_tolerance=options.loss_tolerance,
        grad_norm_tolerance=options.grad_norm_tolerance,
    )
    print(f"step  loss {options.a}  loss {options.b}  difference  gradient norms  difference")
    for d in compared.steps:
        print(
            f"{d.step:4d}  {d.loss[0]:.9f}  {d.loss[1]:.9f}  {d.loss_rel:.1e}  "
            f"{d.grad_norm[0]:.6f}  {d.grad_norm[1]:.6f}  {d.grad_norm_rel:.1e}"
        )
    print(
        f"{'equal' if compared.is_equal else 'DIFFERENT'}: tolerances "
        f"loss {compared.loss_tolerance:.0e}, gradient norm {compared.grad_norm_tolerance:.0e}, "
        f"precision {compared.precision}"
    )
    return 0 if compared.is_equal else EXIT_ERROR
