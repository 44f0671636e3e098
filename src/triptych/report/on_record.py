"""The report's section on the training system: what was measured once, over hours, and committed (`report/record.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from triptych.core.contract import FRAMEWORKS
from triptych.report import figures
from triptych.report.asked import asked
from triptych.report.blocks import Block, Cell, Note, Picture, Table, Text
from triptych.report.evidence import Evaluated, Evidence, RecordedRun, Records, Speed
from triptych.report.tables import OUTCOMES, claim_table, columns
from triptych.report.wording import bounds, duration, framework_title, listing, number, points, short, times


def on_record(evidence: Evidence) -> Iterator[Block]:
    """All of the section: what was asked, then the parts; an absent one is a note with the command that makes it."""
    records, commands = evidence.records, evidence.commands
    yield Text(
        "These figures took hours and were measured once, on the machine that each names; this report reads them from their committed "
        "files. The headline does not rest on them."
    )
    if records != Records():
        yield claim_table("The training system: what was measured, and what was asked", tuple(asked(evidence)))
    parts = (
        ("cifar10", "runs on CIFAR-10", _runs), ("evaluated", "evaluation of the trained checkpoints", _evaluated),
        ("resumed", "resume matrix", _resumed), ("kills", "killed runs", _kills), ("overhead", "cost of checkpoints", _overhead),
        ("steps", "speed of a training step", _steps), ("pipelines", "speed of the input pipelines", _pipelines),
    )  # fmt: skip
    for part, title, blocks in parts:
        if records.part(part):
            yield from blocks(records, commands.get(part))
        else:
            yield Note(f"No {title}: {evidence.why_missing(part)}.")


def _runs(records: Records, command: str | None) -> Iterator[Block]:
    notes = {run.data: run.data_note for run in records.runs}
    for data, note in notes.items():
        yield Text(f"Every accuracy of this section is measured on {data}. {note}".strip())
    for model in dict.fromkeys(run.model for run in records.runs):
        runs = [run for run in in_order(records.runs) if run.model == model]
        if any(run.train_loss or run.evaluations for run in runs):
            yield _curves(model, runs, command)
        yield _accuracies(model, runs, command)


def in_order(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """By framework in the order of the contract, then by seed."""
    names = list(FRAMEWORKS)
    return sorted(runs, key=lambda run: (names.index(run.framework) if run.framework in names else len(names), run.seed))


def _curves(model: str, runs: Sequence[RecordedRun], command: str | None) -> Picture:
    ends = "; ".join(f"{framework_title(run.framework)} ends at {run.test_accuracy:.2%}" for run in runs)
    alt = f"Training loss and test accuracy of {model} on {runs[0].data} by epoch, one curve a framework on the same axes. {ends}."
    caption = f"{model} on {runs[0].data}: mean training loss of each epoch, and accuracy on the test images, in {_titles(runs)}."
    return Picture(f"recorded-{model}", alt, caption, partial(figures.recorded, tuple(runs)), command)


def _titles(runs: Sequence[RecordedRun]) -> str:
    return listing([framework_title(name) for name in dict.fromkeys(run.framework for run in runs)])


def _accuracies(model: str, runs: Sequence[RecordedRun], command: str | None) -> Table:
    """A row a framework over its seeds, and one over all frameworks when there are several."""
    groups = {name: [run for run in runs if run.framework == name] for name in dict.fromkeys(run.framework for run in runs)}
    rows = [_accuracy_row(framework_title(name), group) for name, group in groups.items()]
    if len(groups) > 1:
        rows.append(_accuracy_row("together", runs))
    titles = columns(
        "framework", ">n", ">test accuracy", ">spread", ">images right", ">epochs", ">time", ">CPU-minutes", ">points a CPU-minute",
        "seeds", "hardware", "code",
    )  # fmt: skip
    parameters = f", {runs[0].parameters:,} parameters" if runs[0].parameters else ""
    caption = (
        f"{model}{parameters}, on {runs[0].data}: test accuracy (the mean of n runs; spread: highest minus lowest). A CPU-minute is a "
        "minute of one core at work on it; points are percent of the test images"
    )
    return Table(caption, titles, tuple(rows), command)


def _accuracy_row(title: str, runs: Sequence[RecordedRun]) -> tuple[Cell, ...]:
    accuracies = [run.test_accuracy for run in runs]
    mean = sum(accuracies) / len(runs)
    spread = points(max(accuracies) - min(accuracies)) if len(runs) > 1 else "–"
    right = ", ".join(f"{run.test_correct:,} of {run.test_images:,}" for run in runs if run.test_correct is not None and run.test_images)
    minutes = [run.cpu_minutes for run in runs if run.cpu_minutes]
    cpu = sum(minutes) / len(minutes) if len(minutes) == len(runs) else None
    hardware, code = (", ".join(dict.fromkeys(x for x in values if x)) for values in zip(*_origins(runs), strict=True))
    return (
        Cell(title), Cell(str(len(runs))), Cell(f"{mean:.2%}"), Cell(spread), Cell(right or "–"),
        Cell(_range([run.epochs for run in runs])),
        Cell(duration(sum(run.seconds for run in runs) / len(runs))), Cell("–" if cpu is None else f"{cpu:.1f}"),
        Cell("–" if not cpu else short(100 * mean / cpu)), Cell(", ".join(dict.fromkeys(str(run.seed) for run in runs))),
        Cell(hardware or "–"), Cell(code or "–"),
    )  # fmt: skip


def _origins(runs: Sequence[RecordedRun]) -> list[tuple[str, str]]:
    return [(run.hardware, run.code_sha256[:12]) for run in runs]


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low} to {high}"


def _evaluated(records: Records, command: str | None) -> Iterator[Block]:
    names = list(dict.fromkeys(name for row in records.evaluated for name in row.correct))
    rows = tuple(_evaluated_row(row, names) for row in records.evaluated)
    titles = columns(
        "checkpoint", *(f">right in {framework_title(name)}" for name in names), ">the same answer", ">largest difference of a logit",
        "differ on",
    )  # fmt: skip
    yield Table("One checkpoint, evaluated in several frameworks on all test images", titles, rows, command)


def _evaluated_row(row: Evaluated, names: Sequence[str]) -> tuple[Cell, ...]:
    right = [Cell(f"{row.correct[name]:,}" if name in row.correct else "–") for name in names]
    scale = f" at a scale of {short(row.logit_scale)}" if row.logit_scale is not None else ""
    same = Cell(f"{row.agree:,} of {row.images:,}", "pass" if row.agree == row.images else "open")
    return (
        Cell(row.weights, code=True), *right, same, Cell(number(row.logit_difference) + scale),
        Cell(", ".join(row.ties) or "none"),
    )  # fmt: skip


def _resumed(records: Records, command: str | None) -> Iterator[Block]:
    rows = tuple(
        (
            Cell(framework_title(row.source)), Cell(framework_title(row.target)), Cell("bit for bit" if row.state_bit_equal else "differs"),
            Cell("exact" if row.first_step_error == 0 else number(row.first_step_error)), Cell(times(row.ratio)), OUTCOMES[row.passed],
        )
        for row in records.resumed
    )  # fmt: skip
    titles = columns("begun in", "resumed in", "state that was loaded", ">error of the first step", ">drift over one-ulp drift", "")
    yield Table(_on(records, "resumed", "A run begun in one framework and resumed in another, float64"), titles, rows, command)


def _kills(records: Records, command: str | None) -> Iterator[Block]:
    rows = tuple(
        (Cell(framework_title(row.framework)), Cell(str(row.kills)), Cell(number(row.during_save)), OUTCOMES[row.bitwise_equal])
        for row in records.kills
    )
    titles = columns("framework", ">kills", ">of them during a save", "final weights bitwise those of the uninterrupted run")
    yield Table(_on(records, "kills", "Runs killed (kill -9) again and again, and resumed"), titles, rows, command)


def _overhead(records: Records, command: str | None) -> Iterator[Block]:
    rows = tuple(
        (Cell(framework_title(row.framework)), Cell(times(row.ratio, 3)), Cell(bounds(row.interval, 3)), Cell(number(row.n)))
        for row in records.overhead
    )
    titles = columns("framework", ">time with checkpoints over time without", ">95 % interval", ">n")
    yield Table(_on(records, "overhead", "What checkpoints written in the background cost"), titles, rows, command)


def _steps(records: Records, command: str | None) -> Iterator[Block]:
    titles = columns(
        "framework", "model", "lane", "levers", ">ours over stock", ">95 % interval", ">n", ">images/s", ">batch × pixels",
        ">multiply-adds, ours over stock", "stock",
    )  # fmt: skip
    caption = (
        "Speed of a training step: ours over the stock one of the same framework, in one process, turn by turn (above 1: ours is faster)"
    )
    yield Table(_on(records, "steps", caption), titles, tuple(map(_step_row, records.steps)), command)
    if records.outside:
        rows = tuple(
            (
                Cell(framework_title(row.framework)),
                Cell(row.model),
                Cell(f"{row.share:.1%}"),
                Cell(_percents(row.interval)),
                Cell(str(row.n)),
            )
            for row in records.outside
        )
        outside = "Share of a training step outside the framework's own kernels: against its bare step function on tensors that are ready"
        yield Table(outside, columns("framework", "model", ">share", ">95 % interval", ">n"), rows, command)


def _step_row(row: Speed) -> tuple[Cell, ...]:
    shape = f"{row.batch_size} × {row.image_size}" if row.batch_size and row.image_size else "–"
    macs = times(row.macs / row.stock_macs) if row.macs and row.stock_macs else "–"
    ratio = times(row.ratio) if row.ratio is not None else row.reason or "–"
    return (
        Cell(framework_title(row.framework)), Cell(row.model), Cell(row.lane), Cell(", ".join(row.levers) or "none"), Cell(ratio),
        Cell(bounds(row.interval)), Cell(str(row.n)), Cell(number(row.images_per_second)), Cell(shape), Cell(macs), Cell(row.against),
    )  # fmt: skip


def _pipelines(records: Records, command: str | None) -> Iterator[Block]:
    rows = tuple(
        (
            Cell(framework_title(row.framework)), Cell(times(row.ratio)), Cell(bounds(row.interval)), Cell(str(row.n)),
            Cell("–" if row.images_per_second is None else f"{row.images_per_second:,.0f}"), Cell(row.against),
        )
        for row in records.pipelines
    )  # fmt: skip
    titles = columns("framework", ">ours over stock", ">95 % interval", ">n", ">images/s", "stock")
    yield Table(_on(records, "pipelines", "Images a second of the input pipelines, for images in memory"), titles, rows, command)


def _on(records: Records, part: str, caption: str) -> str:
    """The caption, with the machine that the part was measured on."""
    return f"{caption}; {records.hardware[part]}" if records.hardware.get(part) else caption


def _percents(interval: Sequence[float]) -> str:
    return " to ".join(f"{end:.1%}" for end in interval)
