"""Draws the house from import-linter's contracts: which room may import which, in CONTRIBUTING.md.

`make house` writes it; a test compares the page with the contracts.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from importlinter import api

from megagpt.testing.report import markdown_table, replace_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
PACKAGE = "megagpt."


@dataclass(frozen=True)
class House:
    """What the contracts say of the rooms right below the package, and of the rooms within them."""

    floors: list[list[str]]
    """From the top; rooms of one floor do not know each other."""
    forbidden: dict[str, set[str]] = field(default_factory=dict)
    """By room, what it may not import though it stands lower."""
    inner: list[tuple[str, str]] = field(default_factory=list)
    """Name and rule of each contract about files within a room."""

    def may_import(self, room: str) -> list[str]:
        """Rooms on lower floors that no contract forbids, from the top."""
        number = next(n for n, floor in enumerate(self.floors) if room in floor)
        below = [lower for floor in self.floors[number + 1 :] for lower in floor]
        return [lower for lower in below if lower not in self.forbidden.get(room, set())]


def read_house(pyproject: Path = ROOT / "pyproject.toml") -> House:
    """Reads the contracts."""
    house = House([])
    for contract in api.read_configuration(str(pyproject))["contracts_options"]:
        if contract["type"] == "layers" and not contract.get("containers"):
            floors = [[_short(m) for m in layer.split("|")] for layer in contract["layers"]]
            floors = [floor for floor in floors if floor != ["__main__"]]
            if all("." not in room for floor in floors for room in floor):
                house.floors.extend(floors)
                continue
        sources = [_short(module) for module in contract.get("source_modules", [])]
        targets = {_short(module) for module in contract.get("forbidden_modules", [])}
        rooms = {room for floor in house.floors for room in floor}
        if sources and set(sources) <= rooms and targets <= rooms:
            for source in sources:
                house.forbidden.setdefault(source, set()).update(targets)
        else:
            house.inner.append((contract["name"], contract["type"]))
    return house


def _short(module: str) -> str:
    return module.strip().strip("()").strip().removeprefix(PACKAGE)


def table(house: House) -> str:
    """The rooms from the top floor down, what each is for, and what it may import."""
    rows = []
    for number, floor in enumerate(house.floors):
        for room in floor:
            purpose = (importlib.import_module(PACKAGE + room).__doc__ or "").split("\n")[0]
            below = ", ".join(house.may_import(room)) or "nothing"
            rows.append([str(len(house.floors) - number), f"`{room}/`", purpose, below])
    lines = [markdown_table(["floor", "room", "holds", "may import"], rows), "", "And further:", ""]
    return "\n".join([*lines, *(f"- {name}" for name, _ in house.inner)])


if __name__ == "__main__":
    replace_table(PAGE, "house", table(read_house()))
    sys.exit(0)
