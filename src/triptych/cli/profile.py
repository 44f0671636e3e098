"""`triptych profile MODEL`: one warmed step as a trace for each framework, and where its time went, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from triptych.cli import called, emit, json_option
from triptych.core import contract
from triptych.core.trace import CATEGORIES

TITLES = {"matrix_product": "matrix product", "elementwise": "activation, pooling, addition"}
WIDTH = 22


@click.command("profile")
@click.argument("model")
@click.option("--framework", default="all", show_default=True, help="pytorch, tensorflow, jax, several separated by commas, or all.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--image-size", type=click.IntRange(min=1), default=None, help="Pixels a side; without it, the model's own.")
@click.option("--mode", default="training_step", show_default=True, help="training_step or inference.")
@click.option("--lane", default="default", show_default=True, help="default, tuned, compiled or tuned_compiled, as in `triptych bench`.")
@click.option("--data", metavar="PATH|digits", default=None, help="Training images; without it, random pixels in memory.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Of every framework alike; without it, the cores there are.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Traced steps; the one of median length is kept.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=None, help="Without it, runs/profile/MODEL.")
@json_option
def profile_command(
    model: str, framework: str, batch_size: int, image_size: int | None, mode: str, lane: str, data: str | None, threads: int | None,
    repeats: int, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Trace one warmed step of MODEL in each framework, in float32 on the CPU, and show where its time went.

    OUT/trace.json.gz opens in ui.perfetto.dev, and so does OUT/FRAMEWORK/trace.json.gz. Not a benchmark: see `triptych bench`.
    """
    from triptych import evaluation
    from triptych.bench import profile
    from triptych.cli.progress import status

    options = {} if image_size is None else {"image_size": image_size}
    request = profile.Request(
        model, tuple(evaluation.chosen_frameworks(framework)), mode, lane, batch_size, options, data, threads, repeats
    )
    out = out or Path("runs/profile") / model
    with status(f"profile {model}") as progress:
        made = profile.run(request, called("profile", model), out, progress)
    emit(made, as_json, f"{table(made)}\n\n{out}/trace.json.gz opens in ui.perfetto.dev")
    failed = profile.outcome(made)
    if failed is not None:
        raise failed


def table(made: dict[str, Any]) -> str:
    """A record as text: the kinds of work side by side, then each framework's operators that took most."""
    what = f"{made['model']}, {made['mode'].replace('_', ' ')}, batch {made['batch_size']}, {made['image_size']} px"
    title = f"{what}, lane {made['lane']}, {made['threads']} thread(s)"
    rows = [row for row in made["rows"] if "failure" not in row]
    if not rows:
        return "\n".join([title, *_failures(made)])
    lines = [title, _row("", [contract.FRAMEWORKS[row["framework"]].title for row in rows])]
    lines += [_row(TITLES.get(name, name), [_share(row, row["categories"][name]) for row in rows]) for name in CATEGORIES]
    lines += [
        _row("no operator (Python, waiting)", [_share(row, row["unattributed_seconds"]) for row in rows]),
        _row("the step, traced", [_share(row, row["step_seconds"]) for row in rows]),
        _row("longer than untraced by", [f"{row['overhead']:.1%}" for row in rows]),
        _row("tasks waited for a core", [_pressure(row["weather"]["pressure"]) for row in rows]),
        _row("in operators of several kinds", [f"{row['mixed_share']:.1%}" for row in rows]),
        _row("lines of code of the room", [f"{row['lines_of_code']}" for row in rows]),
    ]
    for row in rows:
        lines += ["", f"{contract.FRAMEWORKS[row['framework']].title}: operators that took most"]
        lines += [f"  {each['share']:>6.1%}{each['calls']:>6} x  {each['operation']}  [{each['category']}]" for each in row["top"]]
    return "\n".join([*lines, *_failures(made)])


def _row(title: str, cells: list[str]) -> str:
    return f"{title:<32}" + "".join(f"{cell:>{WIDTH}}" for cell in cells)


def _share(row: dict[str, Any], seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms {seconds / row['step_seconds']:>5.1%}"


def _pressure(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.0%}"


def _failures(made: dict[str, Any]) -> list[str]:
    return [f"{contract.FRAMEWORKS[row['framework']].title}: {row['failure']}" for row in made["rows"] if "failure" in row]
