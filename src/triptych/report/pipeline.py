"""Produce the evidence: prove, plant, train, each step in its own run directory, reused when nothing that matters has changed.

A step is found again by the hash of what it computes, of the code that computes it, of the library versions and of the processor.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core import catalog, contract, environment, tolerance
from triptych.core.errors import UsageError
from triptych.parity import certify, faults, planting
from triptych.parity.rungs import scaled_error
from triptych.report import gather
from triptych.report.evidence import Evidence, Run, Step, Training
from triptych.training.job import Job, standard_recipe
from triptych.training.worker import run_worker

PROVEN = "resnet50"
PLANTED = ("resnet20", "resnet50")
TRAINED = "resnet20"
CODE = ("core", "data", "in_pytorch", "in_tensorflow", "in_jax", "parity", "training")
"""The parts of the package whose change makes a recorded run stale."""

FULL = {"epochs": 12, "batch_size": 64, "peak": 0.1, "precision": "float32"}
SHORT = {"epochs": 1, "batch_size": 64, "peak": 0.1, "precision": "float64"}

Progress = Callable[[str], None]


@dataclass(slots=True)
class Pipeline:
    """Where runs are kept, what was done, and how to say so."""

    runs: Path
    fresh: bool = False
    progress: Progress = lambda text: None
    steps: list[Step] = field(default_factory=list)

    def step(self, name: str, command: str, what: Any, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The result of `make(directory)`, from its run directory when one with the same hashes is complete."""
        directory = self.runs / f"{name}-{_digest(what)}"
        result = directory / "step.json"
        if result.exists() and not self.fresh:
            self.steps.append(Step(name, True, command=command))
            self.progress(f"{name}: reused")
            return dict(json.loads(result.read_text()))
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        self.progress(f"{name}: {command}")
        started = time.perf_counter()
        made = make(directory)
        result.write_text(json.dumps(made, allow_nan=False))
        self.steps.append(Step(name, False, time.perf_counter() - started, command))
        return made


def _digest(what: Any) -> str:
    """The hash of a step: what it computes, the code, the libraries, the processor."""
    versions = environment.versions()
    basis = [what, environment.code_hash(*CODE), versions, environment.cpu()]
    return hashlib.sha256(json.dumps(basis, sort_keys=True, default=str).encode()).hexdigest()[:16]


def evidence(pipeline: Pipeline) -> Evidence:
    """Run or reuse every step. UsageError unless two frameworks or more are installed."""
    frameworks = tuple(contract.installed())
    if len(frameworks) < 2:
        raise UsageError(
            f"a report compares frameworks; installed: {', '.join(frameworks) or 'none'}. Install them with: pip install 'triptych[all]'"
        )
    certificate = _certificate(pipeline, frameworks)
    tables = tuple(gather.fault_table(_planted(pipeline, name, frameworks)) for name in PLANTED)
    short = _training(pipeline, "short_training", SHORT, frameworks, sketches=True)
    full = _training(pipeline, "training", FULL, frameworks, sketches=False)
    return Evidence(
        **gather.static(), certificates=(gather.certificate(certificate),), training=full, short_training=short, faults=tables,
        commands=_commands(), steps=tuple(pipeline.steps), created=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )  # fmt: skip


def _commands() -> dict[str, str]:
    return {
        **gather.COMMANDS,
        "report": "triptych report",
        "parity": f"triptych parity {PROVEN}",
        "faults": f"triptych parity {PLANTED[0]} --fault all",
        "training": _train_command(FULL),
        "short_training": _train_command(SHORT),
    }


def _train_command(settings: dict[str, Any]) -> str:
    flags = " ".join(
        f"--{flag} {settings[key]}"
        for flag, key in (("epochs", "epochs"), ("batch-size", "batch_size"), ("learning-rate", "peak"), ("precision", "precision"))
    )
    return f"triptych train {TRAINED} --framework all --data digits {flags} --out RUN"


def _certificate(pipeline: Pipeline, frameworks: tuple[str, ...]) -> dict[str, Any]:
    def make(directory: Path) -> dict[str, Any]:
        spec = catalog.get_spec(PROVEN)
        return certify.certify(PROVEN, spec, None, frameworks, contract.PRECISIONS[::-1], "cpu", directory, pipeline.progress)

    return pipeline.step("parity", f"triptych parity {PROVEN}", ["parity", PROVEN, frameworks, tolerance.noise_table()], make)


def _planted(pipeline: Pipeline, model: str, frameworks: tuple[str, ...]) -> dict[str, Any]:
    spec = catalog.tiny(catalog.get_spec(model))
    names = tuple(faults.expressible(spec)[0])

    def make(directory: Path) -> dict[str, Any]:
        return planting.plant_all(spec, names, frameworks, directory, pipeline.progress)

    return pipeline.step(f"faults-{model}", f"triptych parity {model} --fault all", ["faults", model, names, frameworks], make)


def _training(pipeline: Pipeline, name: str, settings: dict[str, Any], frameworks: tuple[str, ...], *, sketches: bool) -> Training:
    job = _job(settings, sketches)
    names = [*frameworks, *([f"{frameworks[0]}-one-ulp"] if sketches else [])]

    def make(directory: Path) -> dict[str, Any]:
        for framework in frameworks:
            run_worker(job, framework, directory, pipeline.progress)
        if sketches:
            run_worker(_perturbed(job), frameworks[0], directory / "one-ulp", pipeline.progress)
            (directory / "one-ulp" / frameworks[0]).rename(directory / names[-1])
        return {"runs": [json.loads((directory / each / "result.json").read_text()) for each in names], "apart": _apart(directory, names)}

    made = pipeline.step(name, _train_command(settings), [name, job.to_json(), frameworks], make)
    return _as_evidence(job, made, frameworks)


def _job(settings: dict[str, Any], sketches: bool) -> Job:
    source = Job(TRAINED, "digits", standard_recipe(samples=1, epochs=1, batch_size=1, peak=0.1)[0], 1).source("train")
    recipe, steps = standard_recipe(
        samples=len(source), epochs=settings["epochs"], batch_size=settings["batch_size"], peak=settings["peak"]
    )
    return Job(TRAINED, "digits", recipe, steps, settings["precision"], keep_sketches=sketches)


def _perturbed(job: Job) -> Job:
    return Job.from_json({**job.to_json(), "perturbation": 0})


def _apart(directory: Path, names: list[str]) -> dict[str, list[float]]:
    """Per pair of runs, how far their weights are apart after each step; empty without sketches."""
    from safetensors.numpy import load_file

    held = {
        name: load_file(directory / name / "sketches.safetensors") for name in names if (directory / name / "sketches.safetensors").exists()
    }
    return {f"{a} / {b}": _weight_difference(held[a], held[b]) for a, b in itertools.combinations(held, 2)}


def _weight_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[float]:
    by_step: dict[int, float] = {}
    for key, value in a.items():
        step = int(key.partition("/")[0])
        by_step[step] = max(by_step.get(step, 0.0), scaled_error(value, b[key]))
    return [by_step[step] for step in sorted(by_step)]


def _as_evidence(job: Job, made: dict[str, Any], frameworks: tuple[str, ...]) -> Training:
    runs = made["runs"][: len(frameworks)]
    losses = {run["framework"]: run["losses"] for run in runs}
    pairs = list(itertools.combinations(frameworks, 2))
    perturbed = made["runs"][len(frameworks)]["losses"] if len(made["runs"]) > len(frameworks) else None
    itself = f"{frameworks[0]} / {frameworks[0]}-one-ulp"
    return Training(
        model=job.model, dataset="the embedded digits", precision=job.precision, recipe=job.to_json()["recipe"],
        runs=tuple(_run(run) for run in runs),
        loss_difference={f"{a} / {b}": _difference(losses[a], losses[b]) for a, b in pairs},
        loss_self=_difference(losses[frameworks[0]], perturbed) if perturbed else (),
        weight_difference={f"{a} / {b}": tuple(made["apart"][f"{a} / {b}"]) for a, b in pairs if f"{a} / {b}" in made["apart"]},
        weight_self=tuple(made["apart"].get(itself, ())),
    )  # fmt: skip


def _run(result: dict[str, Any]) -> Run:
    return Run(
        result["framework"], tuple(result["losses"]), result["correct"], result["test_images"], result["seconds"], result["train_images"]
    )  # fmt: skip


def _difference(a: Iterable[float], b: Iterable[float]) -> tuple[float, ...]:
    return tuple(abs(x - y) for x, y in zip(a, b, strict=True))
