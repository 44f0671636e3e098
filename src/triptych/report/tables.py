"""The parts that tables of several sections are made of."""

from __future__ import annotations

from collections.abc import Sequence

from triptych.report.blocks import Cell, Column, Table
from triptych.report.verdict import Claim

YES, NO = Cell("yes", "pass"), Cell("no", "open")
OUTCOMES = {True: Cell("holds", "pass"), False: Cell("fails", "fail"), None: Cell("not shown", "open")}


def columns(*titles: str) -> tuple[Column, ...]:
    """Columns from their titles; a leading `>` aligns right."""
    return tuple(Column(title.removeprefix(">"), title.startswith(">")) for title in titles)


def code_cell(text: str | None) -> Cell:
    """A name or command in a fixed-width face; a dash when there is none."""
    return Cell(text, code=True) if text else Cell("–")


def claim_table(caption: str, claims: Sequence[Claim]) -> Table:
    """What was measured beside what was asked; each row has its own command."""
    rows = tuple((Cell(c.text), Cell(c.measured), Cell(c.asked), OUTCOMES[c.holds], code_cell(c.command)) for c in claims)
    return Table(caption, columns("claim", ">measured", ">asked", "", "command"), rows, cards=True)
