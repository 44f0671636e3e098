"""The report's section on ease of debugging: counted, not judged."""

from __future__ import annotations

from collections.abc import Iterator

from triptych.core.contract import FRAMEWORKS
from triptych.report.blocks import Block, Cell, Note, Table, Text
from triptych.report.evidence import Evidence
from triptych.report.measured import Performance, Profiled, ShapeError, Suite, Timed
from triptych.report.tables import NO, YES, code_cell, columns
from triptych.report.wording import brief, duration, mode_title, number

KINDS = {
    "convolution": "convolution", "matrix_product": "matrix product", "normalization": "normalization",
    "elementwise": "activation, pooling, addition", "optimizer": "optimizer", "data": "data", "other": "other operators",
}  # fmt: skip


def debugging(evidence: Evidence) -> Iterator[Block]:
    """Time to the first step, one profiled iteration, errors of planted shape bugs, and what can run a model elsewhere."""
    found, commands = evidence.performance, evidence.commands
    yield Text(
        "Ease of debugging is a matter of taste. Three things about it can be counted: how long a change takes to show its effect, what a "
        "profile tells of one iteration, and what an error says of a wrong shape."
    )
    rows = tuple(_first_steps(found))
    if rows:
        titles = columns("framework", "model", "of", ">import", ">build", ">first call", ">together", "record")
        caption = (
            "Time to the first step, default lane, smallest batch, nothing compiled before. One process of each framework meets the models "
            "one after the other: only the first one's first call finds everything cold"
        )
        yield Table(caption, titles, rows, "triptych bench SUITE")
    else:
        yield Note("No time to the first step: no suite is recorded.")
    if found.profiles:
        yield from _profile(found, commands.get("profiles"))
    else:
        yield Note(f"No profiled iteration: {evidence.why_missing('profiles')}.")
    if found.shape_errors:
        yield from _shape_errors(found, commands.get("shape_errors"))
    else:
        yield Note(f"No errors of planted shape bugs: {evidence.why_missing('shape_errors')}.")


def first_step(suite: Suite, row: Timed) -> float | None:
    """Seconds from the start of the import to the first result, nothing compiled before; None where that is not recorded."""
    parts = (suite.import_seconds.get(row.framework), row.build_seconds, row.first_call_seconds)
    return None if None in parts or suite.compile_cache != "cold" else sum(part for part in parts if part is not None)


def smallest(suite: Suite) -> list[Timed]:
    """The default lanes that were timed, each at its smallest batch."""
    timed = [row for row in suite.rows if row.lane == "default" and row.framework in FRAMEWORKS and row.median]
    least = {(row.subject, row.mode): min(r.batch_size for r in timed if (r.subject, r.mode) == (row.subject, row.mode)) for row in timed}
    return [row for row in timed if row.batch_size == least[row.subject, row.mode]]


def _first_steps(found: Performance) -> Iterator[tuple[Cell, ...]]:
    seen = set()
    for suite in found.suites:
        for row in smallest(suite):
            key, seconds = (row.framework, row.subject, row.mode), first_step(suite, row)
            if seconds is None or key in seen:
                continue
            seen.add(key)
            yield (
                Cell(brief(row.framework)), Cell(row.subject), Cell(mode_title(row.mode)),
                Cell(duration(suite.import_seconds[row.framework])), Cell(duration(row.build_seconds)),
                Cell(duration(row.first_call_seconds)), Cell(duration(seconds)), code_cell(suite.file),
            )  # fmt: skip


def _profile(found: Performance, command: str | None) -> Iterator[Block]:
    for model, mode, lane, size in dict.fromkeys((p.model, p.mode, p.lane, p.batch_size) for p in found.profiles):
        rows = [p for p in found.profiles if (p.model, p.mode, p.lane, p.batch_size) == (model, mode, lane, size)]
        where = f"; {found.hardware['profiles']}" if found.hardware.get("profiles") else ""
        caption = f"One profiled iteration: {mode_title(mode)} of {model}, {lane} lane, batch {size}{where}"
        yield Table(caption, columns("share of the step", *(f">{brief(p.framework)}" for p in rows)), _kinds(rows), command)
        top = tuple(
            (Cell(brief(p.framework)), code_cell(operator.operation), Cell(f"{operator.share:.1%}")) for p in rows for operator in p.top
        )
        caption = f"What takes longest in it, by the name in the framework's own profile ({model}, {mode_title(mode)})"
        yield Table(caption, columns("framework", "operator", ">share"), top, command, folded=True)


def _kinds(rows: list[Profiled]) -> tuple[tuple[Cell, ...], ...]:
    def line(title: str, *texts: str) -> tuple[Cell, ...]:
        return (Cell(title), *map(Cell, texts))

    kinds = list(dict.fromkeys([*KINDS, *(kind for p in rows for kind in p.categories)]))
    named = [kind for kind in kinds if any(kind in p.categories for p in rows)]
    return (
        *(line(KINDS.get(kind, kind), *(f"{p.categories.get(kind, 0.0) / p.step_seconds:.1%}" for p in rows)) for kind in named),
        line("in no operator (Python, waiting)", *(f"{p.unattributed_share:.1%}" for p in rows)),
        line("of these in operators fused of several kinds", *(f"{p.mixed_share:.1%}" for p in rows)),
        line("told apart: in operators of one kind", *(f"{p.told_apart:.1%}" for p in rows)),
        line("the traced step is longer by", *("–" if p.overhead is None else f"{p.overhead:.1%}" for p in rows)),
        line("time of the step", *(duration(p.step_seconds) for p in rows)),
    )


def _shape_errors(found: Performance, command: str | None) -> Iterator[Block]:
    planted = "; ".join(f"{name}: {text}" for name, text in found.bugs.items())
    yield Text(
        f"The same wrong shape was planted in each native network, as a user of that framework would write it ({planted}). A Keras layer "
        "and a Flax layer take their number of inputs from what they are called with: there a layer built beforehand, or parameters, are "
        "of the wrong size. A layer counts as named only by its whole path, the sizes only when the message has both."
    )
    titles = columns(
        "bug", "framework", "mode", "comes when", "exception", "names the layer", "both sizes", ">traceback lines",
        "line of the model",
    )  # fmt: skip
    order = {name: number for number, name in enumerate(found.bugs)}
    errors = sorted(found.shape_errors, key=lambda error: order.get(error.bug, len(order)))
    rows = tuple(map(_shape_error, errors))
    yield Table("What the error of a planted shape bug tells", titles, rows, command)
    said = tuple((Cell(e.bug), Cell(brief(e.framework)), Cell(e.mode), Cell(_beginning(e.message))) for e in errors if e.message)
    yield Table("What it says, its beginning", columns("bug", "framework", "mode", "message"), said, command, folded=True)


def _shape_error(error: ShapeError) -> tuple[Cell, ...]:
    head = (Cell(error.bug), Cell(brief(error.framework)), Cell(error.mode))
    if error.stage is None:
        return (*head, Cell("never: no error", "fail"), *[Cell("–")] * 5)
    shown = code_cell(error.model_line) if error.model_line else Cell("not shown", "open")
    name = (error.exception or "").rpartition(".")[2]
    return (
        *head, Cell(error.stage), code_cell(name), YES if error.names_layer else NO, YES if error.names_both_sizes else NO,
        Cell(number(error.traceback_lines)), shown,
    )  # fmt: skip


def _beginning(message: str, most: int = 260) -> str:
    flat = " ".join(message.split())
    return flat if len(flat) <= most else flat[:most].rpartition(" ")[0] + " …"
