"""The report's section on exports: which formats there are from where, and every artefact's error, size and speed in its own runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from triptych.core.contract import FRAMEWORKS
from triptych.core.tolerance import EXPORTED
from triptych.export import matrix
from triptych.export.runtimes import ADAPTERS
from triptych.report.blocks import Block, Cell, Note, Table, Text
from triptych.report.evidence import Evidence
from triptych.report.measured import Call, Exported
from triptych.report.tables import NO, YES, claim_table, columns
from triptych.report.verdict import Claim
from triptych.report.wording import bounds, brief, duration, listing, memory, rate, short, times

PART = "exports"


def exported(evidence: Evidence) -> Iterator[Block]:
    """All of the section; without a record, the formats alone."""
    yield Text(
        "A model leaves for a runtime only when that runtime, in a process of its own that does not import the source framework where it "
        "can do without, gives the same outputs on real images, alone and seven at a time. What fails is removed, not handed over."
    )
    yield _formats()
    rows, command = evidence.performance.exports, evidence.commands.get(PART)
    if not rows:
        yield Note(f"No artefact was measured: {evidence.why_missing(PART)}.")
        return
    yield claim_table("Exports: what was measured, and what was asked", tuple(claims(rows, command)))
    yield from map(Text, _first(rows))
    hardware = evidence.performance.hardware.get(PART)
    where = f", on {hardware}" if hardware else ""
    titles = columns(
        "from", "format", "runtime", ">worst error", ">size", ">load", ">batch 1", ">times the fastest in float32", ">batch 7, images/s"
    )
    caption = f"Every artefact of {rows[0].model} in one interleaved run{where}: the fastest at batch 1 first"
    yield Table(caption, titles, tuple(map(_row, sorted(rows, key=_order))), command)


def _formats() -> Table:
    """What the code of today has, read from its table."""
    possible = {(cell.source, cell.format) for cell in matrix.CELLS if cell.possible}
    rows = tuple(
        (Cell(row.title), *(YES if (name, row.name) in possible else NO for name in FRAMEWORKS)) for row in matrix.FORMATS.values()
    )
    titles = columns("format", *(brief(name) for name in FRAMEWORKS))
    return Table("What a model of each framework is exported to", titles, rows, "triptych export --list")


def claims(rows: Sequence[Exported], command: str | None) -> Iterator[Claim]:
    """For each precision: that every artefact stays within its bound."""
    for bound, asked in EXPORTED.items():
        mine = [row for row in rows if not row.unavailable and matrix.FORMATS[row.format].bound == bound]
        if not mine:
            continue
        good = [row for row in mine if row.passed]
        worst = max((row.worst_error for row in mine if row.worst_error is not None), default=None)
        told = "" if worst is None else f", the worst {short(worst)}"
        text = f"Every {bound} artefact of {mine[0].model} gives the outputs of its source, scale-relative"
        yield Claim(text, f"{len(good)} of {len(mine)}{told}", f"all ≤ {short(asked)}", len(good) == len(mine), command)


def _first(rows: Sequence[Exported]) -> Iterator[str]:
    """Which runtime is fastest in float32 on the machine of the record, and how much longer the best artefact of each other one takes."""
    exact = [row for row in rows if matrix.FORMATS[row.format].bound == "float32"]
    for batch in sorted({batch for row in exact for batch in row.latency}, key=int):
        ranked = sorted((row for row in exact if batch in row.latency), key=lambda row: row.latency[batch].median_seconds)
        best = {row.runtime: row for row in reversed(ranked)}
        first, *others = [row for row in ranked if best[row.runtime] is row]
        behind = [f"{ADAPTERS[row.runtime].title} {_behind(row.latency[batch])}" for row in others]
        after = f"; the others take, each with its best artefact, {listing(behind)}" if behind else ""
        low, high = others[0].latency[batch].times_the_fastest_interval if others else (2.0, 2.0)
        tied = f", not told apart from {ADAPTERS[others[0].runtime].title}" if low <= 1 <= high else ""
        call = first.latency[batch]
        title = ADAPTERS[first.runtime].title
        yield f"In float32 {title} ({first.artefact}) is first at batch {batch}: {_milliseconds(call)}{tied}{after}."


def _behind(call: Call) -> str:
    return f"{times(call.times_the_fastest)} as long ({bounds(call.times_the_fastest_interval)})"


def _milliseconds(call: Call) -> str:
    low, high = call.interval
    return f"{1e3 * call.median_seconds:.3g} ms ({1e3 * low:.3g} to {1e3 * high:.3g})"


def _order(row: Exported) -> tuple[bool, float]:
    return (not row.latency, min((call.median_seconds for batch, call in row.latency.items() if batch == "1"), default=0.0))


def _row(row: Exported) -> tuple[Cell, ...]:
    head = (Cell(brief(row.source)), Cell(matrix.FORMATS[row.format].title), Cell(ADAPTERS[row.runtime].title))
    if not row.passed:
        return (
            *head,
            Cell(row.failure or row.unavailable or "no reason is recorded", "open" if row.unavailable else "fail"),
            *[Cell("–")] * 5,
        )
    one, seven = row.latency.get("1"), row.latency.get("7")
    return (
        *head, Cell("–" if row.worst_error is None else short(row.worst_error)), Cell(memory(row.bytes)), Cell(duration(row.load_seconds)),
        Cell(_milliseconds(one) if one else "–"),
        Cell(f"{times(one.times_the_fastest)} ({bounds(one.times_the_fastest_interval)})" if one else "–"),
        Cell(rate(seven.images_per_second) if seven else "–"),
    )  # fmt: skip
