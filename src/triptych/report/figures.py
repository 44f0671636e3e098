"""The report's figures: matplotlib's Figure API (no pyplot, no global state), as PNG for Markdown and as inline SVG for HTML.

Every color is an *ink* with a name. The PNG shows the light values; in the SVG each value is replaced by its CSS variable, so
that a figure follows the page into dark mode. Text stays text (system fonts, selectable, small).
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from triptych.core.tolerance import CUSTOMARY_FORWARD_CHECK
from triptych.report.evidence import Certificate, Curves, FaultTable, RecordedRun, Rung, Training
from triptych.report.wording import framework_title, pair_title, short

# name -> value on paper; the names are the CSS variables of style.css, which holds the dark values.
INKS = {
    "ink": "#22262b",
    "muted": "#6b7178",
    "rule": "#dcd8cf",
    "paper": "#fbfaf7",
    "pytorch": "#c94f2c",
    "tensorflow": "#d09a1e",
    "jax": "#3f64b5",
    "self": "#a9a39a",
    "pass": "#2f7a51",
    "fail": "#b3271d",
    "heat1": "#f3dfc3",
    "heat2": "#eabf8c",
    "heat3": "#dc935c",
    "heat4": "#c2653c",
    "heat5": "#933c26",
    "onheat": "#fffdf8",
}
DASHES: dict[str, Any] = {"pytorch": "-", "tensorflow": (0, (5, 2)), "jax": (0, (1.2, 1.6))}
PAIR_INKS = ("pytorch", "tensorflow", "jax")

_RC = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "triptych",  # the same figure gives the same ids
    "text.parse_math": False,  # a `$` in a name is a dollar
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.linewidth": 0.8,
    "text.color": INKS["ink"],
    "axes.titlecolor": INKS["ink"],
    "axes.labelcolor": INKS["muted"],
    "xtick.color": INKS["muted"],
    "ytick.color": INKS["muted"],
    "axes.edgecolor": INKS["rule"],
}


@dataclass(frozen=True, slots=True)
class Canvas:
    """How much room a figure has: `wide` for a page and for PNG, `narrow` for a phone. Width in inches."""

    width: float
    narrow: bool


WIDE, NARROW = Canvas(7.2, False), Canvas(4.0, True)
Draw = Callable[[Canvas], Figure]


def svg(draw: Draw, canvas: Canvas, prefix: str) -> str:
    """The figure as an inline SVG element; ids start with `prefix`, so that several live on one page."""
    with mpl.rc_context(_RC):
        buffer = io.StringIO()
        FigureCanvasSVG(draw(canvas)).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return inline(buffer.getvalue(), prefix)


def png(draw: Draw) -> bytes:
    """The wide figure as PNG, 160 dots an inch, on paper color."""
    with mpl.rc_context(_RC):
        figure, buffer = draw(WIDE), io.BytesIO()
        figure.set_facecolor(INKS["paper"])
        figure.set_dpi(160)
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def inline(text: str, prefix: str) -> str:
    """matplotlib's SVG document -> an element that takes colors and fonts from the page and refers to nothing outside."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text, flags=re.S)
    root = r'<svg viewBox="\1" aria-hidden="true" focusable="false">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', root, text, count=1, flags=re.S)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]+;?", "", text)
    for name, value in INKS.items():
        text = text.replace(value, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", text)


def ladder(certificate: Certificate, canvas: Canvas) -> Figure:
    """Worst error of every rung against its tolerance, a panel a precision, log scale; below, the free run's ratio on its own scale."""
    precisions = sorted({rung.precision for rung in certificate.rungs}, reverse=True)
    panels = [(p, [r for r in certificate.rungs if r.precision == p and r.number != 8]) for p in precisions]
    panels = [panel for panel in panels if panel[1]]
    ratios = [rung for rung in certificate.rungs if rung.number == 8]
    heights = [len(rungs) for _, rungs in panels] + [len(ratios) + 0.3] * bool(ratios)
    figure = Figure(figsize=(canvas.width, 0.3 + 0.26 * sum(heights) + 0.55 * len(heights)), layout=ConstrainedLayoutEngine(h_pad=0.1))
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    errors = [rung for _, rungs in panels for rung in rungs]
    for each, (precision, rungs) in zip(axes, panels, strict=False):
        each.set_xscale("log")
        _rungs(each, rungs, [f"{rung.number}  {_clipped(rung.name, canvas)}" for rung in rungs], _floor(errors))
        each.set_xlim(_floor(errors) / 8, 30 * max((x for r in errors for x in (r.worst_error, r.tolerance) if x), default=1.0))
        _decades(each, "x", 5 if canvas.narrow else 9)
        each.set_title(f"{precision}: worst error, and its tolerance", loc="left")
    if ratios:
        _rungs(axes[-1], ratios, [f"8  {_clipped(rung.name, canvas)}, {rung.precision.removeprefix('float')}" for rung in ratios], 0.0)
        axes[-1].set_xlim(0, 1.15 * max([rung.tolerance or 1.0 for rung in ratios] + [rung.worst_error or 0.0 for rung in ratios]))
        axes[-1].set_title("drift, as a multiple of the one-ulp drift", loc="left")
    return figure


def _floor(rungs: Sequence[Rung]) -> float:
    """Where exact agreement (error 0) is drawn on a log scale: two decades below everything else."""
    values = [x for rung in rungs for x in (rung.worst_error, rung.tolerance) if x]
    return 10.0 ** (math.floor(math.log10(min(values, default=1e-15))) - 2)


def _rungs(axes: Axes, rungs: Sequence[Rung], labels: list[str], floor: float) -> None:
    """One row a rung: a line to the error, a bar at the tolerance; a diamond at the left edge when the frameworks agree exactly."""
    for y, rung in enumerate(rungs):
        ink, error = INKS["pass" if rung.passed else "fail"], rung.worst_error
        if rung.tolerance:
            axes.plot([rung.tolerance] * 2, [y - 0.3, y + 0.3], color=INKS["ink"], lw=1.6, solid_capstyle="butt")
        if error is None:
            axes.text(0.02, y, "no evidence", transform=axes.get_yaxis_transform(), va="center", color=INKS["fail"])
            continue
        at = max(error, floor)
        axes.plot([floor, at], [y, y], color=ink, lw=1.2, alpha=0.5)
        axes.plot([at], [y], "o" if error else "D", color=ink, ms=5 if error else 4)
        place: dict[str, Any] = {"ha": "right", "xytext": (-5, 2.5)} if error else {"ha": "left", "xytext": (6, 0), "va": "center_baseline"}
        axes.annotate(short(error) if error else "exact", (at, y), textcoords="offset points", fontsize=7, color=INKS["muted"], **place)
    axes.set_yticks(range(len(rungs)), labels, color=INKS["ink"])
    axes.set_ylim(len(rungs) - 0.5, -0.7)
    quiet(axes, "x")


def _clipped(name: str, canvas: Canvas) -> str:
    longest = 22 if canvas.narrow else 40
    return name if len(name) <= longest else name[: longest - 1] + "…"


def losses(training: Training, canvas: Canvas) -> Figure:
    """Training loss of every framework on top of each other: faint each step, bold the mean of a window."""
    figure, axes = _single(canvas, 3.1)
    longest = max((len(run.losses) for run in training.runs), default=1)
    window = max(1, longest // 60)
    for width, run in zip((4.2, 2.4, 1.3), training.runs, strict=False):
        ink = INKS.get(run.framework, INKS["muted"])
        steps, values = _positive(run.losses)
        if window > 1:
            axes.plot(steps, values, color=ink, lw=0.5, alpha=0.28)
        steps, values = _positive(_means(run.losses, window))
        middles, dashes = [window * (step + 0.5) for step in steps], DASHES.get(run.framework, "-")
        axes.plot(middles, values, color=ink, lw=width, ls=dashes, label=framework_title(run.framework))
    axes.set_yscale("log")
    _decades(axes, "y")
    _finish(axes, "training step", "training loss", canvas)
    return figure


def recorded(runs: Sequence[RecordedRun], canvas: Canvas) -> Figure:
    """Training loss (mean of each epoch) and test accuracy by epoch, one curve a run on the same axes."""
    figure = Figure(figsize=(canvas.width, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    named: set[str] = set()
    for width, run in zip(itertools.cycle((4.2, 2.4, 1.3)), runs, strict=False):
        label = "_" if run.framework in named else framework_title(run.framework)  # matplotlib leaves `_` out of the legend
        named.add(run.framework)
        look = {"color": INKS.get(run.framework, INKS["muted"]), "ls": DASHES.get(run.framework, "-"), "lw": width}
        above.plot(range(1, len(run.train_loss) + 1), run.train_loss, label=label, **look)
        shown = [(row[1], 100 * row[2]) for row in run.evaluations if row[1] is not None and row[2] is not None]
        below.plot([epoch for epoch, _ in shown], [accuracy for _, accuracy in shown], **look)
    _finish(above, "", "training loss", canvas)
    _finish(below, "epoch", "test accuracy, %", canvas, legend=False)
    return figure


def divergence(training: Training, canvas: Canvas) -> Figure:
    """Differences between frameworks, per step, beside the difference of one framework from itself after one ulp; log scale."""
    panels = [
        ("|difference of the loss|", training.loss_difference, training.loss_self),
        ("largest |difference of a weight|", training.weight_difference, training.weight_self),
    ]
    panels = [panel for panel in panels if panel[1] or panel[2]]
    figure = Figure(figsize=(canvas.width, 0.5 + 2.45 * max(1, len(panels))), layout="constrained")
    columns = figure.subplots(max(1, len(panels)), 1, squeeze=False)[:, 0]
    for i, (axes, (label, pairs, own)) in enumerate(zip(columns, panels, strict=False)):
        _drift(axes, pairs, own)
        _finish(axes, "training step", label, canvas, legend=i == 0)
    return figure


def free_run(curves: Curves, canvas: Canvas) -> Figure:
    """Rung 8: divergence between frameworks at every step beside the self-divergence of one of them; log scale."""
    figure, axes = _single(canvas, 2.9)
    for run in curves.self_runs:
        axes.plot(*_positive(run), color=INKS["self"], lw=0.7, alpha=0.8)
    _drift(axes, curves.pairs, curves.self_divergence)
    _finish(axes, "training step", "divergence of the state", canvas)
    return figure


def _drift(axes: Axes, pairs: dict[str, tuple[float, ...]], own: Sequence[float]) -> None:
    axes.set_yscale("log")
    steps, values = _positive(own)
    axes.plot(steps, values, color=INKS["self"], lw=6, alpha=0.55, solid_capstyle="round", label="one framework, moved by one ulp")
    for i, (pair, series) in enumerate(pairs.items()):
        ink = PAIR_INKS[i % 3]
        steps, values = _positive(series)
        marker = "o" if len(values) <= 30 else ""
        axes.plot(steps, values, color=INKS[ink], lw=1.4, ls=DASHES[ink], marker=marker, ms=3.2, label=pair_title(pair))
    _decades(axes, "y")


def fault_map(table: FaultTable, canvas: Canvas) -> Figure:
    """Fault x rung: a cell holds the largest error over the frameworks it was planted in; the last column is the usual check."""
    names = list(dict.fromkeys(fault.name for fault in table.faults))
    rungs = list(range(1, 9))
    figure = Figure(figsize=(canvas.width, 0.75 + 0.235 * max(1, len(names))), layout="constrained")
    axes = figure.subplots()
    size = 6.2 if canvas.narrow else 7.5
    for y, name in enumerate(names):
        mine = [fault for fault in table.faults if fault.name == name]
        for rung in rungs:
            _fault_cell(axes, rung, y, [f.error for f in mine if f.caught and f.rung == rung], size)
        _usual_cell(axes, y, [f.float32_forward_error for f in mine], all(f.caught for f in mine), size)
    axes.set_xticks([*rungs, 9.5], [*map(str, rungs), "1e-4\ncheck"])
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], color=INKS["ink"], fontsize=6.6 if canvas.narrow else 8)
    axes.set(xlim=(0.5, 10.2), ylim=(len(names) - 0.45, -0.55))
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.hlines([y + 0.5 for y in range(len(names))], 0.5, 10.2, color=INKS["rule"], lw=0.5)
    return figure


def _fault_cell(axes: Axes, x: float, y: float, errors: list[float | None], size: float) -> None:
    """One cell of the map; the stronger the color the larger. A rung that compares exactly says `≠`."""
    if not errors:
        return
    largest = max((error for error in errors if error is not None), default=None)
    level = 5 if largest is None else heat_level(largest)
    axes.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color=INKS[f"heat{level}"], lw=0))
    text = "≠" if largest is None else _exponent(largest)
    axes.text(x, y, text, ha="center", va="center_baseline", fontsize=size, color=INKS["onheat" if level >= 4 else "ink"])


def _usual_cell(axes: Axes, y: float, errors: list[float | None], caught: bool, size: float) -> None:
    known = [error for error in errors if error is not None]
    text, ink = "–", "muted"
    if known:
        missed = min(known) <= CUSTOMARY_FORWARD_CHECK
        text, ink = ("misses", "fail") if missed else ("sees", "muted")
    if not caught:
        text, ink = "NOT CAUGHT", "fail"
    axes.text(9.5, y, text, ha="center", va="center_baseline", fontsize=size, color=INKS[ink])


def heat_level(error: float) -> int:
    """1 to 5: up to 1e-9, 1e-6, 1e-3, 1e-1, above."""
    return 1 + sum(error > bound for bound in (1e-9, 1e-6, 1e-3, 1e-1))


def _exponent(error: float) -> str:
    return "0" if error == 0 else f"1e{math.floor(math.log10(error)):d}"


def _single(canvas: Canvas, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(canvas.width, height), layout="constrained")
    return figure, figure.subplots()


def _means(values: Sequence[float], window: int) -> list[float]:
    chunks = [values[i : i + window] for i in range(0, len(values), window)]
    return [sum(chunk) / len(chunk) for chunk in chunks]


def _positive(values: Iterable[float | None]) -> tuple[list[int], list[float]]:
    """(steps, values) that a log axis can show: finite and above zero."""
    kept = [(i, v) for i, v in enumerate(values) if v is not None and math.isfinite(v) and v > 0]
    return [i for i, _ in kept], [v for _, v in kept]


def _decades(axes: Axes, which: str, most: int = 8) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(numticks=most))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{round(math.log10(value)):d}" if value > 0 else ""))


def _finish(axes: Axes, x_label: str, y_label: str, canvas: Canvas, legend: bool = True) -> None:
    axes.set_xlabel(x_label)
    axes.set_title(y_label, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5 if canvas.narrow else 9))
    quiet(axes, "y")
    if legend and axes.get_legend_handles_labels()[0]:
        above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.1)} if canvas.narrow else {"loc": "best"}
        axes.legend(frameon=False, fontsize=8, labelcolor=INKS["ink"], handlelength=2.6, **above)


def quiet(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Only what is needed: a faint grid along the value axis, no frame, no tick marks."""
    axes.grid(axis=grid, color=INKS["rule"], lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
