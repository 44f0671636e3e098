"""The report as data: sections of paragraphs, figures, tables and notes. Built once from the evidence, rendered twice (HTML, Markdown).

Each figure and table carries the command that makes its numbers. A part that is missing becomes a note with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

from triptych.core.tolerance import CUSTOMARY_FORWARD_CHECK
from triptych.report import figures
from triptych.report.blocks import Block, Cell, Note, Picture, Section, Table, Text
from triptych.report.debugging import debugging
from triptych.report.evidence import Certificate, Context, Curves, Evidence, Fault, FaultTable, Run, Training
from triptych.report.expected import expected
from triptych.report.exported import exported
from triptych.report.lines import MODEL_FILES
from triptych.report.on_record import on_record
from triptych.report.performance import performance
from triptych.report.tables import claim_table, code_cell, columns
from triptych.report.verdict import Verdict, missed_by_usual_check
from triptych.report.wording import duration, framework_title, listing, number, pair_title, short, size

RUNGS = 8


def sections(evidence: Evidence, verdict: Verdict) -> tuple[Section, ...]:
    """The whole document below the headline, in reading order."""
    return (
        Section("claims", "What is claimed", tuple(_claims(verdict))),
        Section("ladder", "The same model", tuple(_ladder(evidence))),
        Section("training", "The same training", tuple(_training(evidence))),
        Section("faults", "The proof can fail", tuple(_faults(evidence))),
        Section("record", "The training system, on record", tuple(on_record(evidence))),
        Section("performance", "Performance", tuple(performance(evidence))),
        Section("debugging", "Debugging", tuple(debugging(evidence))),
        Section("exports", "Exports and runtimes", tuple(exported(evidence))),
        Section("expected", "Expected and measured", tuple(expected(evidence))),
        Section("cost", "What it costs", tuple(_cost(evidence))),
        Section("reproduce", "How to reproduce it", tuple(_reproduce(evidence))),
    )


def _claims(verdict: Verdict) -> Iterator[Block]:
    yield Text("The headline is computed from these rows: PASS when every one holds, INCOMPLETE when one is not shown.")
    yield claim_table("Claims, what was measured, and what was asked", verdict.claims)


def _ladder(evidence: Evidence) -> Iterator[Block]:
    if not evidence.certificates:
        yield Note(f"No certificate: {evidence.why_missing('certificates')}.")
        return
    yield Text(
        "Three native implementations get the same weights and the same inputs, and every tensor on the way is compared, pair by pair, on "
        "eight rungs: shapes, preprocessing, forward passes, gradients, the optimizer alone, synchronised training steps, and a free run. "
        "Errors are scale-relative: the largest absolute difference in a tensor over the largest absolute value in it. Float64 tells a "
        "wrong formula from rounding by ten orders of magnitude."
    )
    command = evidence.commands.get("parity")
    for certificate in evidence.certificates:
        yield from _certificate(certificate, command)
    if not any(c.context for c in evidence.certificates):
        yield Note(f"No comparison with AlgoPerf's setting: {evidence.why_missing('context')}.")


def _certificate(certificate: Certificate, command: str | None) -> Iterator[Block]:
    passed = sum(rung.passed for rung in certificate.rungs)
    if certificate.rungs:
        alt = f"{certificate.model}: {passed} of {len(certificate.rungs)} rungs stay below their tolerance. " + _worst(certificate)
        caption = f"{certificate.model}: worst error of any tensor (dot) and tolerance (bar) on every rung, float64 and float32, log scale."
        yield Picture(f"ladder-{certificate.model}", alt, caption, partial(figures.ladder, certificate), command)
    if certificate.first_divergence:
        yield Note(f"First divergence of {certificate.model}: {certificate.first_divergence}")
    yield _rung_table(certificate, command)
    for rung in certificate.not_applicable:
        yield Note(f"Rung {rung['number']}, {rung['name']}, does not apply: {rung['reason']}.")
    short = [
        name
        for name, count in Counter(rung.precision for rung in certificate.rungs).items()
        if count + len(certificate.not_applicable) < RUNGS
    ]
    if short:
        yield Note(
            f"In {' and '.join(short)} the long runs of the upper rungs were left out here, for time; the certificate in "
            f"benchmarks/results/certificates/{certificate.model}.json has all eight."
        )
    for curves in certificate.curves:
        yield _free_run(certificate.model, curves, command)
    if certificate.context:
        yield _context_table(certificate.model, certificate.context, command)


def _free_run(model: str, curves: Curves, command: str | None) -> Picture:
    steps = len(curves.self_divergence)
    alt = f"{model}, {curves.precision}: {steps} free steps; " + _last_values(curves.pairs, curves.self_divergence)
    caption = (
        f"{model}, rung 8, {curves.precision}: the frameworks train on their own. Training amplifies rounding, so no absolute bound is "
        "honest: they are equal when they drift from each other no faster than one of them drifts from itself. "
        f"{len(curves.counted)} of {steps} steps count: those where the self-drift is still small."
    )
    return Picture(f"free-run-{model}-{curves.precision}", alt, caption, partial(figures.free_run, curves), command)


def _worst(certificate: Certificate) -> str:
    parts = [f"rung {r.number} {r.name} {r.precision} {number(r.worst_error, 'no evidence')}" for r in certificate.rungs]
    return "Worst errors: " + "; ".join(parts) + "."


def _rung_table(certificate: Certificate, command: str | None) -> Table:
    rows = []
    for rung in certificate.rungs:
        outcome = Cell("pass", "pass") if rung.passed else Cell("fail", "fail")
        error = "exact" if rung.worst_error == 0 else number(rung.worst_error, "no evidence")
        shape = " × ".join(str(x) for x in (rung.batch_size, rung.image_size) if x is not None) or "–"
        rows.append((
            Cell(f"{rung.number} {rung.name}"), Cell(rung.precision), Cell(error), Cell(number(rung.tolerance)), outcome,
            code_cell(rung.tensor), Cell(pair_title(rung.pair or "–")), Cell(number(rung.tensors)),
            Cell(number(rung.steps)), Cell(shape),
        ))  # fmt: skip
    titles = columns("rung", "precision", ">worst error", ">tolerance", "", "worst tensor", "pair", ">tensors", ">steps", ">batch × pixels")
    hashes = f"spec {certificate.spec_sha256[:12]}, weights {certificate.weights_sha256[:12]}"
    return Table(f"Certificate of {certificate.model} ({hashes}); rung 8 is a ratio", titles, tuple(rows), command, folded=True)


def _context_table(model: str, context: Context, command: str | None) -> Table:
    rows = [
        (Cell("between any two of our frameworks"), Cell(_precise(context.max_abs_logit_difference))),
        (Cell("published by AlgoPerf for its own pair"), Cell(_precise(context.published))),
        *(
            (Cell(f"{framework_title(name)} against itself, NCHW against NHWC kernels"), Cell(_precise(noise)))
            for name, noise in context.layout_noise.items()
        ),
        (Cell("scale of the logits (largest absolute value)"), Cell(number(context.logit_scale))),
    ]
    pixels = f", {context.image_size} pixels" if context.image_size else ""
    caption = f"{model} in AlgoPerf's setting (random initialization{pixels}, float32): largest absolute difference of a logit"
    return Table(caption, columns("", ">value"), tuple(rows), command)


def _precise(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2e}"


def _last_values(pairs: dict[str, tuple[float, ...]], own: tuple[float, ...]) -> str:
    parts = [f"{pair_title(pair)} {short(series[-1])}" for pair, series in pairs.items() if series]
    if own:
        parts.append(f"one framework against itself {short(own[-1])}")
    return "at the last step: " + ", ".join(parts) + "." if parts else "no steps."


def _training(evidence: Evidence) -> Iterator[Block]:
    training, command = evidence.training, evidence.commands.get("training")
    if training is None or not training.runs:
        yield Note(f"No training run: {evidence.why_missing('training')}.")
    else:
        seeds = len(training.runs[0].correct)
        each = f" With each of {seeds} seeds, that is; curves and differences are the first one's." if seeds > 1 else ""
        yield Text(
            f"{training.model} is trained on {training.dataset} from one initialization, on identical batches, with one recipe, natively "
            f"in {listing([framework_title(run.framework) for run in training.runs])}, in {training.precision}.{each}"
        )
        ends = "; ".join(f"{framework_title(r.framework)} ends at {short(r.losses[-1])}" for r in training.runs if r.losses)
        if ends:
            alt = f"Training loss of {training.model}, one curve a framework on the same axes. {ends}."
            title = f"Loss of {training.model} on {training.dataset}, {training.precision}"
            caption = f"{title}, log scale. Faint: every step; bold: mean of a window."
            yield Picture("losses", alt, caption, partial(figures.losses, training), command)
        yield _run_table(training, command)
        yield from _difference(training, "differences-" + training.precision, command)
    yield from _short_training(evidence)


def _run_table(training: Training, command: str | None) -> Table:
    rows = tuple(
        (
            Cell(framework_title(run.framework)), Cell(f"{run.accuracy:.2%}"), Cell(_images_right(run)),
            Cell(number(len(run.losses))), Cell(short(run.losses[-1]) if run.losses else "–"), Cell(duration(run.seconds)),
        )
        for run in training.runs
    )  # fmt: skip
    titles = columns("framework", ">test accuracy", ">images right", ">steps", ">last loss", ">time")
    several = len(training.runs[0].correct) > 1
    seeds = "; accuracy: the mean over the seeds; steps, loss and time: the first seed's" if several else ""
    return Table(f"{training.model} on {training.dataset}, {training.precision}{seeds}", titles, rows, command)


def _images_right(run: Run) -> str:
    return f"{listing([f'{correct:,}' for correct in run.correct])} of {run.test_images:,}"


def _short_training(evidence: Evidence) -> Iterator[Block]:
    training, command = evidence.short_training, evidence.commands.get("short_training")
    if training is None or not training.runs:
        yield Note(f"No short float64 run: {evidence.why_missing('short_training')}.")
        return
    yield from _difference(training, f"differences-{training.precision}-short", command)
    yield _run_table(training, command)


def _difference(training: Training, name: str, command: str | None) -> Iterator[Block]:
    if not (training.loss_difference or training.loss_self):
        return
    alt = f"Difference of the loss, {training.precision}, " + _last_values(training.loss_difference, training.loss_self)
    caption = (
        f"Differences between the frameworks in {training.precision}, step by step, beside the yardstick: one framework against "
        "itself with its initial weights moved by one unit in the last place. Steps without any difference are not drawn."
    )
    yield Picture(name, alt, caption, partial(figures.divergence, training), command)


def _faults(evidence: Evidence) -> Iterator[Block]:
    if not evidence.faults:
        yield Note(f"No planted faults: {evidence.why_missing('faults')}.")
        return
    yield Text(
        "A proof that cannot fail proves nothing. Each row plants one realistic porting mistake in one framework at a time; the ladder "
        "must catch it, name the layer, and pass clean in the same call."
    )
    for table in evidence.faults:
        yield from _fault_table(table, evidence.commands.get("faults"))


def _fault_table(table: FaultTable, command: str | None) -> Iterator[Block]:
    caught, names = sum(f.caught for f in table.faults), list(dict.fromkeys(f.name for f in table.faults))
    right = sum(f.right_rung and f.right_layer for f in table.faults)
    plantings = f"{caught} of {len(table.faults)} plantings of {len(names)} faults"
    summary = f"{table.model}: {plantings} are caught, {right} at the planted rung and layer; clean: {table.clean}."
    missed = missed_by_usual_check(table)
    yield Text(f"{summary} The usual check, a float32 forward pass at 1e-4, would have missed {len(missed)} of {len(names)} faults.")
    if names:
        caption = (
            f"{table.model}: where each planted fault is caught (rung 1 to 8) and how large its error is there (power of ten; the stronger "
            "the color the larger; ≠: an exact comparison). Last column: whether the usual float32 forward check sees it in every "
            "framework."
        )
        alt = f"{summary} Missed by the usual check: {', '.join(missed) or 'none'}. The table below holds every value."
        yield Picture(f"faults-{table.model}", alt, caption, partial(figures.fault_map, table), command)
        yield _planting_table(table, command)
    if table.not_expressible:
        rows = tuple((Cell(number(n.numerics)), Cell(n.name.replace("_", " ")), Cell(n.reason)) for n in table.not_expressible)
        caption = "Causes of divergence that no catalogued model can show yet"
        yield Table(caption, columns(">row of docs/numerics.md", "cause", "why not"), rows, command, folded=True)


def _planting_table(table: FaultTable, command: str | None) -> Table:
    titles = columns(
        "fault", "planted in", "at layer", "", ">rung", "first tensor", ">error", ">float32 forward error", "1e-4 check", "likely cause",
        ">row of docs/numerics.md",
    )  # fmt: skip
    return Table(f"Every planting in {table.model}", titles, tuple(map(_planting, table.faults)), command, folded=True)


def _planting(fault: Fault) -> tuple[Cell, ...]:
    seen = fault.float32_forward_error
    usual = Cell("not applicable", "open") if seen is None else Cell("misses", "fail") if seen <= CUSTOMARY_FORWARD_CHECK else Cell("sees")
    outcome = Cell("NOT CAUGHT", "fail") if not fault.caught else Cell("caught", "pass")
    if fault.caught and not (fault.right_rung and fault.right_layer):
        outcome = Cell("caught elsewhere", "open")
    return (
        Cell(fault.name.replace("_", " ")), Cell(framework_title(fault.framework)), code_cell(fault.planted_layer), outcome,
        Cell(number(fault.rung)), code_cell(fault.tensor),
        Cell(number(fault.error)), Cell(number(seen)), usual, Cell(fault.cause or "–"), Cell(number(fault.numerics)),
    )  # fmt: skip


def _cost(evidence: Evidence) -> Iterator[Block]:
    if evidence.costs:
        rows = tuple(
            (Cell(c.model, code=True), Cell(number(c.image_size)), Cell(number(c.parameters)), Cell(size(c.macs)), Cell(size(c.flops)))
            for c in evidence.costs
        )
        yield Text("Computed from the layer table, once for all frameworks: 1 MAC = 2 FLOPs; convolutions and linear layers are counted.")
        titles = columns("model", ">pixels", ">parameters", ">MACs", ">FLOPs")
        yield Table("Parameters and arithmetic of one image", titles, rows, evidence.commands.get("costs"))
    else:
        yield Note(f"No parameters and FLOPs: {evidence.why_missing('costs')}.")
    yield _code_table(evidence) if evidence.code else Note(f"No lines of code: {evidence.why_missing('code')}.")


def _code_table(evidence: Evidence) -> Table:
    """One row a file of the rooms, a column a framework: statements (lines), the models' files first; and the two sums."""
    names = list(dict.fromkeys(count.framework for count in evidence.code))
    files = sorted({count.file for count in evidence.code}, key=lambda file: (file not in MODEL_FILES, file))
    parts = [(file, {file}) for file in files]
    parts.insert(sum(file in MODEL_FILES for file in files), ("the models together", set(MODEL_FILES)))
    parts.append(("the room together", set(files)))
    rows = tuple((Cell(title), *(Cell(_code_size(evidence, name, mine)) for name in names)) for title, mine in parts)
    caption = "Code of each room: statements of the syntax tree without docstrings (lines after one canonical formatting)"
    return Table(caption, columns("file", *(f">{framework_title(name)}" for name in names)), rows, evidence.commands.get("lines"))


def _code_size(evidence: Evidence, framework: str, files: set[str]) -> str:
    counts = [count for count in evidence.code if count.framework == framework and count.file in files]
    return f"{sum(c.statements for c in counts):,} ({sum(c.lines for c in counts):,})" if counts else "–"


def _reproduce(evidence: Evidence) -> Iterator[Block]:
    if evidence.commands:
        rows = tuple((Cell(part.replace("_", " ")), Cell(command, code=True)) for part, command in evidence.commands.items())
        yield Table("What makes each part", columns("part", "command"), rows)
    else:
        yield Note(f"No commands: {evidence.why_missing('commands')}.")
    if evidence.steps:
        yield _step_table(evidence)
    yield _environment_table(evidence) if evidence.environment else Note(f"No environment: {evidence.why_missing('environment')}.")


def _step_table(evidence: Evidence) -> Table:
    rows = tuple(
        (Cell(step.name), Cell("reused" if step.reused else "fresh"), Cell(duration(step.seconds)), code_cell(step.command))
        for step in evidence.steps
    )
    caption = "Computed for this report, or reused because hashes of spec, weights, code and environment are the same"
    return Table(caption, columns("step", "", ">time", "command"), rows, evidence.commands.get("report"))


def _environment_table(evidence: Evidence) -> Table:
    rows = tuple((Cell(name), Cell(text)) for name, text in _flat(evidence.environment))
    return Table("Environment", columns("", ""), rows, evidence.commands.get("environment", "triptych doctor"), folded=True)


def _flat(data: dict[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested plain data as (dotted name, text) rows."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{key}", "unknown" if value is None else str(value)
