"""What a report is written in: paragraphs, notes, tables and pictures, as plain data that two renderers read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from triptych.report import figures


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: plain text, never markup. `tone` is pass, fail or open; `code` asks for a fixed-width face."""

    text: str
    tone: str = ""
    code: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A table column; numbers align right."""

    title: str
    right: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """A part that is not there, and why."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table; `folded` ones are closed at first in HTML. `cards`: on a phone each of its rows, of five cells, is a small card."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    command: str | None = None
    folded: bool = False
    cards: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure: `name` becomes its file name and id (`slug`), `alt` says in words what it shows."""

    name: str
    alt: str
    caption: str
    draw: figures.Draw
    command: str | None = None

    @property
    def slug(self) -> str:
        """`name` reduced to what is safe as a file name and as an id."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


Block = Text | Note | Table | Picture


@dataclass(frozen=True, slots=True)
class Section:
    """A titled run of blocks."""

    id: str
    title: str
    blocks: tuple[Block, ...] = field(default=())
