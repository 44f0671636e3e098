"""Traces in the Chrome trace event format, gzipped: what ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from triptych.bench.attribution import step_of
from triptych.core.storage import storing, write_whole
from triptych.core.trace import Event


def trace_events(title: str, events: list[Event], process: int = 1) -> list[dict[str, Any]]:
    """The events as rows of the format, microseconds from the step's beginning on, its tracks as threads of the process `title`.

    The kind of work is a row's category (`cat`), by which Perfetto can be searched; what ended before the step began is left out.
    """
    window = step_of(events)
    shown = sorted((event for event in events if event.stop >= window.start), key=lambda event: (event.start, -event.stop))
    tracks = {track: number for number, track in enumerate(dict.fromkeys([window.track, *(event.track for event in shown)]), start=1)}
    rows = [_named("process_name", title, process, 0)]
    rows += [_named("thread_name", track, process, number) for track, number in tracks.items()]
    return rows + [_row(event, window.start, process, tracks[event.track]) for event in shown]


def _named(what: str, name: str, process: int, thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _row(event: Event, start: float, process: int, thread: int) -> dict[str, Any]:
    told = {"layer": event.layer, "fused with": ", ".join(event.also)}
    return {
        "ph": "X", "name": event.operation, "cat": event.category or ("region" if event.region else "inside"),
        "ts": round(event.start - start, 3), "dur": round(event.stop - event.start, 3), "pid": process, "tid": thread,
        "args": {name: value for name, value in told.items() if value},
    }  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as a file. StorageError when it cannot be written."""
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": rows}, allow_nan=False)
    with storing(path):
        write_whole(path, gzip.compress(text.encode(), mtime=0))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `write` made."""
    rows: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return rows
