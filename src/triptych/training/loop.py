"""The training loop: batches of the sampling plan through a room's pipeline into its native step, metrics as they come."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core import catalog, checkpoint, contract, environment, initialize, recipe, tensor_file
from triptych.core.contract import Model, Trainer, TrainingState
from triptych.core.difference import sketch
from triptych.core.errors import InputRefused, Interrupted, StorageError, UsageError
from triptych.core.initialize import Weights
from triptych.core.preprocess import NO_TRANSFORMS
from triptych.core.sampling import SamplingPlan, in_order
from triptych.core.spec import ImageSpec, Spec
from triptych.data import Source
from triptych.training import guards
from triptych.training.checkpoints import Checkpoints, Resumed, differences, load, newest
from triptych.training.job import Job
from triptych.training.pace import Pace
from triptych.training.records import METRICS, read_metrics, storing, write_whole
from triptych.training.watch import Watcher

PREDICT_BATCH = 256
Progress = Callable[[dict[str, Any]], None]
"""Is told after each step: step (steps done), steps, loss, images_per_second, data_wait (share), seconds_left; or a `note`."""


@dataclass(slots=True)
class Run:
    """A run on its way: what it trains on, and what it has seen so far."""

    job: Job
    framework: str
    room: Any
    spec: ImageSpec
    train: Source
    test: Source
    out: Path
    checkpoints: Checkpoints
    progress: Progress
    stopping: Callable[[], bool]
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    sketches: Weights = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stopped: str | None = None
    judge: Model | None = None
    pace: Pace = field(default_factory=Pace)
    cpu_began: float = field(default_factory=time.process_time)
    before: tuple[float, float] = (0.0, 0.0)
    """Seconds, and CPU seconds, that the steps before this start took, when the run goes on from a checkpoint."""

    def plan(self, image_size: int) -> SamplingPlan:
        """The sampling plan at one image size; the order and the random numbers of samples are the same at all."""
        job = self.job
        return SamplingPlan(
            self.train.labels, self.spec.num_classes, job.recipe.global_batch_size, job.recipe.seed, job.transforms, image_size, job.uneven
        )

    @property
    def steps(self) -> int:
        """How many steps the run takes, limits considered."""
        return min(self.job.steps, self.job.limits.max_steps or self.job.steps)

    def learning_rate(self, step: int) -> float:
        """The rate of a step, which for the plateau schedule depends on the evaluations so far."""
        schedule = self.job.recipe.schedule
        reductions = 0
        if schedule.kind == "plateau":
            reductions = recipe.plateau_reductions(schedule, [row["loss"] for row in self.evaluations])
        return recipe.learning_rate(schedule, step, reductions)

    def judged(self, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """How these weights do on the test images; one model serves all evaluations, at the run's own image size."""
        if self.judge is None:
            self.judge = self.room.create_model(self.spec, weights, precision=self.job.precision, device=self.job.device)
        else:
            self.judge.load_weights(weights)
        found = evaluate(self.judge, self.room, self.test)
        return {**found, "accuracy": found["correct"] / len(self.test)}

    def took(self) -> dict[str, float]:
        """What the run has taken, evaluations included, and the time of all cores in it; of earlier starts the part that was not lost."""
        now = time.perf_counter() - self.pace.began, time.process_time() - self.cpu_began
        return {"seconds": self.before[0] + now[0], "cpu_seconds": self.before[1] + now[1]}

    def note(self, watcher: Watcher, step: int, text: str | None) -> None:
        """Say something that the user should know, and keep it in metrics and result."""
        if text is not None:
            self.notes.append(text)
            watcher.note(step, text)
            self.progress({"note": text})


def train(
    job: Job, framework: str, out: Path, progress: Progress = lambda told: None, *, resume: str = "never",
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:  # fmt: skip
    """Train, evaluate on the test split, save checkpoint, metrics, TensorBoard events and `result.json` into `out`; returns the result.

    `resume` is "never", "auto" (go on from the newest good checkpoint in `out`, whichever framework wrote it; from the start when there is
    none) or the path of a checkpoint. When `stopping()` says so, the step is finished, the state saved, and Interrupted raised.
    Raises UsageError or InputRefused before the first step when model and data do not fit, StorageError when something cannot be written.
    """
    with storing(out):
        out.mkdir(parents=True, exist_ok=True)
    source, test = job.source("train"), job.source("test")
    spec = job.spec(source)
    room = contract.load(framework)
    source, test = _limited(job, source, test)
    run = Run(
        job, framework, room, spec, in_memory(source, spec.in_channels), in_memory(test, spec.in_channels), out,
        Checkpoints(out, source.classes, keep_last=job.intervals.keep_last, keep_best=job.intervals.keep_best), progress, stopping,
    )  # fmt: skip
    found, rows = _resumed(run, resume)
    with Watcher(out, job.watch, room, 0 if found is None else found.next_step, rows) as watcher:
        try:
            final = _steps(run, found, watcher)
        finally:
            run.checkpoints.close()
        took = run.took()
        # The moving average, when there is one, is the trained model; a training state belongs beside the weights it goes on from.
        weights, state = (final.ema, None) if final.ema else (final.weights, final)
        judged = run.judged(weights)
        watcher.judged({"step": len(run.losses) - 1, **judged})
    checkpoint.save(
        out / "checkpoint", spec, weights, labels=source.classes, provenance=_provenance(job, framework), training=state,
        overwrite=resume != "never",
    )  # fmt: skip
    result = {
        "schema": 1, "framework": framework, "job": job.to_json(), "losses": run.losses, "correct": judged["correct"],
        "test_images": len(test), "test_accuracy": judged["accuracy"], "test_loss": judged["loss"], **took,
        "train_images": len(source), "data_sha256": source.sha256(), "evaluations": run.evaluations, "stopped": run.stopped,
        "seed": job.recipe.seed, "epochs": len(run.losses) / run.plan(spec.image_size).steps_per_epoch, **run.pace.overall(),
        "peak_memory_bytes": guards.peak_memory(), "notes": run.notes, "versions": room.versions(),
        "environment": environment.environment(),
    }  # fmt: skip
    write_whole(out / "result.json", json.dumps(result, indent=1, allow_nan=False))
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
    if limits.limit_batches is not None:
        return source.take(limits.limit_batches * size), test.take(limits.limit_batches * PREDICT_BATCH)
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


def phases(job: Job, spec: ImageSpec, steps: int) -> Iterator[tuple[int, int, Spec]]:
    """(first step, stop, spec) of each image size that a run goes through. UsageError unless the first begins at step 0."""
    sizes = job.progressive or ((0, spec.image_size),)
    starts = [start for start, _ in sizes]
    if starts[0] != 0 or starts != sorted(set(starts)):
        raise UsageError(f"progressive={list(sizes)} must be (first step, image size) pairs in order, the first at step 0")
    for (start, size), stop in zip(sizes, [*starts[1:], steps], strict=True):
        if start < steps:
            yield start, min(stop, steps), catalog.with_options(spec, image_size=size) if size != spec.image_size else spec


def _resumed(run: Run, resume: str) -> tuple[Resumed | None, list[dict[str, Any]]]:
    """Where to go on, and what the metrics hold of the steps before; (None, []) for the start."""
    found = None if resume == "never" else newest(run.out) if resume == "auto" else load(Path(resume))
    if found is None:
        return None, []
    if run.job.keep_sketches:
        raise UsageError(
            "keep_sketches holds what it keeps in memory: a resumed run would lack its first steps; train anew, --resume never"
        )
    reasons = differences(run.framework, found)
    if reasons:
        warnings.warn(f"going on from {found.path.name}, not bit for bit: {'; '.join(reasons)}", stacklevel=2)
    rows = [row for row in read_metrics(run.out / METRICS) if row["step"] < found.next_step]
    run.losses = [row["loss"] for row in rows if "loss" in row]
    run.notes = [row["note"] for row in rows if "note" in row]
    run.evaluations = list(found.notes.get("evaluations", []))
    run.before = found.notes.get("seconds", 0.0), found.notes.get("cpu_seconds", 0.0)
    run.checkpoints.forget_after(found.next_step)
    return found, rows


def _steps(run: Run, resumed: Resumed | None, watcher: Watcher) -> TrainingState:
    """All steps; at a change of image size a new model takes over the whole state. Returns the final state."""
    job, state, done = run.job, None if resumed is None else resumed.state, 0 if resumed is None else resumed.next_step
    weights = _initial_weights(job, run.spec) if state is None else dict(state.weights)
    for start, stop, spec in phases(job, run.spec, run.steps):
        if stop <= done or run.stopped is not None:
            continue
        model = run.room.create_model(spec, weights, precision=job.precision, device=job.device)
        if start <= done:
            run.note(watcher, done, guards.half_precision(job.recipe, model.device))
        trainer: Trainer = run.room.create_trainer(model, job.recipe, job.execution)
        if state is not None:
            trainer.load_state(state)
        _phase(run, trainer, range(max(start, done), stop), watcher)
        state = trainer.state()
        weights = dict(state.weights)
    if run.sketches:
        write_whole(run.out / "sketches.safetensors", tensor_file.encode(run.sketches))
    if state is None:
        raise UsageError(f"a run of {run.steps} steps trains nothing; give epochs, steps or limits that come to one step or more")
    return state


def _phase(run: Run, trainer: Trainer, steps: range, watcher: Watcher) -> None:
    """The steps at one image size."""
    job, spec = run.job, catalog.fed_by_images(trainer.model.spec)
    plan = run.plan(spec.image_size)
    made = run.room.batches(run.train, plan.batches(steps.start, steps.stop), spec.preprocessing, job.transforms, job.loader)
    # A cache in memory fills during the first epoch.
    memory = guards.MemoryGuard(guards.SETTLING + (plan.steps_per_epoch if job.loader.cache == "memory" else 0))
    for step in steps:
        images, targets = run.pace.batch(made)
        watcher.before(step, images, spec.preprocessing)
        rate = run.learning_rate(step)
        with guards.memory_advice(job.recipe):
            loss = trainer.step(images.astype(job.precision, copy=False), targets, rate)
        run.pace.done(len(images))
        if not math.isfinite(loss):
            with contextlib.suppress(StorageError):  # the checkpoint before is as good
                run.checkpoints.wait()
            raise guards.not_finite(run.out, job, run.framework, plan.batch(step), images, loss, rate)
        run.losses.append(loss)
        scale = {} if job.recipe.loss_scaling is None else {"loss_scale": trainer.view().loss_scale}
        watcher.step({"step": step, "epoch": plan.epoch(step), "loss": loss, "learning_rate": rate, **run.pace.now(), **scale})
        if job.keep_sketches:
            run.sketches |= {f"{step}/{name}": sketch(value) for name, value in trainer.view().weights.items() if value.dtype != np.int64}
        if _due(job.intervals.evaluate, step):
            state = trainer.view()
            run.evaluations.append({"step": step, **run.judged(dict(state.ema or state.weights))})
            watcher.evaluation(run.evaluations[-1], state.weights)
        run.note(watcher, step, memory.after_step())
        left = run.pace.left(run.steps - step - 1)
        run.progress({"step": step + 1, "steps": run.steps, "loss": loss, **run.pace.now(), "seconds_left": left})
        if _ends(run, trainer, step):
            return


def _ends(run: Run, trainer: Trainer, step: int) -> bool:
    """Save when it is time to; whether the run is out of time. Raises Interrupted, with the state saved, when it was asked to stop."""
    interrupted, limit = run.stopping(), run.job.limits.max_time
    if interrupted or _due(run.job.intervals.checkpoint, step):
        _save(run, trainer, step)
    if interrupted:
        run.checkpoints.wait()
        raise Interrupted(f"stopped after step {step + 1} of {run.steps}; the state is saved. Go on with --resume auto")
    if limit is not None and time.perf_counter() - run.pace.began > limit:
        run.stopped = "max_time"
    return run.stopped is not None


def _due(interval: int | None, step: int) -> bool:
    return interval is not None and (step + 1) % interval == 0


def _save(run: Run, trainer: Trainer, step: int) -> None:
    notes = {
        "framework": run.framework, "evaluations": run.evaluations, **run.took(), "job": run.job.to_json(),
        "provenance": _provenance(run.job, run.framework), "epoch": run.plan(run.spec.image_size).epoch(step),
    }  # fmt: skip
    run.checkpoints.save(run.spec, trainer.state(), step + 1, notes)


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
