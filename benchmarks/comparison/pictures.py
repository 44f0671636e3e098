"""The figures of docs/transformer.md: passes by lane, and milliseconds an example over batch sizes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from comparison.tables import TITLES, WORKLOAD, Group, chosen, median
from triptych.bench.statistics import median_interval
from triptych.report.figures import INKS, Canvas, png

WAYS = {"loop": (0, (1.2, 1.6)), "vmap": "-", "batched": (0, (5, 2))}
COMPILED = {"pytorch": "compiled", "tensorflow": "xla", "jax": "jit"}


def pictures(parts: dict[str, list[Group]]) -> dict[str, bytes]:
    """PNG files by name, of the parts that are on record."""
    drawn: dict[str, Any] = {
        "passes": ("transformer-passes", lambda groups: functools.partial(passes, groups, 8)),
        "vmap": ("transformer-vmap", lambda groups: functools.partial(by_batch, groups, "block")),
        "per_sample": ("transformer-per-sample", lambda groups: functools.partial(by_batch, groups, "block")),
    }
    return {f"{name}.png": png(draw(parts[part])) for part, (name, draw) in drawn.items() if part in parts}


def passes(groups: list[Group], batch_size: int, canvas: Canvas) -> Figure:
    """A row a lane, a panel a pass and workload: median milliseconds and their interval, from zero."""
    mine = [chosen(groups, workload=w, task=t, batch_size=batch_size) for w in WORKLOAD for t in ("forward", "gradient", "step")]
    panels = [found[0] for found in mine if found]
    figure = Figure(figsize=(canvas.width, 1.9 * max(1, len(panels) // 3 + (len(panels) % 3 > 0)) + 0.3), layout="constrained")
    rows = -(-len(panels) // 3)
    every = figure.subplots(rows, 3, squeeze=False, sharey=True).ravel()
    for unused in every[len(panels) :]:
        unused.set_visible(False)
    for axes, group in zip(every, panels, strict=False):
        setting = group["setting"]
        for y, lane in enumerate(TITLES):
            seconds = group["lanes"].get(lane, {}).get("seconds")
            if seconds:
                value, (low, high) = median_interval(seconds)
                ink = INKS[lane.partition("/")[0]]
                axes.barh(y, 1e3 * value, color=ink, alpha=0.85 if not lane.endswith("eager") else 0.4, height=0.66)
                axes.plot([1e3 * low, 1e3 * high], [y, y], color=INKS["ink"], lw=1.2)
        axes.set_title(f"{WORKLOAD[setting['workload']]}, {setting['task']}: ms", loc="left")
        axes.set_yticks(range(len(TITLES)), [title.replace("`", "") for title in TITLES.values()], color=INKS["ink"])
        axes.set_ylim(len(TITLES) - 0.5, -0.5)
        quiet(axes, "x")
    return figure


def by_batch(groups: list[Group], workload: str, canvas: Canvas) -> Figure:
    """A panel a framework, compiled: milliseconds an example of each way, over batch sizes, from zero."""
    mine, highest = chosen(groups, workload=workload), 0.0
    figure = Figure(figsize=(canvas.width, 2.6), layout="constrained")
    every = figure.subplots(1, len(COMPILED), sharey=True)
    sizes = [group["setting"]["batch_size"] for group in mine]
    for axes, (framework, mode) in zip(every, COMPILED.items(), strict=True):
        look: dict[str, Any] = {"color": INKS[framework], "marker": "o", "ms": 3, "lw": 1.6}
        for way, dashes in WAYS.items():
            points = [(size, median(group, f"{framework}/{mode} {way}")) for size, group in zip(sizes, mine, strict=True)]
            shown = [(size, 1e3 * value / size) for size, value in points if value is not None]
            axes.plot([size for size, _ in shown], [value for _, value in shown], ls=dashes, label=way, **look)
            highest = max([highest, *(value for _, value in shown)])
        axes.set_title(f"{TITLES[f'{framework}/{mode}'].replace('`', '')}: ms an example", loc="left")
        doubling(axes, sizes)
        axes.set_xlabel("batch size")
        axes.legend(frameon=False, fontsize=7, labelcolor=INKS["ink"], handlelength=2.6, loc="lower left")
    every[0].set_ylim(0, 1.05 * highest or 1.0)
    return figure


def doubling(axes: Axes, sizes: Sequence[int]) -> None:
    """Batch sizes on a logarithmic scale, ticks at those that were measured; milliseconds"""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(sizes))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    quiet(axes, "y")


def quiet(axes: Axes, grid: str) -> None:
    """A faint grid along the value axis, no frame, no tick marks."""
    axes.grid(axis=grid, color=INKS["rule"], lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
