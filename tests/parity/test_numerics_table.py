"""docs/numerics.md, the code that cites its rows, and the faults that plant them say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from triptych.parity import faults

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/triptych"
COLUMNS = 7
SOURCES = sorted(PACKAGE.rglob("*.py"))


def rows(text: str) -> dict[int, list[str]]:
    """Number -> cells of the table's rows."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [row[0] for row in found if len(row) != COLUMNS or not all(row)] == []
    assert len({row[0] for row in found}) == len(found)
    return {int(row[0]): row for row in found}


def cited(source: str) -> set[int]:
    """Rows that a source cites: `numerics 7`, `numerics 12-14`, `numerics 1, 2, 6`."""
    found: set[int] = set()
    for reference in re.findall(r"\bnumerics (\d+(?:(?:, |-)\d+)*)", source):
        for span in reference.split(", "):
            first, _, last = span.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def quoted(cell: str) -> set[str]:
    """What stands in backticks."""
    return set(re.findall(r"`([^`]+)`", cell))


TABLE = rows((ROOT / "docs/numerics.md").read_text())


def test_citations_are_read_in_every_form() -> None:
    assert cited("(numerics 7) (numerics 12-14), numerics 1, 2, 6: numerics of a run") == {1, 2, 6, 7, 12, 13, 14}


def test_the_table_has_every_row_in_order() -> None:
    assert list(TABLE) == list(range(1, len(TABLE) + 1))
    assert set(TABLE) == {fault.numerics for fault in faults.FAULTS} | set(faults.NOT_EXPRESSIBLE)


def test_every_row_that_the_code_cites_exists() -> None:
    found = {file.relative_to(PACKAGE).as_posix(): cited(file.read_text()) for file in SOURCES}
    assert sum(map(len, found.values())) > 30
    assert {name: numbers - set(TABLE) for name, numbers in found.items() if numbers - set(TABLE)} == {}


@pytest.mark.parametrize("number", TABLE)
def test_a_row_names_exactly_the_faults_that_plant_it_or_says_why_there_is_none(number: int) -> None:
    planted = TABLE[number][-1]
    named = {fault.name for fault in faults.FAULTS if fault.numerics == number}
    if number in faults.NOT_EXPRESSIBLE:
        assert re.match(r"not planted[^:]*: \w", planted)
        assert not named & quoted(planted)
    else:
        assert quoted(planted) == named
        assert named


def test_every_file_the_table_names_exists() -> None:
    files = {name for row in TABLE.values() for name in quoted(row[-2]) if name.endswith(".py")}
    assert len(files) > 15
    rooms = ("in_pytorch", "in_tensorflow", "in_jax")
    missing = [name for name in files if not any((PACKAGE / room / name).is_file() for room in ("", *rooms))]
    assert missing == []
