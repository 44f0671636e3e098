"""The training loop: batches of the sampling plan through a room's pipeline into its native step, metrics as they come."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors.numpy import save_file

from triptych.core import catalog, checkpoint, contract, environment, initialize, recipe
from triptych.core.contract import Model, Trainer, TrainingState
from triptych.core.difference import sketch
from triptych.core.errors import InputRefused, Interrupted, TriptychError, UsageError
from triptych.core.initialize import Weights
from triptych.core.preprocess import NO_TRANSFORMS
from triptych.core.sampling import SamplingPlan, in_order
from triptych.core.spec import Spec
from triptych.data import Source
from triptych.training.checkpoints import Checkpoints, Resumed, differences, load, newest
from triptych.training.job import Job

PREDICT_BATCH = 256
METRICS = "metrics.jsonl"
Progress = Callable[[int, int, float], None]


@dataclass(slots=True)
class Run:
    """A run on its way: what it trains on, and what it has seen so far."""

    job: Job
    framework: str
    room: Any
    spec: Spec
    train: Source
    test: Source
    out: Path
    checkpoints: Checkpoints
    progress: Progress
    stopping: Callable[[], bool]
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    sketches: Weights = field(default_factory=dict)
    stopped: str | None = None
    began: float = field(default_factory=time.perf_counter)

    def plan(self, image_size: int) -> SamplingPlan:
        """The sampling plan at one image size; the order and the random numbers of samples are the same at all."""
        job = self.job
        return SamplingPlan(
            self.train.labels, self.spec.num_classes, job.recipe.global_batch_size, job.recipe.seed, job.transforms, image_size, job.uneven
        )

    @property
    def steps(self) -> int:
        """How many steps the run takes, limits considered."""
        return min(self.job.steps, self.job.limits.steps if self.job.limits.steps is not None else self.job.steps)

    def learning_rate(self, step: int) -> float:
        """The rate of a step, which for the plateau schedule depends on the evaluations so far."""
        schedule = self.job.recipe.schedule
        reductions = 0
        if schedule.kind == "plateau":
            reductions = recipe.plateau_reductions(schedule, [row["loss"] for row in self.evaluations])
        return recipe.learning_rate(schedule, step, reductions)


def train(
    job: Job, framework: str, out: Path, progress: Progress = lambda step, steps, loss: None, *, resume: str = "never",
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:  # fmt: skip
    """Train, evaluate on the test split, save `checkpoint/`, `metrics.jsonl` and `result.json` into `out`; returns the result.

    `resume` is "never", "auto" (go on from the newest good checkpoint in `out`, whichever framework wrote it; from the start when there is
    none) or the path of a checkpoint. When `stopping()` says so, the step is finished, the state saved, and Interrupted raised.
    Raises UsageError or InputRefused before the first step when model and data do not fit.
    """
    out.mkdir(parents=True, exist_ok=True)
    source, test = job.source("train"), job.source("test")
    spec = job.spec(source)
    room = contract.load(framework)
    source, test = _limited(job, source, test)
    run = Run(
        job, framework, room, spec, in_memory(source, spec.in_channels), in_memory(test, spec.in_channels), out,
        Checkpoints(out, source.classes, keep_last=job.intervals.keep_last, keep_best=job.intervals.keep_best), progress, stopping,
    )  # fmt: skip
    started = time.perf_counter()
    try:
        final = _steps(run, _resumed(run, resume))
    finally:
        run.checkpoints.close()
    seconds = time.perf_counter() - started
    # The moving average, when there is one, is the trained model; a training state belongs beside the weights it goes on from.
    weights, state = (final.ema, None) if final.ema else (final.weights, final)
    judged = evaluate(room.create_model(spec, weights, precision=job.precision, device=job.device), room, run.test)
    checkpoint.save(
        out / "checkpoint", spec, weights, labels=source.classes, provenance=_provenance(job, framework), training=state,
        overwrite=resume != "never",
    )  # fmt: skip
    result = {
        "schema": 1, "framework": framework, "job": job.to_json(), "losses": run.losses, "correct": judged["correct"],
        "test_images": len(test), "test_accuracy": judged["correct"] / len(test), "test_loss": judged["loss"], "seconds": seconds,
        "train_images": len(source), "data_sha256": source.sha256(), "evaluations": run.evaluations, "stopped": run.stopped,
        "seed": job.recipe.seed, "epochs": len(run.losses) / run.plan(spec.image_size).steps_per_epoch,
        "versions": room.versions(), "environment": environment.environment(),
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    return result


def in_memory(source: Source, channels: int) -> Source:
    """The source with its images decoded into one array, when they share a size and fit; else as it is, to be streamed."""
    try:
        images, labels = source.arrays(channels)
    except InputRefused:
        return source
    return dataclasses.replace(source, images=images, labels=labels)


def _limited(job: Job, source: Source, test: Source) -> tuple[Source, Source]:
    """Training and test images under the job's limits: evenly spaced ones, so that sorted sets still show every class."""
    limits, size = job.limits, job.recipe.global_batch_size
    if limits.overfit_batches is not None:
        few = source.take(limits.overfit_batches * size)
        return few, few
    if limits.batches is not None:
        return source.take(limits.batches * size), test.take(limits.batches * PREDICT_BATCH)
    return source, test


def _initial_weights(job: Job, spec: Spec) -> Weights:
    """From the seed, or from a checkpoint; a new head is as the seed makes it. InputRefused for a checkpoint of another model."""
    weights = initialize.initial_weights(spec, job.recipe.seed, job.precision)
    if job.start_from is not None:
        loaded = checkpoint.load(job.start_from, precision=job.precision)
        kept = [tensor.name for tensor in spec.tensors() if not (job.new_head and tensor.layer == spec.head)]
        given = {**weights, **{name: loaded.weights[name] for name in kept if name in loaded.weights}} if job.new_head else loaded.weights
        checkpoint.validate(spec, given, job.start_from)
        weights = dict(given)
    if job.perturbation is not None:
        weights = initialize.one_ulp_away(spec, weights, job.perturbation)
    return weights


def phases(job: Job, spec: Spec, steps: int) -> Iterator[tuple[int, int, Spec]]:
    """(first step, stop, spec) of each image size that a run goes through. UsageError unless the first begins at step 0."""
    sizes = job.progressive or ((0, spec.image_size),)
    starts = [start for start, _ in sizes]
    if starts[0] != 0 or starts != sorted(set(starts)):
        raise UsageError(f"progressive={list(sizes)} must be (first step, image size) pairs in order, the first at step 0")
    for (start, size), stop in zip(sizes, [*starts[1:], steps], strict=True):
        if start < steps:
            yield start, min(stop, steps), catalog.with_options(spec, image_size=size) if size != spec.image_size else spec


def _resumed(run: Run, resume: str) -> Resumed | None:
    """Where to go on, or None for the start; what the metrics hold from there on is dropped."""
    found = None if resume == "never" else newest(run.out) if resume == "auto" else load(Path(resume))
    if found is None:
        (run.out / METRICS).write_text("")
        return None
    reasons = differences(run.framework, found)
    if reasons:
        warnings.warn(f"going on from {found.path.name}, not bit for bit: {'; '.join(reasons)}", stacklevel=2)
    rows = [row for row in read_metrics(run.out / METRICS) if row["step"] < found.next_step]
    run.losses = [row["loss"] for row in rows if "loss" in row]
    run.evaluations = list(found.notes.get("evaluations", []))
    run.checkpoints.forget_after(found.next_step)
    partial = run.out / f".{METRICS}.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(run.out / METRICS)
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _steps(run: Run, resumed: Resumed | None) -> TrainingState:
    """All steps; at a change of image size a new model takes over the whole state. Returns the final state."""
    job, state, done = run.job, None if resumed is None else resumed.state, 0 if resumed is None else resumed.next_step
    weights = _initial_weights(job, run.spec) if state is None else dict(state.weights)
    with (run.out / METRICS).open("a", buffering=1) as metrics:
        for start, stop, spec in phases(job, run.spec, run.steps):
            if stop <= done or run.stopped is not None:
                continue
            model = run.room.create_model(spec, weights, precision=job.precision, device=job.device)
            trainer: Trainer = run.room.create_trainer(model, job.recipe, job.execution)
            if state is not None:
                trainer.load_state(state)
            _phase(run, trainer, range(max(start, done), stop), metrics)
            state = trainer.state()
            weights = dict(state.weights)
    if run.sketches:
        save_file(run.sketches, run.out / "sketches.safetensors")
    if state is None:
        raise UsageError(f"a run of {run.steps} steps trains nothing; give epochs, steps or limits that come to one step or more")
    return state


def _phase(run: Run, trainer: Trainer, steps: range, metrics: TextIO) -> None:
    job, spec = run.job, trainer.model.spec
    plan = run.plan(spec.image_size)
    made = run.room.batches(run.train, plan.batches(steps.start, steps.stop), spec.preprocessing, job.transforms, job.loader)
    began, waited = time.perf_counter(), 0.0
    for step in steps:
        asked = time.perf_counter()
        images, targets = next(made)
        waited += time.perf_counter() - asked
        rate = run.learning_rate(step)
        loss = trainer.step(images.astype(job.precision, copy=False), targets, rate)
        _check_finite(loss, plan, step)
        run.losses.append(loss)
        elapsed = time.perf_counter() - began
        speed = (step + 1 - steps.start) * len(images) / elapsed
        row = {"step": step, "epoch": plan.epoch(step), "loss": loss, "learning_rate": rate}
        metrics.write(json.dumps({**row, "images_per_second": speed, "data_wait": waited / elapsed}) + "\n")
        if job.keep_sketches:
            run.sketches |= {f"{step}/{name}": sketch(value) for name, value in trainer.view().weights.items() if value.dtype != np.int64}
        if _due(job.intervals.evaluate, step):
            run.evaluations.append({"step": step, **_evaluated(run, trainer.view())})
            metrics.write(json.dumps({"step": step, "evaluation": run.evaluations[-1]}) + "\n")
        run.progress(step + 1, run.steps, loss)
        interrupted = run.stopping()
        if interrupted or _due(job.intervals.checkpoint, step):
            _save(run, trainer, step)
        if interrupted:
            run.checkpoints.wait()
            raise Interrupted(f"stopped after step {step + 1} of {run.steps}; the state is saved. Go on with --resume auto")
        if job.limits.seconds is not None and time.perf_counter() - run.began > job.limits.seconds:
            run.stopped = "seconds"
            return


def _due(interval: int | None, step: int) -> bool:
    return interval is not None and (step + 1) % interval == 0


def _save(run: Run, trainer: Trainer, step: int) -> None:
    notes = {
        "framework": run.framework, "evaluations": run.evaluations, "job": run.job.to_json(),
        "provenance": _provenance(run.job, run.framework), "epoch": run.plan(run.spec.image_size).epoch(step),
    }  # fmt: skip
    run.checkpoints.save(run.spec, trainer.state(), step + 1, notes)


def _check_finite(loss: float, plan: SamplingPlan, step: int) -> None:
    """TriptychError, naming the step and its samples, when the loss is not a number: nothing after it would be."""
    if not math.isfinite(loss):
        samples = plan.batch(step).indices.tolist()
        raise TriptychError(
            f"the loss of step {step} is {loss}; training cannot go on. Its samples are {samples}. "
            "Lower the learning rate, clip gradients, or look at these images"
        )


def _evaluated(run: Run, state: TrainingState) -> dict[str, Any]:
    weights = state.ema or state.weights
    model = run.room.create_model(run.spec, dict(weights), precision=run.job.precision, device=run.job.device)
    judged = evaluate(model, run.room, run.test)
    return {**judged, "accuracy": judged["correct"] / len(run.test)}


def evaluate(model: Model, room: Any, test: Source) -> dict[str, Any]:
    """How many test images the model classifies right in eval mode, and the mean cross entropy."""
    correct, total = 0, 0.0
    for images, targets in room.batches(test, in_order(test.labels, PREDICT_BATCH), model.spec.preprocessing, NO_TRANSFORMS):
        logits = np.asarray(model.predict(images.astype(model.precision, copy=False)), np.float64)
        correct += int((logits.argmax(axis=1) == targets).sum())
        shifted = logits - logits.max(axis=1, keepdims=True)
        total += float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(targets)), targets]).sum())
    return {"correct": correct, "loss": total / len(test)}


def _provenance(job: Job, framework: str) -> dict[str, Any]:
    return {"trained_in": framework, "data": Path(job.data).name, "steps": job.steps, "recipe": recipe.to_dict(job.recipe)}
