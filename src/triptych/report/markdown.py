"""The report as Markdown with PNG figures: what GitHub shows. Text from outside is escaped, so that it can break no table."""

from __future__ import annotations

import re
from collections.abc import Iterator

from triptych.report.blocks import Block, Cell, Note, Picture, Section, Table, Text
from triptych.report.evidence import Evidence
from triptych.report.html import key_figures
from triptych.report.verdict import Verdict

FIGURES = "figures"


def render(evidence: Evidence, verdict: Verdict, sections: tuple[Section, ...]) -> str:
    """The whole document; its figures are `figures/NAME.png` beside it."""
    lines = [f"# {escape(verdict.headline)}", ""]
    lines += [f"- **{escape(figure.value)}** {escape(figure.label)}" for figure in key_figures(evidence)]
    lines += ["", *_made_by(evidence.commands.get("report"))]
    for section in sections:
        lines += [f"## {section.title}", ""]
        lines += [line for block in section.blocks for line in _block(block)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Text):
        yield from (escape(block.text), "")
    elif isinstance(block, Note):
        yield from (f"> {escape(block.text)}", "")
    elif isinstance(block, Picture):
        yield from (f"![{escape(block.alt)}]({FIGURES}/{block.slug}.png)", "", escape(block.caption), "")
        yield from _made_by(block.command)
    else:
        yield from _table(block)


def _table(table: Table) -> Iterator[str]:
    caption = escape(table.caption)
    yield from ("<details><summary>" + caption + "</summary>", "") if table.folded else (f"**{caption}**", "")
    yield "| " + " | ".join(escape(column.title) for column in table.columns) + " |"
    yield "|" + "|".join("--:" if column.right else "---" for column in table.columns) + "|"
    yield from ("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows)
    yield ""
    yield from _made_by(table.command)
    if table.folded:
        yield from ("</details>", "")


def _made_by(command: str | None) -> Iterator[str]:
    if command:
        yield from (f"<sub>made by</sub> {code(command)}", "")


def _cell(cell: Cell) -> str:
    if cell.code:
        return code(cell.text)
    return f"**{escape(cell.text)}**" if cell.tone else escape(cell.text)


def code(text: str) -> str:
    """A code span on one line; escaped text instead when it holds what no code span in a table can carry."""
    return escape(text) if re.search(r"[`<>|]", text) else "`" + " ".join(text.split()) + "`"


def escape(text: str) -> str:
    """Plain text on one line: every character that Markdown or HTML would read is escaped."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~#!])", r"\\\1", flat)
