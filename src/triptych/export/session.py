"""From a model to verified artefacts: write, reload in its own runtime, compare; only what agrees takes its final name."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from triptych.core import environment, initialize, storage
from triptych.core.conversation import Asked, Failed, Process, available_threads, settings
from triptych.core.difference import magnitude, scaled_error
from triptych.core.errors import ExportFailed, InputRefused, TriptychError, UsageError
from triptych.core.spec import ImageSpec, to_dict
from triptych.core.tolerance import EXPORTED
from triptych.data import fitting
from triptych.export import images, record
from triptych.export.converters import CONVERTERS
from triptych.export.matrix import FORMATS, Cell

LIMIT_SECONDS = 3600.0
CALLS = 20
"""Timed calls of one batch, whose median is told."""
VERIFIED, CALIBRATION = "verified", "calibration"
"""The working folders of images."""
FILES = frozenset({record.NAME, "model.bin", *(row.file for row in FORMATS.values())})
Progress = Callable[[str], None]
Start = Callable[[str, Path], Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What is exported: a model with its weights (None: parity weights of seed 0, calibrated on the images), and to where.

    It is verified on the test images of `data`, and ranges of int8 are taken from `calibration_images` of the training images of
    `calibration`; each stands in for the other, and the embedded digits for both. `limit` is how many images the classes are compared on.
    """

    spec: ImageSpec
    weights: Mapping[str, np.ndarray] | None
    cells: tuple[Cell, ...]
    out: Path
    data: str | None = None
    overwrite: bool = False
    command: str = ""
    labels: tuple[str, ...] | None = None
    calibration: str | None = None
    calibration_images: int = images.CALIBRATION
    limit: int | None = None
    optional_calibration: bool = False
    """Whether a format is merely not there, for lack of images to calibrate it on; else that is an error."""

    @property
    def verified_on(self) -> str | None:
        """The set whose test images are taken."""
        return self.data or self.calibration

    def count(self, cell: Cell) -> int:
        """On how many images at most an artefact names its classes."""
        rounded = FORMATS[cell.format].bound != "float32"
        return self.limit or (images.most(self.spec) if rounded and self.verified_on else images.COUNT)


def process(role: str, log: Path) -> Process:
    """A fresh process of a framework, a runtime or a converter, with as many threads as were set, or as it may use cores."""
    given = settings(available_threads(), log.parent / "cache")
    command = CONVERTERS[role].command() if role in CONVERTERS else ()
    return Process(role, log, given, [], LIMIT_SECONDS, command, module="triptych.export.worker")


@dataclass(slots=True)
class Desk:
    """Where a run keeps its working files, and whom it asks: one process a source framework, a fresh one for everything else."""

    folder: Path
    start: Start
    sources: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    number: int = 0
    labels: np.ndarray | None = None
    """The classes of the images verified on, where they are the model's."""
    calibration: dict[str, Any] | None = None
    """What the record says of the images calibrated on."""
    uncalibrated: str | None = None
    """Why nothing can be calibrated."""

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

    def keep(self, name: str, encoded: Sequence[bytes]) -> None:
        """A folder of images."""
        self.path(name).mkdir()
        for number, data in enumerate(encoded):
            (self.path(name) / f"{number:06d}").write_bytes(data)


def run(request: Request, progress: Progress, start: Start = process) -> list[dict[str, Any]]:
    """A row for each cell, in order: what was written and verified, or why it was not. Raises StorageError, InputRefused.

    A cell whose libraries are not installed is `unavailable`, one that failed has a `failure`; neither leaves anything in `out`.
    UsageError for images that the model cannot be calibrated on.
    """
    source, encoded = images.encoded(request.verified_on, request.spec.in_channels, max(map(request.count, request.cells)))
    with tempfile.TemporaryDirectory(prefix="triptych-export-") as folder:
        desk = Desk(Path(folder), start)
        desk.keep(VERIFIED, encoded)
        if request.weights is not None:
            with contextlib.suppress(UsageError):
                desk.labels = fitting.fitted(source, request.spec, request.labels).labels
        if any(FORMATS[cell.format].calibration for cell in request.cells):
            _keep_calibration(desk, request, encoded)
        storage.make_directory(request.out)
        told = images.told(source, encoded)
        rows = []
        try:
            for cell in request.cells:
                progress(cell.name)
                rows.append(_row(desk, request, cell, told))
        finally:
            for worker in desk.sources.values():
                worker.stop()
    return rows


def _keep_calibration(desk: Desk, request: Request, verified: Sequence[bytes]) -> None:
    try:
        data, trained = request.calibration or request.data, request.weights is not None
        source = images.training(data, request.spec, request.labels, trained)
        chosen = images.calibration(source, request.spec.in_channels, request.calibration_images, set(verified))
    except (UsageError, InputRefused) as error:
        if not request.optional_calibration:
            raise
        desk.uncalibrated = str(error)
        return
    desk.keep(CALIBRATION, chosen)
    desk.calibration = {**images.told(source, chosen), "split": source.split, "order": images.ORDER}


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
        "layout": cell.layout, "failure": None, "unavailable": cell.missing() or _uncalibrated(desk, cell), "worst_error": None,
        "tolerance": EXPORTED[FORMATS[cell.format].bound],
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


def _uncalibrated(desk: Desk, cell: Cell) -> str | None:
    return desk.uncalibrated if FORMATS[cell.format].calibration else None


def _fill(desk: Desk, request: Request, cell: Cell, partial: Path, row: dict[str, Any], told: Mapping[str, Any]) -> None:
    """Write the artefact into a directory that has no name yet, verify it there, and put the record beside it."""
    artefact = partial / FORMATS[cell.format].file
    write(desk, request, cell, artefact)
    row["written_with"] = (
        desk.versions[cell.source] | desk.versions.get(cell.by or "", {}) | {name: metadata.version(name) for name in cell.needs}
    )
    row["files"] = record.listed(partial)
    row["bytes"] = sum(entry["size"] for entry in row["files"].values())
    if FORMATS[cell.format].calibration:
        row["calibration"] = {**(desk.calibration or {}), "method": FORMATS[cell.format].calibration}
    row |= verify(desk, cell, artefact, request.count(cell))
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
    calibrated: dict[str, Any] = {"calibration": _calibration(desk, cell.source)} if FORMATS[cell.format].calibration else {}
    if cell.via is None:
        source.ask("write", target=cell.format, path=str(artefact), **calibrated)
        return
    first = desk.path(f"{cell.source}-{cell.via}")
    if not first.exists():
        source.ask("write", target=cell.via, path=str(first))
    assert cell.by is not None, cell.name
    with desk.fresh(cell.by) as converter:
        desk.versions.setdefault(cell.by, converter.ask("start")["versions"])
        if calibrated:
            converter.ask("quantize", given=str(first), path=str(artefact), channels_first=cell.layout == "NCHW", **calibrated)
        else:
            converter.ask("convert", given=str(first), path=str(artefact))


def _calibration(desk: Desk, framework: str) -> str:
    """The images to calibrate on, as the source framework prepares them."""
    path = desk.path(f"{framework}.calibration")
    if not path.exists():
        desk.sources[framework].ask("calibration", folder=str(desk.path(CALIBRATION)), inputs=str(path))
    return str(path)


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
        "prepare", folder=str(desk.path(VERIFIED)), inputs=str(desk.path(f"{framework}.inputs")),
        outputs=str(desk.path(f"{framework}.outputs")),
        calibrated=None if request.weights is not None or calibrated.exists() else str(calibrated),
    )  # fmt: skip


# Verifying


def verify(desk: Desk, cell: Cell, artefact: Path, count: int) -> dict[str, Any]:
    """Reload in a fresh process of the runtime, run, and compare with the source's own outputs: errors, seconds, what was loaded.

    Classes are compared on the first `count` images.
    """
    outputs = desk.path(f"{cell.name}.outputs")
    inputs = str(desk.path(f"{cell.source}.inputs"))
    with desk.fresh(str(cell.runtime)) as runtime:
        started = runtime.ask("start")
        opened = runtime.ask("open", key=cell.name, artefact=str(artefact), channels_first=cell.layout == "NCHW")
        ran = runtime.ask("run", key=cell.name, inputs=inputs, outputs=str(outputs), count=count)
        latency = {str(batch): _timed(runtime, cell, inputs, batch) for batch in images.BATCHES}
    found = compared(load_file(desk.path(f"{cell.source}.outputs")), load_file(outputs), desk.labels)
    found |= served(desk, artefact) if cell.takes_files else {}
    bound = EXPORTED[FORMATS[cell.format].bound]
    passed = found["worst_error"] <= bound and found.get("serve_images", {"passed": True})["passed"]
    return {**found, "passed": bool(passed), **started, **opened, **ran, "latency": latency}


def compared(reference: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], labels: np.ndarray | None = None) -> dict[str, Any]:
    """Errors of each batch, the worst of them, and on how many images the first class is the same, and is the label."""
    errors = {batch: scaled_error(outputs[str(batch)], reference[str(batch)]) for batch in images.BATCHES}
    checks: list[dict[str, Any]] = [
        {"batch": batch, "scaled_error": error} | _sizes(outputs[str(batch)], reference[str(batch)]) for batch, error in errors.items()
    ]
    ours, theirs = outputs["all"], reference["all"][: len(outputs["all"])]
    same = int((ours.argmax(1) == theirs.argmax(1)).sum()) if ours.shape == theirs.shape else 0
    found = {"worst_error": max(errors.values()), "checks": checks, "same_class": same, "of_images": len(theirs)}
    return found if labels is None else {**found, **_accuracy(ours, theirs, labels[: len(theirs)])}


def _accuracy(ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """On what share of the images whose label is known the artefact names it, and the framework does; nothing where none is known."""
    known = labels >= 0
    if not known.any():
        return {}
    shares = {name: float((logits.argmax(1) == labels)[known].mean()) for name, logits in (("artefact", ours), ("source", theirs))}
    return {"accuracy": {"images": int(known.sum()), **shares}}


def _sizes(output: np.ndarray, value: np.ndarray) -> dict[str, Any]:
    """The largest difference, None where there is none or it is not finite, and the largest logit of the source."""
    found = magnitude(np.subtract(output, value, dtype=np.float64)) if output.shape == value.shape else math.nan
    return {"max_abs": found if math.isfinite(found) else None, "scale": magnitude(value)}


def served(desk: Desk, artefact: Path) -> dict[str, Any]:
    """`serve_images` on the bytes, against the preprocessing and the model outside of the graph: classes, and the error of their shares."""
    outputs = desk.path("served.outputs")
    names = [str(path) for path in sorted(desk.path(VERIFIED).iterdir())[: images.COUNT]]
    with desk.fresh("saved_model") as runtime:
        runtime.ask("serve", artefact=str(artefact), encoded=names, outputs=str(outputs))
    answer, logits = load_file(outputs), load_file(desk.path("tensorflow.outputs"))["all"][: len(names)]
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
    if cell.runtime != "onnxruntime" or FORMATS[cell.format].bound != "float32":
        return text
    reference = desk.path(f"{cell.source}.intermediates")
    with contextlib.suppress(Failed), desk.fresh("onnxruntime") as runtime:
        desk.sources[cell.source].ask("intermediates", path=str(reference))
        found = runtime.ask(
            "diverge", artefact=str(artefact), inputs=str(desk.path(f"{cell.source}.inputs")), reference=str(reference),
            channels_first=cell.layout == "NCHW",
        )["divergence"]  # fmt: skip
        if found:
            text += (
                f"; the first layer that differs is {found['layer']}, node {found['node']} ({found['operator']}), by {found['error']:.1e}"
            )
    return text
