"""The checkpoints of a run: written in the background, whole or not at all; the newest good one is found again.

`OUT/steps/000123/` is a canonical checkpoint (`core/checkpoint.py`) of the state after 123 steps, which any framework can go on from;
`OUT/latest` names the newest. A crash at any moment leaves the one before.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.core import checkpoint, environment
from triptych.core.contract import TrainingState
from triptych.core.errors import InputRefused, StorageError
from triptych.core.spec import Spec

STEPS, LATEST = "steps", "latest"


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run goes on: the state after `next_step` steps, and what the loop had noted beside it."""

    path: Path
    state: TrainingState
    next_step: int
    notes: dict[str, Any]


class Checkpoints:
    """Writes the checkpoints of one run, one at a time, in a thread of its own; keeps the last `keep_last` and the best `keep_best`.

    An error of the writer comes out of the next `save` or of `close`, as StorageError; the checkpoint before it stays.
    """

    def __init__(self, out: Path, labels: Sequence[str], *, keep_last: int = 2, keep_best: int = 1) -> None:
        self.out, self.labels, self.keep_last, self.keep_best = out, labels, max(1, keep_last), keep_best
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, spec: Spec, state: TrainingState, next_step: int, notes: Mapping[str, Any]) -> None:
        """Take a copy of the state (`Trainer.state()`), which is written while training goes on; waits for the one before."""
        self.wait()
        self._pending = self._writer.submit(self._write, spec, state, next_step, dict(notes))

    def wait(self) -> None:
        """Return when the last checkpoint is on disk. StorageError when it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def forget_after(self, step: int) -> None:
        """Remove checkpoints later than `step`: those of a branch that a run which goes on from there abandons."""
        for name in written(self.out):
            if int(name) > step:
                shutil.rmtree(self.out / STEPS / name, ignore_errors=True)

    def _write(self, spec: Spec, state: TrainingState, next_step: int, notes: dict[str, Any]) -> None:
        name = f"{next_step:06d}"
        if not self.out.is_dir():
            raise StorageError(f"cannot write {self.out / STEPS / name}: the run directory has vanished; put it back or train anew")
        trainer = {**notes, "next_step": next_step, "conditions": conditions()}
        directory = self.out / STEPS / name
        checkpoint.save(
            directory,
            spec,
            state.weights,
            labels=self.labels,
            training=state,
            trainer=trainer,
            overwrite=True,
            provenance=notes.get("provenance"),
        )
        _point_to(self.out, name)
        self._retire(notes.get("evaluations", []))

    def _retire(self, evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Remove what is neither among the last nor among the best; what a crash left half-written goes, too."""
        names, accuracy = written(self.out), {f"{row['step'] + 1:06d}": row["accuracy"] for row in evaluations}
        best = sorted((name for name in names if name in accuracy), key=lambda name: accuracy[name], reverse=True)[: self.keep_best]
        kept = {*names[-self.keep_last :], *best}
        for entry in (self.out / STEPS).iterdir():
            if entry.name not in kept:
                shutil.rmtree(entry, ignore_errors=True)


def _point_to(out: Path, name: str) -> None:
    partial = out / f".{LATEST}.partial"
    try:
        partial.write_text(f"{STEPS}/{name}\n")
        os.replace(partial, out / LATEST)
    except OSError as error:
        raise StorageError(f"cannot write {out / LATEST}: {error.strerror}; the checkpoint in {STEPS}/{name} is whole") from error


def written(out: Path) -> list[str]:
    """The names of a run's checkpoints, oldest first."""
    folder = out / STEPS
    return sorted((entry.name for entry in folder.iterdir() if entry.name.isdigit()), key=int) if folder.is_dir() else []


def newest(out: Path) -> Resumed | None:
    """The newest checkpoint of a run that is whole; a damaged one is named in a warning and passed over. None when there is none."""
    for name in reversed(written(out)):
        try:
            return load(out / STEPS / name)
        except InputRefused as error:
            warnings.warn(f"a checkpoint was passed over: {error}", stacklevel=2)
    return None


def load(path: Path) -> Resumed:
    """A checkpoint with its training state. InputRefused when it is damaged or holds weights only."""
    state, trainer = checkpoint.load_training_state(path)
    next_step = trainer.get("next_step")
    if not isinstance(next_step, int) or next_step < 0:
        raise InputRefused(f"{path}: its trainer.json does not say at which step to go on; it was not saved by a training run")
    return Resumed(path, state, next_step, trainer)


def conditions() -> dict[str, Any]:
    """What a resumed run must share with the one before to be bit-exact: versions, processor, threads, affinity (numerics 35)."""
    cpu = environment.cpu()
    return {
        "versions": environment.versions(), "cpu": cpu["model"], "affinity": cpu["affinity"], "variables": environment.variables(),
    }  # fmt: skip


def differences(framework: str, resumed: Resumed) -> list[str]:
    """Why going on from this checkpoint cannot be bit-exact: one line a reason, none when it is."""
    before, now = resumed.notes.get("conditions"), conditions()
    if resumed.notes.get("framework") != framework:
        return [f"the run was in {resumed.notes.get('framework')}, it goes on in {framework}"]
    if not isinstance(before, dict):
        return ["the checkpoint does not say under what conditions it was made"]
    return [f"{name}: {before.get(name)} before, {now[name]} now" for name in now if before.get(name) != now[name]]
