"""A layout by name: `tp2-pp2-zero1`, `tp2-sp-dp2-zero3-offload_cpu`, for tools and tests.

Turns a name into flags of the command line and a DeepSpeed JSON. Imports neither torch nor
DeepSpeed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from megagpt.config.schema import Recompute

Offload = Literal["none", "optimizer_cpu", "cpu", "optimizer_nvme", "nvme"]

_DEGREES = {
    "dp": "data_parallel_size",
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "zero": "zero_stage",
}
_OFFLOADS = ("offload_optimizer_cpu", "offload_cpu", "offload_optimizer_nvme", "offload_nvme")
_CHOICES: dict[str, tuple[str, Any]] = {
    "sp": ("sequence_parallel", True),
    "full": ("recompute", "full"),
    "selective": ("recompute", "selective"),
    "flops": ("balance", "flops"),
    **{word: ("offload", word.removeprefix("offload_")) for word in _OFFLOADS},
}

WORDS = (
    "dpN, tpN, ppN (degrees, default 1), zeroN (stage, default 0), sp (sequence parallelism), "
    "full or selective (recomputation), flops (balance of the stages), "
    + ", ".join(_OFFLOADS)
    + " (cpu and nvme: optimizer and parameters)"
)
"""What a name may hold, in words."""


@dataclass(frozen=True)
class Layout:
    """How a run is divided; not what it computes."""

    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    zero_stage: int = 0
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    balance: Literal["parameters", "flops"] = "parameters"
    offload: Offload = "none"

    @classmethod
    def parse(cls, name: str) -> Layout:
        """Reads a name, words joined by `-` in any order.

        Raises:
            ValueError: For a word that is none, or stands twice.
        """
        values: dict[str, Any] = {}
        for word in name.split("-"):
            if match := re.fullmatch(r"(dp|tp|pp|zero)(\d+)", word):
                key, value = _DEGREES[match[1]], int(match[2])
            elif word in _CHOICES:
                key, value = _CHOICES[word]
            else:
                raise ValueError(f"'{word}' in layout '{name}' is no word; the words are {WORDS}")
            if key in values:
                raise ValueError(f"layout '{name}' says {key} twice; leave one out")
            if value == 0 and word != "zero0":
                raise ValueError(f"'{word}' in layout '{name}' must be at least 1")
            values[key] = value
        return cls(**values)

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.data_parallel_size * self.tensor_parallel_size * self.pipeline_parallel_size

    def arguments(self) -> list[str]:
        """Flags of `launch/pretrain.py`."""
        values = {
            "parallel.tensor_parallel_size": self.tensor_parallel_size,
            "parallel.pipeline_parallel_size": self.pipeline_parallel_size,
            "parallel.sequence_parallel": str(self.sequence_parallel).lower(),
            "parallel.pipeline_partition": self.balance,
            "training.activation_checkpointing": self.recompute,
        }
        return [word for key, value in values.items() for word in (f"--{key}", str(value))]

    def ds_config(self) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        zero: dict[str, Any] = {"stage": self.zero_stage}
        device = "nvme" if self.offload.endswith("nvme") else "cpu"
        if self.offload != "none":
            zero["offload_optimizer"] = {"device": device}
        if self.offload in ("cpu", "nvme"):
            zero["offload_param"] = {"device": device}
        if self.offload == "nvme":
            # By default DeepSpeed keeps the first 1e9 parameters in memory all the same.
            zero["offload_param"]["max_in_cpu"] = 0
        return {"zero_optimization": zero}
