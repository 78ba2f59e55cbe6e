"""What the data benchmark measured, under its bars."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megagpt.testing.report import markdown_table

AT_LEAST = {
    "preprocess_1_worker_cpu_ratio": 4.0,
    "preprocess_2_workers_cpu_ratio": 4.0,
    "sample_read_ratio": 5.0,
    "document_mask_ratio": 500.0,
    "index_build_ratio": 1.0,
    "blend_build_ratio": 1.0,
}
"""Bars of the ratios peer / ours."""
AT_MOST = {"preprocess_peak_mb": 240.0, "bytes_per_sample": 12.0, "cached_start_ms": 20.0}
"""Bars of what has no peer."""


@dataclass
class Report:
    """What was measured, by name."""

    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Unit, and the medians and single runs of each side."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a figure is missing."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What has no bar."""

    def add(
        self,
        name: str,
        ours: Callable[[], float],
        *,
        unit: str,
        repeats: int,
        scale: float = 1,
        peer: Callable[[], float] | None = None,
        reason: str = "",
    ) -> None:
        """Measures both sides in turn.

        Args:
            name: Of the figure.
            ours: Measures our side once.
            unit: Of what it returns, times `scale`.
            repeats: Times that each side is measured.
            scale: Factor to the unit.
            peer: Measures the other side once; None where there is none.
            reason: Why there is none, for a ratio.
        """
        runs: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(repeats):
            runs["ours"].append(ours() * scale)
            if peer is not None:
                runs["peer"].append(peer() * scale)
        medians = {side: statistics.median(each) if each else None for side, each in runs.items()}
        self.measured[name] = {"unit": unit, **medians, "runs": runs}
        if reason:
            self.reasons[name] = reason
        figures = ", ".join(f"{side} {_cell(medians[side], unit)}" for side in medians)
        print(f"{name}: {figures}", file=sys.stderr, flush=True)

    def value(self, name: str) -> float | None:
        """The figure that has a bar; None where it is missing."""
        sides = self.measured.get(name)
        if sides is None or name in self.reasons:
            return None
        return sides["ours"] if name in AT_MOST else sides["peer"] / sides["ours"]

    def is_ok(self, name: str) -> bool | None:
        """Whether a figure meets its bar; None where it is missing."""
        value = self.value(name)
        if value is None:
            return None
        return value <= AT_MOST[name] if name in AT_MOST else value >= AT_LEAST[name]

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        names = [*AT_LEAST, *AT_MOST]
        return {
            **{name: self.value(name) for name in names},
            **self.facts,
            "bars": {**AT_LEAST, **AT_MOST},
            "ok": {name: self.is_ok(name) for name in names},
            "reasons": self.reasons,
            "measured": self.measured,
        }

    def table(self) -> str:
        """Figures under their bars."""
        rows = []
        for name in (*AT_LEAST, *AT_MOST):
            sides, value = self.measured.get(name, {}), self.value(name)
            cells = [_cell(sides.get(side), sides.get("unit")) for side in ("ours", "peer")]
            ratio = f"{value:.2f}" if value is not None and name in AT_LEAST else "-"
            bar = f">= {AT_LEAST[name]:g}" if name in AT_LEAST else f"<= {AT_MOST[name]:g}"
            ok = {True: "yes", False: "NO", None: "-"}[self.is_ok(name)]
            rows.append([name, *cells, ratio, bar, ok])
        return markdown_table(["name", "ours", "peer", "ratio", "bar", "ok"], rows)


def _cell(value: float | None, unit: str | None) -> str:
    return "-" if value is None else f"{value:.4g} {unit}"
