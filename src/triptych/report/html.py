"""The report as one self-contained HTML file: inline CSS, inline SVG, no script, no request. Everything from outside is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from triptych.report import figures
from triptych.report.blocks import Picture, Section
from triptych.report.evidence import Evidence, Run
from triptych.report.verdict import Verdict
from triptych.report.wording import framework_title, short


@dataclass(frozen=True, slots=True)
class Panel:
    """One wing of the triptych at the top: a framework, its version, what it reached, and the curve of its loss."""

    framework: str
    title: str
    version: str
    accuracy: str | None
    curve: str | None


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A number worth knowing before reading on."""

    value: str
    label: str


def render(evidence: Evidence, verdict: Verdict, sections: tuple[Section, ...]) -> str:
    """The whole document."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kind"] = lambda block: type(block).__name__.lower()
    template = environment.from_string(_asset("report.html.j2"))
    return template.render(
        evidence=evidence, verdict=verdict, sections=sections, css=Markup(_asset("style.css")), panels=list(_panels(evidence)),
        key_figures=list(key_figures(evidence)), art=_art,
    )  # fmt: skip


def _asset(name: str) -> str:
    return resources.files("triptych.report").joinpath("templates", name).read_text(encoding="utf-8")


def _art(picture: Picture) -> list[tuple[str, Markup]]:
    """(class, SVG) for a page and for a phone; matplotlib escapes the text inside."""
    return [
        ("wide", Markup(figures.svg(picture.draw, figures.WIDE, f"{picture.slug}-w"))),
        ("narrow", Markup(figures.svg(picture.draw, figures.NARROW, f"{picture.slug}-n"))),
    ]


def key_figures(evidence: Evidence) -> Iterator[KeyFigure]:
    """The few numbers at the top; those that the evidence does not hold are left to the claims, which say why."""
    rungs = {(r.number, r.precision): r.worst_error for c in evidence.certificates[:1] for r in c.rungs}
    for number, label in ((3, "worst tensor of a forward pass, float64"), (5, "worst gradient of a parameter, float64")):
        error = rungs.get((number, "float64"))
        if error is not None:
            yield KeyFigure(short(error), label)
    ratio = rungs.get((8, "float64"))
    if ratio is not None:
        yield KeyFigure(f"{ratio:.2g}×", "drift between frameworks over drift of one from itself")
    if evidence.faults:
        faults = [fault for table in evidence.faults for fault in table.faults]
        yield KeyFigure(f"{sum(f.caught for f in faults)} / {len(faults)}", "planted faults caught")


def _panels(evidence: Evidence) -> Iterator[Panel]:
    libraries = {"pytorch": "torch", "tensorflow": "keras", "jax": "jax"}
    versions = evidence.environment.get("versions", {})
    runs = {run.framework: run for run in evidence.training.runs} if evidence.training else {}
    for name, library in libraries.items():
        run = runs.get(name)
        version = f"{library} {versions[library]}" if library in versions else ""
        yield Panel(name, framework_title(name), version, f"{run.accuracy:.1%}" if run else None, _sparkline(run) if run else None)


def _sparkline(run: Run, points: int = 64) -> str | None:
    """The loss on a log scale as SVG path data in a box of 100 x 40; None when there is nothing to draw."""
    window = max(1, len(run.losses) // points)
    means = [sum(chunk) / len(chunk) for chunk in (run.losses[i : i + window] for i in range(0, len(run.losses), window))]
    logs = [math.log10(mean) for mean in means if mean > 0 and math.isfinite(mean)]
    if len(logs) < 2:
        return None
    low, span = min(logs), (max(logs) - min(logs)) or 1.0
    steps = [(100 * i / (len(logs) - 1), 38 - 36 * (log - low) / span) for i, log in enumerate(logs)]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in steps)
