"""`triptych profile`: one warmed step of each framework, each in a process of its own, and where its time went, side by side.

A profile is no benchmark: one step, slowed down by its tracing, of a model that need not be proven. `triptych bench` times.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from triptych.bench import perfetto, tracing
from triptych.bench.processes import chosen_cores
from triptych.bench.record import lines_of_code
from triptych.bench.suite import Case
from triptych.core import catalog, initialize
from triptych.core.contender import LANES, MODES
from triptych.core.contract import FRAMEWORKS
from triptych.core.conversation import Asked, Failed, Process, settings
from triptych.core.environment import environment
from triptych.core.errors import TriptychError, UsageError
from triptych.core.spec import Spec
from triptych.core.storage import make_directory, storing, write_whole

SCHEMA = 1
LIMIT_SECONDS = 1800.0
KEY, RECORD = "profiled", "profile.json"
Progress = Callable[[str], None]
Start = Callable[[str, Path], Asked]
"""Starts a framework's worker, with a file for its log."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is profiled. `data` None: images of random pixels; `threads` None: the cores there are; `repeats` steps are traced, one is
    kept."""

    model: str
    frameworks: tuple[str, ...]
    mode: str = "training_step"
    lane: str = "default"
    batch_size: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    threads: int | None = None
    repeats: int = 5

    def spec(self) -> Spec:
        """The spec. UsageError for what does not exist, data that do not fit, or a lane that no framework has."""
        for what, given, known in (("mode", self.mode, MODES), ("lane", self.lane, LANES)):
            if given not in known:
                raise UsageError(f"unknown {what} {given!r}; choose from {', '.join(known)}")
        spec = catalog.get_spec(self.model, **self.options)
        if self.data is not None:
            found = len(tracing.opened(self.data, spec))
            if found < self.batch_size:
                raise UsageError(f"{self.data} has {found} training images: give a --batch-size of no more")
        reasons = [self.case(name).unavailable() for name in self.frameworks]
        if all(reasons):
            raise UsageError(f"nothing to profile: {'; '.join(dict.fromkeys(filter(None, reasons)))}")
        return spec

    def case(self, framework: str) -> Case:
        """The request for one framework."""
        return Case(framework, self.model, dict(self.options), self.lane, self.mode, self.batch_size)


def run(request: Request, command: str, out: Path, progress: Progress, start: Start | None = None) -> dict[str, Any]:
    """The record, a row a framework, which is also `out/profile.json`; what fails is a row with its reason.

    Under `out`, too: `FRAMEWORK/trace.json.gz`, and all frameworks in one `trace.json.gz`, for ui.perfetto.dev; `FRAMEWORK/native/`, the
    trace as the framework's own profiler wrote it. UsageError for what cannot be executed, StorageError when nothing can be written.
    """
    spec = request.spec()
    threads, cores = chosen_cores(request.threads)
    make_directory(out)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        save_file(initialize.initial_weights(spec, 0), weights)

        def process(framework: str, log: Path) -> Asked:
            return Process(framework, log, settings(threads, Path(folder) / "compiled"), cores, LIMIT_SECONDS)

        rows = [_row(request, name, weights, out, progress, start or process) for name in request.frameworks]
    _merge([row for row in rows if "failure" not in row], out)
    made = {
        "schema": SCHEMA, "command": command, "environment": environment(), "model": spec.name, "image_size": spec.image_size,
        "mode": request.mode, "lane": request.lane, "batch_size": request.batch_size, "threads": threads, "rows": rows,
    }  # fmt: skip
    with storing(out / RECORD):
        write_whole(out / RECORD, json.dumps(made, indent=1, allow_nan=False) + "\n")
    return made


def _row(request: Request, framework: str, weights: Path, out: Path, progress: Progress, start: Start) -> dict[str, Any]:
    case, directory = request.case(framework), out / framework
    head = {"framework": framework, "lines_of_code": lines_of_code(framework)}
    reason = case.unavailable()
    if reason is not None:
        return {**head, "failure": reason, "unavailable": True}
    make_directory(directory)
    worker = start(framework, directory / "worker.log")
    try:
        progress(f"{framework}: import and first call")
        versions = worker.ask("start")["versions"]
        built = worker.ask("build", key=KEY, case=case.to_json(), given=str(weights), seed=0)
        progress(f"{framework}: {request.repeats} steps with the profiler, {request.repeats} without")
        given = {"data": request.data, "directory": str(directory), "repeats": request.repeats}
        found = worker.ask("trace", key=KEY, case=case.to_json(), **given)
    except Failed as error:
        return {**head, "failure": str(error), "unavailable": error.kind == "LaneMissing"}
    finally:
        if isinstance(worker, Process):
            worker.stop()
    overhead = float(np.median(found["traced_seconds"]) / np.median(found["untraced_seconds"]) - 1.0)
    told = {"versions": versions, "levers": built["levers"], "first_call_seconds": built["first_call_seconds"], "overhead": overhead}
    return {**head, **told, **found, "trace": f"{framework}/{tracing.TRACE}"}


def _merge(rows: list[dict[str, Any]], out: Path) -> None:
    """One file of all frameworks, a process each, whose steps begin at the same time."""
    events = []
    for process, row in enumerate(rows, start=1):
        events += [{**event, "pid": process} for event in perfetto.read(out / row["trace"])]
    if events:
        perfetto.write(out / tracing.TRACE, events)


def outcome(made: dict[str, Any]) -> TriptychError | None:
    """The error that a command ends with: that frameworks failed, or that none has the lane; None when all is well."""
    failed = [row for row in made["rows"] if "failure" in row]
    broken = [row for row in failed if not row["unavailable"]]
    if broken:
        lines = [f"{FRAMEWORKS[row['framework']].title}: {row['failure']}" for row in broken]
        return TriptychError(f"{len(broken)} framework(s) could not be profiled:\n  " + "\n  ".join(lines))
    if len(failed) == len(made["rows"]):
        return UsageError(f"nothing to profile: {'; '.join(row['failure'] for row in failed)}")
    return None
