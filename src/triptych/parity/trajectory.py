"""The recorded training run that every framework replays step by step (rung 7)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from triptych.core.contract import Converted, TrainingState
from triptych.parity.observation import StoredTensors, wait_until, write_tensors


class Trajectory(Protocol):
    """States after each step, by recipe; written by the reference, read by the others."""

    replays: bool

    def write(self, kind: str, step: int, state: TrainingState) -> None:
        """Record the state after `step`."""
        ...

    def read(self, kind: str, step: int) -> TrainingState:
        """The state after `step`."""
        ...


class MemoryTrajectory:
    """A trajectory within one process: only the last state of each recipe is kept."""

    def __init__(self, replays: bool = False, states: dict[tuple[str, int], TrainingState] | None = None) -> None:
        self.replays = replays
        self.states: dict[tuple[str, int], TrainingState] = {} if states is None else states

    def write(self, kind: str, step: int, state: TrainingState) -> None:
        """Record the state after `step`; the one before the last is dropped."""
        self.states[kind, step] = state.copy()
        self.states.pop((kind, step - 2), None)

    def read(self, kind: str, step: int) -> TrainingState:
        """The state after `step`."""
        return self.states[kind, step]


class FileTrajectory:
    """A trajectory in the run directory. Unless it is kept, one state at a time is on disk: a state is deleted when all
    readers have marked it as read, and the writer waits for that before the next. `before_wait` is called before every wait,
    so that what this worker has to say is on disk when others wait for it."""

    def __init__(self, directory: Path, framework: str, readers: tuple[str, ...], *, replays: bool, keep: bool) -> None:
        self.directory, self.framework, self.readers, self.replays, self.keep = directory, framework, readers, replays, keep
        self.last: Path | None = None
        self.before_wait: Callable[[], None] = lambda: None
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, step: int, state: TrainingState) -> None:
        """Record the state after `step`, once the one before has been read by all."""
        self.close()
        self.last = self._path(kind, step)
        write_tensors(self.last, flatten(state), counts(state))

    def close(self) -> None:
        """Wait until the last state has been read by all, and delete it."""
        if self.last is None or self.keep:
            return
        self.before_wait()
        marks = [self._mark(self.last, reader) for reader in self.readers]
        wait_until(lambda: all(mark.exists() for mark in marks))
        for path in (self.last, *marks):
            path.unlink()
        self.last = None

    def read(self, kind: str, step: int) -> TrainingState:
        """The state after `step`, waiting until the reference has written it; its tensors are read from the file when asked for."""
        path = self._path(kind, step)
        self.before_wait()
        wait_until(path.exists)
        state = unflatten(StoredTensors(path))
        if not self.keep:
            self._mark(path, self.framework).touch()
        return state

    def _path(self, kind: str, step: int) -> Path:
        return self.directory / f"{kind}-{step:03d}.safetensors"

    @staticmethod
    def _mark(path: Path, reader: str) -> Path:
        return path.with_suffix(f".read-by-{reader}")


def flatten(state: TrainingState) -> Mapping[str, np.ndarray]:
    """One flat mapping: `weights/NAME`, `slots/SLOT/NAME`, `ema/NAME`; a tensor is read when it is asked for, as the state's are."""
    parts = {"weights": state.weights, **{f"slots/{slot}": values for slot, values in state.slots.items()}, "ema": state.ema}
    places = {f"{part}/{name}": (values, name) for part, values in parts.items() for name in values}
    return Converted(places, lambda place: place[0][place[1]])


def counts(state: TrainingState) -> dict[str, str]:
    """What of a state is no tensor, as a file's metadata."""
    return {"step": str(state.step), "loss_scale": json.dumps(state.loss_scale), "good_steps": str(state.good_steps)}


def unflatten(flat: StoredTensors) -> TrainingState:
    """The inverse of `flatten` and `counts`, of tensors that stay in their file."""
    names = dict.fromkeys(name.split("/")[1] for name in flat if name.startswith("slots/"))
    slots = {slot: flat.under(f"slots/{slot}") for slot in names}
    step, scale, good_steps = (json.loads(flat.metadata[name]) for name in ("step", "loss_scale", "good_steps"))
    return TrainingState(flat.under("weights"), slots, flat.under("ema"), step, scale, good_steps)
