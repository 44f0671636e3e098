"""From a model to verified artefacts: write, reload in its own runtime, compare; only what agrees takes its final name."""

from __future__ import annotations

import contextlib
import hashlib
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from triptych.core import environment, initialize, storage
from triptych.core.conversation import Asked, Failed, Process, available_threads, settings
from triptych.core.difference import magnitude, scaled_error
from triptych.core.errors import ExportFailed, TriptychError
from triptych.core.spec import ImageSpec, to_dict
from triptych.core.tolerance import EXPORTED
from triptych.export import images, record
from triptych.export.matrix import FORMATS, Cell

LIMIT_SECONDS = 3600.0
CALLS = 20
"""Timed calls of one batch, whose median is told."""
FILES = frozenset({record.NAME, "model.bin", *(row.file for row in FORMATS.values())})
Progress = Callable[[str], None]
Start = Callable[[str, Path], Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What is exported: a model with its weights (None: parity weights of seed 0, calibrated on the images), and to where."""

    spec: ImageSpec
    weights: Mapping[str, np.ndarray] | None
    cells: tuple[Cell, ...]
    out: Path
    data: str | None = None
    overwrite: bool = False
    command: str = ""


def process(role: str, log: Path) -> Process:
    """A fresh process of a framework or a runtime, with as many threads as were set, or as it may use cores."""
    given = settings(available_threads(), log.parent / "cache")
    return Process(role, log, given, [], LIMIT_SECONDS, module="triptych.export.worker")


@dataclass(slots=True)
class Desk:
    """Where a run keeps its working files, and whom it asks: one process a source framework, a fresh one for everything else."""

    folder: Path
    start: Start
    sources: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    number: int = 0

    @contextlib.contextmanager
    def fresh(self, role: str) -> Iterator[Asked]:
        """A process that ends with the block."""
        self.number += 1
        worker = self.start(role, self.folder / f"{self.number:02d}-{role}.log")
        try:
            yield worker
        finally:
            worker.stop()

    def path(self, name: str) -> Path:
        """A working file."""
        return self.folder / name


def run(request: Request, progress: Progress, start: Start = process) -> list[dict[str, Any]]:
    """A row for each cell, in order: what was written and verified, or why it was not. Raises StorageError, InputRefused.

    A cell whose libraries are not installed is `unavailable`, one that failed has a `failure`; neither leaves anything in `out`.
    """
    source, encoded = images.encoded(request.data, request.spec.in_channels)
    storage.make_directory(request.out)
    rows = []
    with tempfile.TemporaryDirectory(prefix="triptych-export-") as folder:
        desk = Desk(Path(folder), start)
        for number, data in enumerate(encoded):
            desk.path(f"{number}.image").write_bytes(data)
        told = {"data": source.name, "images": len(encoded), "images_sha256": hashlib.sha256(b"".join(encoded)).hexdigest()}
        try:
            for cell in request.cells:
                progress(cell.name)
                rows.append(_row(desk, request, cell, told))
        finally:
            for worker in desk.sources.values():
                worker.stop()
    return rows


def outcome(rows: list[dict[str, Any]]) -> TriptychError | None:
    """The error that a run ends with: ExportFailed when a cell failed; None when none did."""
    failed = [row for row in rows if row["failure"] is not None]
    if not failed:
        return None
    lines = [f"{row['source']}-{row['format']}: {row['failure']}" for row in failed]
    return ExportFailed(f"{len(failed)} of {len(rows)} export(s) failed, and left nothing:\n  " + "\n  ".join(lines))


def _row(desk: Desk, request: Request, cell: Cell, told: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "source": cell.source, "format": cell.format, "runtime": cell.runtime, "model": request.spec.name, "passed": False,
        "failure": None, "unavailable": cell.missing(), "worst_error": None, "tolerance": EXPORTED[FORMATS[cell.format].bound],
    }  # fmt: skip
    if row["unavailable"] is not None:
        return row
    target = request.out / cell.name
    try:
        with storage.new_directory(target, overwrite=request.overwrite, replaceable=FILES) as partial:
            _fill(desk, request, cell, partial, row, told)
    except (ExportFailed, Failed) as error:
        row |= {"passed": False, "failure": str(error)}
    return row


def _fill(desk: Desk, request: Request, cell: Cell, partial: Path, row: dict[str, Any], told: Mapping[str, Any]) -> None:
    """Write the artefact into a directory that has no name yet, verify it there, and put the record beside it."""
    artefact = partial / FORMATS[cell.format].file
    write(desk, request, cell, artefact)
    row["written_with"] = desk.versions[cell.source] | {name: metadata.version(name) for name in cell.needs}
    row["files"] = record.listed(partial)
    row["bytes"] = sum(entry["size"] for entry in row["files"].values())
    row |= verify(desk, cell, artefact)
    if not row["passed"]:
        raise ExportFailed(_why(desk, cell, artefact, row))
    used = desk.path("weights" if request.weights is not None else "calibrated")
    weights = {"weights_sha256": record.sha256(used)}
    kept = {"schema": record.SCHEMA, "command": request.command, **row, **told, **weights, "spec": to_dict(request.spec)}
    storage.write_file(partial / record.NAME, storage.json_bytes({**kept, "environment": environment.environment()}))


# Writing


def write(desk: Desk, request: Request, cell: Cell, artefact: Path) -> None:
    """Have the artefact written, where needed by way of another format. Raises Failed."""
    source = writer(desk, request, cell.source)
    if cell.via is None:
        source.ask("write", target=cell.format, path=str(artefact))
        return
    first = desk.path(f"{cell.source}-{cell.via}")
    if not first.exists():
        source.ask("write", target=cell.via, path=str(first))
    assert cell.by is not None, cell.name
    with desk.fresh(cell.by) as converter:
        converter.ask("convert", given=str(first), path=str(artefact))


def writer(desk: Desk, request: Request, framework: str) -> Asked:
    """The process of a source framework, which holds the model and has told its own outputs. Raises Failed."""
    if framework not in desk.sources:
        asked = desk.start(framework, desk.path(f"{framework}.log"))
        try:
            _prepare(desk, request, framework, asked)
        except Failed:
            asked.stop()
            raise
        desk.sources[framework] = asked
    worker: Asked = desk.sources[framework]
    return worker


def _prepare(desk: Desk, request: Request, framework: str, asked: Asked) -> None:
    """Give the process its model; the first one calibrates the weights that were not given, and all take those."""
    desk.versions[framework] = asked.ask("start")["versions"]
    given, calibrated = desk.path("weights"), desk.path("calibrated")
    if not given.exists():
        weights = initialize.parity_weights(request.spec, 0, "float32") if request.weights is None else request.weights
        save_file({name: np.asarray(value, order="C") for name, value in weights.items()}, given)
    asked.ask("load", described=to_dict(request.spec), weights=str(calibrated if calibrated.exists() else given))
    asked.ask(
        "prepare", encoded=_encoded(desk), inputs=str(desk.path(f"{framework}.inputs")), outputs=str(desk.path(f"{framework}.outputs")),
        calibrated=None if request.weights is not None or calibrated.exists() else str(calibrated),
    )  # fmt: skip


def _encoded(desk: Desk) -> list[str]:
    return [str(desk.path(f"{number}.image")) for number in range(len(list(desk.folder.glob("*.image"))))]


# Verifying


def verify(desk: Desk, cell: Cell, artefact: Path) -> dict[str, Any]:
    """Reload in a fresh process of the runtime, run, and compare with the source's own outputs: errors, seconds, what was loaded."""
    outputs = desk.path(f"{cell.name}.outputs")
    inputs = str(desk.path(f"{cell.source}.inputs"))
    with desk.fresh(str(cell.runtime)) as runtime:
        started = runtime.ask("start")
        opened = runtime.ask("open", key=cell.name, artefact=str(artefact), channels_first=cell.source == "pytorch")
        ran = runtime.ask("run", key=cell.name, inputs=inputs, outputs=str(outputs))
        latency = {str(batch): _timed(runtime, cell, inputs, batch) for batch in images.BATCHES}
    found = compared(load_file(desk.path(f"{cell.source}.outputs")), load_file(outputs))
    found |= served(desk, artefact) if cell.name == "tensorflow-saved_model" else {}
    bound = EXPORTED[FORMATS[cell.format].bound]
    passed = found["worst_error"] <= bound and found.get("serve_images", {"passed": True})["passed"]
    return {**found, "passed": bool(passed), **started, **opened, **ran, "latency": latency}


def compared(reference: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Errors of each batch, the worst of them, and on how many images the first class is the same."""
    errors = {batch: scaled_error(outputs[str(batch)], reference[str(batch)]) for batch in images.BATCHES}
    checks: list[dict[str, Any]] = [
        {"batch": batch, "scaled_error": error} | _sizes(outputs[str(batch)], reference[str(batch)]) for batch, error in errors.items()
    ]
    both = outputs["all"].shape == reference["all"].shape
    same = int((outputs["all"].argmax(1) == reference["all"].argmax(1)).sum()) if both else 0
    return {"worst_error": max(errors.values()), "checks": checks, "same_class": same, "of_images": len(reference["all"])}


def _sizes(output: np.ndarray, value: np.ndarray) -> dict[str, Any]:
    """The largest difference, None where there is none or it is not finite, and the largest logit of the source."""
    found = magnitude(np.subtract(output, value, dtype=np.float64)) if output.shape == value.shape else math.nan
    return {"max_abs": found if math.isfinite(found) else None, "scale": magnitude(value)}


def served(desk: Desk, artefact: Path) -> dict[str, Any]:
    """`serve_images` on the bytes, against the preprocessing and the model outside of the graph: classes, and the error of their shares."""
    outputs = desk.path("served.outputs")
    with desk.fresh("saved_model") as runtime:
        runtime.ask("serve", artefact=str(artefact), encoded=_encoded(desk), outputs=str(outputs))
    answer, logits = load_file(outputs), load_file(desk.path("tensorflow.outputs"))["all"]
    shares = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    error = scaled_error(answer["probabilities"], np.take_along_axis(shares, answer["classes"].astype(np.int64), 1))
    falling = -np.sort(-shares, axis=1)[:, : answer["classes"].shape[1]]
    error = max(error, scaled_error(answer["probabilities"], falling))
    bound = EXPORTED["float32"]
    return {"serve_images": {"worst_error": error, "tolerance": bound, "images": len(logits), "passed": bool(error <= bound)}}


def _timed(runtime: Asked, cell: Cell, inputs: str, batch: int) -> dict[str, Any]:
    seconds = runtime.ask("time", key=cell.name, inputs=inputs, batch=batch, calls=CALLS)["seconds"]
    return {"median_seconds": statistics.median(seconds), "calls": len(seconds)}


def _why(desk: Desk, cell: Cell, artefact: Path, row: Mapping[str, Any]) -> str:
    """What went wrong; of an ONNX file the first node that computes something else."""
    inside = row.get("serve_images", {"passed": True})
    if not inside["passed"]:
        return f"serve_images is {inside['worst_error']:.1e} from canonical preprocessing, more than {inside['tolerance']:.0e}"
    text = f"its logits in {cell.runtime} are {row['worst_error']:.1e} from those of {cell.source}, more than {row['tolerance']:.0e}"
    if cell.runtime != "onnxruntime":
        return text
    reference = desk.path(f"{cell.source}.intermediates")
    with contextlib.suppress(Failed), desk.fresh("onnxruntime") as runtime:
        desk.sources[cell.source].ask("intermediates", path=str(reference))
        found = runtime.ask(
            "diverge", artefact=str(artefact), inputs=str(desk.path(f"{cell.source}.inputs")), reference=str(reference),
            channels_first=cell.source == "pytorch",
        )["divergence"]  # fmt: skip
        if found:
            text += (
                f"; the first layer that differs is {found['layer']}, node {found['node']} ({found['operator']}), by {found['error']:.1e}"
            )
    return text
