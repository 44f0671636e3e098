"""A status line on a terminal's stderr; silence off it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
