"""Where the time of one step went, from the operators that a profiler saw. Pure functions of `core.trace.Event`.

Each moment of the step belongs to the operators that run then, in equal shares: on two threads, half of it to each. So the kinds of work,
and the moments in which no operator runs (Python, dispatch, waiting), add up to the step. While the batch is made, nothing else of the step
runs, and the time is the data's whoever works.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from triptych.core.errors import TriptychError
from triptych.core.trace import CATEGORIES, STEP, Event

TOP = 10


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of time on one track in which `event` was the innermost that ran, doing work of `category`; `made`: within a region."""

    start: float
    stop: float
    event: Event
    category: str
    made: bool


@dataclass(slots=True)
class Attribution:
    """Seconds of a step by kind of work and by operator; `mixed` of them in operators into which a compiler fused several kinds."""

    step: float
    categories: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    operators: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    mixed: float = 0.0

    @property
    def unattributed(self) -> float:
        """Seconds in which no operator ran."""
        return max(0.0, self.step - sum(self.categories.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the operators that took most."""
        top = sorted(self.operators.items(), key=lambda each: (-each[1], each[0]))[:TOP]
        rows = [
            {"operation": name, "category": kind, "seconds": seconds, "share": seconds / self.step, "calls": self.calls[name, kind]}
            for (name, kind), seconds in top
        ]
        return {
            "step_seconds": self.step, "categories": self.categories, "unattributed_seconds": self.unattributed,
            "unattributed_share": self.unattributed / self.step, "mixed_share": self.mixed / self.step, "top": rows,
        }  # fmt: skip


def attribute(events: list[Event]) -> Attribution:
    """The time of the step that `events` has, a region. TriptychError unless it has exactly one."""
    window = step_of(events)
    found = Attribution((window.stop - window.start) / 1e6)
    shown = [piece for piece in pieces(events) if piece.start < window.stop and piece.stop > window.start]
    for key in {(piece.event.operation, piece.category, id(piece.event)) for piece in shown}:
        found.calls[key[0], key[1]] += 1
    for seconds, running in _moments(shown, window):
        for piece in running:
            share = seconds / len(running)
            found.categories[piece.category] += share
            found.operators[piece.event.operation, piece.category] += share
            found.mixed += share if piece.event.also else 0.0
    return found


def step_of(events: Iterable[Event]) -> Event:
    """The region of the step."""
    steps = [event for event in events if event.region and event.operation == STEP]
    if len(steps) != 1:
        raise TriptychError(f"a trace of one step was expected; the profiler's has {len(steps)}")
    return steps[0]


def pieces(events: list[Event]) -> Iterator[Piece]:
    """All tracks cut where an event begins or ends. Of nested events the innermost is named, and the outermost that tells its kind of work
    gives it: a copy within a convolution counts as convolution."""
    tracks = sorted((event for event in events if event.operation != STEP), key=lambda event: (event.track, event.start, -event.stop))
    for _, track in groupby(tracks, key=lambda event: event.track):
        yield from _cut(list(track))


def _cut(track: list[Event]) -> Iterator[Piece]:
    open_: list[tuple[Event, str | None, bool]] = []
    at = 0.0

    def until(time: float) -> Iterator[Piece]:
        nonlocal at
        if open_ and time > at:
            event, category, made = open_[-1]
            yield Piece(at, time, event, category or "other", made)
        at = max(at, time)

    for event in track:
        while open_ and open_[-1][0].stop <= event.start:
            yield from until(open_[-1][0].stop)
            open_.pop()
        yield from until(event.start)
        _, category, made = open_[-1] if open_ else (None, None, False)
        open_.append((event, category or event.category, made or event.region))
    while open_:
        yield from until(open_[-1][0].stop)
        open_.pop()


def _moments(shown: list[Piece], window: Event) -> Iterator[tuple[float, list[Piece]]]:
    """(seconds, the pieces that run) of each stretch of the step in which these are the same."""
    starts, stops = defaultdict(list), defaultdict(list)
    for number, piece in enumerate(shown):
        starts[max(piece.start, window.start)].append(number)
        stops[min(piece.stop, window.stop)].append(number)
    running: dict[int, Piece] = {}
    for now, then in pairwise(sorted(starts.keys() | stops.keys())):
        for number in stops[now]:
            running.pop(number, None)
        running |= {number: shown[number] for number in starts[now]}
        if running:
            making = [piece for piece in running.values() if piece.made]
            yield (then - now) / 1e6, making or list(running.values())
