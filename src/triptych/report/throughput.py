"""The figure of a benchmark: images a second of every lane with its interval, a panel a batch size."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from triptych.core.contract import FRAMEWORKS
from triptych.report.figures import INKS, Canvas, quiet
from triptych.report.measured import STOCK, Timed
from triptych.report.wording import contestant, rate


def throughput(rows: Sequence[Timed], canvas: Canvas) -> Figure:
    """Bars from zero, in the order of the rows; what is not ours is paler, and a runtime grey. `rows` have been timed."""
    sizes = list(dict.fromkeys(row.batch_size for row in rows))
    panels = [[row for row in rows if row.batch_size == size] for size in sizes]
    down, across = (len(sizes), 1) if canvas.narrow else (-(-len(sizes) // 2), min(2, len(sizes)))
    tallest = max(map(len, panels))
    figure = Figure(figsize=(canvas.width, down * (0.55 + 0.235 * tallest)), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for each, size, panel in zip(axes, sizes, panels, strict=False):
        _panel(each, panel, tallest)
        each.set_title(f"images/s, batch {size}", loc="left")
    for spare in axes[len(sizes) :]:
        spare.set_visible(False)
    return figure


def _panel(axes: Axes, rows: Sequence[Timed], slots: int) -> None:
    largest = max(speeds(row)[1] for row in rows)
    for y, row in enumerate(rows):
        ink = INKS[row.framework if row.framework in FRAMEWORKS else "self"]
        low, high = speeds(row)
        axes.barh(y, row.images_per_second or 0.0, height=0.62, color=ink, alpha=0.4 if row.lane == STOCK else 0.85, lw=0)
        axes.hlines(y, low, high, color=INKS["ink"], lw=1.1)
        axes.text(high + 0.02 * largest, y, rate(row.images_per_second), va="center_baseline", fontsize=7.5, color=INKS["muted"])
    axes.set_yticks(range(len(rows)), [contestant(row.framework, row.lane) for row in rows])
    axes.set_ylim(slots - 0.4, -0.6)
    axes.set_xlim(0, 1.16 * largest)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    quiet(axes, "x")


def speeds(row: Timed) -> tuple[float, float]:
    """Images a second at the two ends of the interval, or twice the figure where there is none."""
    if row.interval:
        return row.batch_size / row.interval[1], row.batch_size / row.interval[0]
    return row.images_per_second or 0.0, row.images_per_second or 0.0
