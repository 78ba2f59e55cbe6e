"""CONTRIBUTING.md shows the house as the contracts hold it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import house  # noqa: E402


def test_the_page_shows_the_contracts():
    page = house.PAGE.read_text()
    assert house.table(house.read_house()) in page, "make house writes it"


def test_what_a_room_may_import_follows_from_the_contracts():
    rooms = house.House(
        floors=[["top"], ["left", "right"], ["low"]], forbidden={"top": {"right"}}, inner=[]
    )
    assert rooms.may_import("top") == ["left", "low"]
    assert rooms.may_import("left") == ["low"]
    assert rooms.may_import("low") == []


def test_no_file_or_floor_of_the_package_outgrows_its_bound():
    package = house.ROOT / "megagpt"
    files = [path for path in package.rglob("*.py") if "__pycache__" not in path.parts]
    long = {str(f): n for f in files if (n := len(f.read_text().splitlines())) > 400}
    assert not long, long
    floors: dict[Path, int] = {}
    for path in files:
        if path.name != "__init__.py":
            floors[path.parent] = floors.get(path.parent, 0) + 1
    assert max(floors.values()) <= 12, floors
