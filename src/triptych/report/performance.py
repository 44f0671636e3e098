"""The report's section on speed and memory: the bars, then every recorded suite, group by group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from triptych.core.contract import FRAMEWORKS
from triptych.report.bars import MODEL, bars
from triptych.report.blocks import Block, Cell, Note, Picture, Table, Text
from triptych.report.evidence import Evidence
from triptych.report.measured import STOCK, Suite, Timed
from triptych.report.measurements import SUITES
from triptych.report.tables import claim_table, columns
from triptych.report.throughput import speeds, throughput
from triptych.report.wording import bounds, contestant, duration, listing, memory, milliseconds, mode_title, rate, times

NO_BREAK = "\u00a0"
MARKS = {
    "kernel": "a fixed kernel was slow",
    "steal": "the machine withheld time",
    "others": "other programs took some",
    "pressure": "threads, the lanes' own among them, waited for a core",
}
"""Why rounds are marked noisy, by what a record says that it asked; older ones asked for pressure."""


def performance(evidence: Evidence) -> Iterator[Block]:
    """All of the section; an absent record is a note with the command that makes it."""
    yield Text(
        "Nothing of ours is timed before the ladder has proven its weights, and what is foreign only when the same weights give the same "
        "outputs. Lanes take turns in random order in the same rounds; a ratio is of turns in the same round, and nobody wins by less than "
        "a lane differs from itself. All of it was measured on one device, a processor: it says little about another one, and the columns "
        "for N devices are empty until distribution is there."
    )
    yield claim_table("Speed, ResNet-50 in float32: what was measured, and what was asked", tuple(bars(evidence)))
    for suite in sorted(evidence.performance.suites, key=lambda suite: MODEL not in {row.model for row in suite.rows}):
        yield from _suite(suite)
    recorded = {suite.name for suite in evidence.performance.suites}
    for name in SUITES:
        if name not in recorded:
            yield Note(f"No record of the suite {name}: {evidence.why_missing(f'bench_{name}')}.")


def _suite(suite: Suite) -> Iterator[Block]:
    yield Text(_weather(suite))
    groups = suite.together()
    for subject, mode in dict.fromkeys((group[0].subject, group[0].mode) for group in groups):
        rows = [row for group in groups for row in group if (row.subject, row.mode) == (subject, mode)]
        name, timed = f"{subject}, {mode_title(mode)}", [row for row in rows if row.median]
        if timed:
            yield _picture(suite, name, timed)
        yield _table(suite, name, rows)
        if any(row.p90 for row in timed):
            yield _latency(suite, name, timed)
        pairs = tuple(_pair_rows(suite, timed))
        if pairs:
            titles = columns(">batch", "first", "second", ">speed of the first over the second", ">95 % interval", "faster")
            yield Table(
                f"{name}: every pair of suite {suite.name}, and who is faster, if anybody", titles, pairs, suite.command, folded=True
            )


def _weather(suite: Suite) -> str:
    """What the record can show at all."""
    hardware = f" on {suite.hardware}" if suite.hardware else ""
    rounds, noisy = (
        (sum(values) for values in zip(*((g.rounds, g.noisy_rounds) for g in suite.groups), strict=True)) if suite.groups else (0, 0)
    )
    floors = [group.smallest_difference for group in suite.groups if group.smallest_difference is not None]
    apart = " to ".join(dict.fromkeys(f"{floor:.0%}" for floor in (min(floors), max(floors)))) if floors else ""
    least = f" A lane run twice differs from itself by {apart}, depending on the group: less than that means nothing." if floors else ""
    why = listing([MARKS[mark] for mark in suite.marked_for if mark in MARKS], "or")
    told = f": {rounds} rounds, {noisy} of them marked{f' ({why})' if why else ''}." if rounds else "."
    warm = " Compiled programs of an earlier process were there." if suite.compile_cache == "warm" else ""
    return f"Suite {suite.name}, {len(suite.rows)} cases{hardware}{told}{least}{warm}"


def _picture(suite: Suite, name: str, rows: Sequence[Timed]) -> Picture:
    told = "; ".join(f"batch {r.batch_size}, {contestant(r.framework, r.lane)}: {rate(r.images_per_second)}" for r in rows)
    caption = (
        f"{name}, suite {suite.name}: images a second, and the 95 % interval (line). Pale: what a user writes without us; grey: a runtime."
    )
    return Picture(
        f"bench-{suite.name}-{name}", f"Images a second of {name}. {told}.", caption, partial(throughput, tuple(rows)), suite.command
    )


def _table(suite: Suite, name: str, rows: Sequence[Timed]) -> Table:
    titles = columns(
        ">batch", "lane", ">images/s", ">over stock", ">peak memory", ">first call (compiling)", ">of peak", ">N devices",
        "shown equal by",
    )  # fmt: skip
    shown = [row for row in rows if not row.unavailable]
    caption = f"{name}, suite {suite.name}: images a second with 95 % intervals"
    return Table(f"{caption}{_absent(rows)}", titles, tuple(_row(suite, row) for row in shown), suite.command)


def _latency(suite: Suite, name: str, rows: Sequence[Timed]) -> Table:
    titles = columns(">batch", "lane", ">median", ">p90", ">p95", ">p99", ">slowest", ">steps")
    lines = tuple(
        (
            Cell(str(row.batch_size)), Cell(contestant(row.framework, row.lane).replace(" ", NO_BREAK)),
            *(Cell(milliseconds(value)) for value in (row.median, row.p90, row.p95, row.p99, row.slowest)), Cell(f"{row.n:,}"),
        )
        for row in rows
    )  # fmt: skip
    return Table(f"{name}, suite {suite.name}: latency of a batch; no percentile of too few steps", titles, lines, suite.command)


def _absent(rows: Sequence[Timed]) -> str:
    names = list(dict.fromkeys(contestant(row.framework, row.lane) for row in rows if row.unavailable))
    return f". No such lane: {'; '.join(names)}" if names else ""


def _row(suite: Suite, row: Timed) -> tuple[Cell, ...]:
    size, name = Cell(str(row.batch_size)), Cell(contestant(row.framework, row.lane).replace(" ", NO_BREAK))
    if row.median is None:
        return (size, name, Cell("failed", "fail"), *[Cell("–")] * 4, Cell("n/a"), Cell(row.failure or "no reason is recorded"))
    low, high = speeds(row)
    return (
        size, name, Cell(f"{rate(row.images_per_second)} ({rate(low)} to {rate(high)})"), Cell(_over_stock(suite, row)),
        Cell(memory(row.peak_memory_bytes)), Cell(_first_call(row)),
        Cell("–" if row.peak_share is None else f"{row.peak_share:.1%}"), Cell("n/a"), Cell(_equality(row)),
    )  # fmt: skip


def _first_call(row: Timed) -> str:
    compiling = f" ({duration(row.compile_seconds)})" if row.compile_seconds else ""
    return duration(row.first_call_seconds) + compiling


def _over_stock(suite: Suite, row: Timed) -> str:
    found = suite.speed(row, f"{row.framework}/{STOCK}") if row.framework in FRAMEWORKS else None
    return "–" if found is None else f"{times(found[0])} ({bounds(found[1])})"


def _equality(row: Timed) -> str:
    told = row.certificate
    if told.kind != "none":
        return told.kind
    flops = f" ({times(told.flop_ratio)} our FLOPs)" if told.flop_ratio else ""
    return f"not: {told.reason}{flops}"


def _pair_rows(suite: Suite, rows: Sequence[Timed]) -> Iterator[tuple[Cell, ...]]:
    known = {(row.model, row.mode, row.batch_size, row.contestant): contestant(row.framework, row.lane) for row in rows}
    for pair in suite.pairs:
        group = (pair.model, pair.mode, pair.batch_size)
        a, b = known.get((*group, pair.a)), known.get((*group, pair.b))
        if a is None or b is None:
            continue
        low, high = pair.interval
        winner = {pair.a: a, pair.b: b}.get(pair.winner or "", "nobody")
        yield (
            Cell(str(pair.batch_size)), Cell(a), Cell(b), Cell(times(1 / pair.ratio)), Cell(bounds((1 / high, 1 / low))), Cell(winner),
        )  # fmt: skip
