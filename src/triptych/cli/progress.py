"""Progress on stderr: a status line on a terminal and silence off it; for training a bar, and off a terminal a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import click

SECONDS_A_LINE = 10.0
Told = Mapping[str, Any]
"""What `training.loop.Progress` is told."""


@contextmanager
def status(start: str) -> Iterator[Callable[[str], None]]:
    """Yields a function that replaces the line."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(start) as line:

        def show(text: str) -> None:
            line.update(text)

        yield show


@contextmanager
def training(frameworks: Sequence[str]) -> Iterator[Callable[[str, Told], None]]:
    """Yields a function that shows what a framework's run tells: a bar for each, or lines no closer than ten seconds, the last always."""
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {name: bars.add_task(name, total=None, told="waiting") for name in frameworks}

        def show(framework: str, told: Told) -> None:
            if "note" in told:
                bars.console.print(f"{framework}: {told['note']}", markup=False, highlight=False)
            else:
                bars.update(tasks[framework], completed=told["step"], total=told["steps"], told=pace(told))

        yield show


class _Lines:
    def __init__(self) -> None:
        self._due = 0.0

    def show(self, framework: str, told: Told) -> None:
        if "note" in told:
            click.echo(f"{framework}: {told['note']}", err=True)
        elif time.monotonic() >= self._due or told["step"] == told["steps"]:
            self._due = time.monotonic() + SECONDS_A_LINE
            click.echo(f"{framework}: step {told['step']} of {told['steps']}, {pace(told)}", err=True)


def pace(told: Told) -> str:
    """Loss, speed, share of time waited for data, and the time left, of a step."""
    left = timedelta(seconds=round(told["seconds_left"]))
    return f"loss {told['loss']:.4f}, {told['images_per_second']:.0f} images/s, data wait {told['data_wait']:.0%}, {left} left"
