"""What a setting may be, whatever its section; a number must be finite everywhere.

Next file: `schema.py`, its user.
"""

from __future__ import annotations

import math


def require_positive(section: object, *names: str) -> None:
    """Refuses settings that are given and not above 0."""
    for name in names:
        value = getattr(section, name)
        if value is not None and _finite(name, value) <= 0:
            raise ValueError(f"{name}={value} must be above 0; give a positive number")


def require_not_negative(section: object, *names: str) -> None:
    """Refuses settings below 0."""
    for name in names:
        if _finite(name, getattr(section, name)) < 0:
            raise ValueError(f"{name}={getattr(section, name)} is negative; give 0 or more")


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} is not finite; give a number that is")
    return value


def require_blend(name: str, paths: dict[str, float] | list[str]) -> None:
    """Refuses pairs of data that are none, named twice, or without a weight that counts."""
    if not paths:
        raise ValueError(f"data.{name} names no pair; give at least one prefix")
    if len(set(paths)) < len(paths):
        raise ValueError(f"data.{name}={paths} names a pair twice; name each once")
    for prefix, weight in paths.items() if isinstance(paths, dict) else ():
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"data.{name} gives {prefix} the weight {weight}; give each a positive number, or "
                "leave the pair out"
            )
