"""Every accepted key of the DeepSpeed JSON, and what proves that it leaves the computation right.

`python tests/parity/keys.py` writes the table into docs/configuration.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cells import CELLS, GPU_CELLS, KEYS

from megagpt.config.deepspeed_keys import ACCEPTED_KEYS
from megagpt.testing.report import markdown_table, replace_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
_OWNED = "must equal the run's configuration; every cell"
_LAYOUT = "the cells of the layouts"
BY_LAYOUT: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
            *("gradient_clipping", "bf16.enabled", "fp16.enabled"),
            "data_types.grad_accum_dtype",
            *(f"optimizer.{key}" for key in ("type", "params")),
            *(f"scheduler.{key}" for key in ("type", "params")),
        ),
        _OWNED,
    ),
    **dict.fromkeys(
        (
            "zero_optimization.stage",
            "zero_optimization.offload_param.device",
            "zero_optimization.offload_param.max_in_cpu",
            "zero_optimization.offload_param.nvme_path",
            "zero_optimization.offload_optimizer.device",
            "zero_optimization.offload_optimizer.nvme_path",
        ),
        _LAYOUT,
    ),
}
"""Those that every cell has at some value, or that no JSON decides."""


def paths(section: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys; a section of settings of optimizer or scheduler counts as one."""
    found = []
    for key, value in section.items():
        path = f"{prefix}{key}"
        is_section = isinstance(value, Mapping) and key != "params"
        found += paths(value, f"{path}.") if is_section else [path]
    return found


def cells_of(path: str) -> list[str]:
    """The cells that train with a key at another value than its own."""
    names = [name for name, values in KEYS.items() if path in paths(values)]
    return [c.name for c in (*CELLS, *GPU_CELLS) if any(name in c.features for name in names)]


def table() -> str:
    """Each key, with what proves it."""
    rows = []
    for path in paths(ACCEPTED_KEYS):
        proofs = [f"`{name}`" for name in cells_of(path)]
        rows.append([f"`{path}`", BY_LAYOUT.get(path) or ", ".join(proofs)])
    return markdown_table(["key", "proved by"], rows)


if __name__ == "__main__":
    replace_table(PAGE, "keys", table())
