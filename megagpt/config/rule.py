"""What a rule of the table of refusals is, and what it looks at.

Next file: `refusals.py`, the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from megagpt.config.deepspeed_keys import AUTO
from megagpt.config.schema import Config

Device = Literal["cpu", "cuda"]
Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Facts:
    """What a rule of layouts looks at."""

    config: Config
    """The typed configuration."""
    ds_config: dict[str, Any]
    """The DeepSpeed JSON, filled in."""
    world_size: int
    """Ranks."""
    device: Device
    """What the run trains on."""

    @property
    def tp(self) -> int:
        """tensor_parallel_size."""
        return self.config.parallel.tensor_parallel_size

    @property
    def pp(self) -> int:
        """pipeline_parallel_size."""
        return self.config.parallel.pipeline_parallel_size

    @property
    def dp(self) -> int | None:
        """Data-parallel ranks; None where tp x pp does not divide the world, a fault of its own."""
        ranks, rest = divmod(self.world_size, self.tp * self.pp)
        return None if rest else ranks

    @property
    def zero(self) -> dict[str, Any]:
        """The section zero_optimization."""
        return self.ds_config.get("zero_optimization", {})

    @property
    def stage(self) -> int | None:
        """The ZeRO stage; None where what is stated is none, a fault that is reported already."""
        stage = self.zero.get("stage")
        return None if stage == AUTO else stage

    def offload(self, what: Literal["optimizer", "param"]) -> str:
        """Device of an offload section, `none` without one."""
        return self.zero.get(f"offload_{what}", {}).get("device", "none")


@dataclass(frozen=True)
class Rule(Generic[Seen]):
    """One combination that does not work: of settings (`Config`), or in a layout (`Facts`)."""

    combination: str
    """In words, for the docs."""
    reason: str
    """Why."""
    remedy: str
    """What to change."""
    find: Callable[[Seen], str | None]
    """The offending values, or None where the rule is kept."""
    is_warning: bool = False
    """Whether the run goes on."""

    def message(self, seen: Seen) -> str | None:
        """One clause with values, reason and remedy, or None."""
        found = self.find(seen)
        return None if found is None else f"{found}: {self.reason}; {self.remedy}"
