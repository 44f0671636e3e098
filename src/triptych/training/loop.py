"""The training loop: batches of the sampling plan through a room's pipeline into its native step, metrics as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from triptych.core import checkpoint, contract, environment, initialize, preprocess, recipe
from triptych.core.contract import Model, Trainer
from triptych.core.difference import sketch
from triptych.core.initialize import Weights
from triptych.core.spec import Spec
from triptych.data import Source
from triptych.training.job import Job

PREDICT_BATCH = 256
Progress = Callable[[int, int, float], None]


def train(job: Job, framework: str, out: Path, progress: Progress = lambda step, steps, loss: None) -> dict[str, Any]:
    """Train, evaluate on the test split, save `checkpoint/`, `metrics.jsonl` and `result.json` into `out`; returns the result.

    Raises UsageError or InputRefused before the first step when model and data do not fit.
    """
    out.mkdir(parents=True, exist_ok=True)
    source, test = job.source("train"), job.source("test")
    spec = job.spec(source)
    room = contract.load(framework)
    weights = initialize.initial_weights(spec, job.recipe.seed, job.precision)
    if job.perturbation is not None:
        weights = initialize.one_ulp_away(spec, weights, job.perturbation)
    model = room.create_model(spec, weights, precision=job.precision, device=job.device)
    trainer = room.create_trainer(model, job.recipe)
    started = time.perf_counter()
    losses = _steps(job, spec, room, trainer, source, out, progress)
    seconds = time.perf_counter() - started
    final = trainer.state()
    # The moving average, when there is one, is the trained model; a training state belongs beside the weights it goes on from.
    weights, state = (final.ema, None) if final.ema else (final.weights, final)
    model.load_weights(weights)
    correct = count_correct(model, room, spec, test)
    checkpoint.save(out / "checkpoint", spec, weights, labels=source.classes, provenance=_provenance(job, framework), training=state)
    result = {
        "schema": 1, "framework": framework, "job": job.to_json(), "losses": losses, "correct": correct, "test_images": len(test),
        "test_accuracy": correct / len(test), "seconds": seconds, "train_images": len(source), "data_sha256": source.sha256(),
        "versions": room.versions(), "environment": environment.environment(),
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    return result


def _steps(job: Job, spec: Spec, room: Any, trainer: Trainer, source: Source, out: Path, progress: Progress) -> list[float]:
    images, labels = source.arrays(spec.in_channels)
    order = preprocess.batch_indices(job.recipe.seed, len(images), job.recipe.global_batch_size, job.steps)
    losses: list[float] = []
    sketches: Weights = {}
    with (out / "metrics.jsonl").open("w", buffering=1) as metrics:
        for step, (batch, target) in enumerate(room.batches(images, labels, order, spec.preprocessing)):
            rate = recipe.learning_rate(job.recipe.schedule, step)
            losses.append(trainer.step(batch.astype(job.precision), target, rate))
            metrics.write(json.dumps({"step": step, "loss": losses[-1], "learning_rate": rate}) + "\n")
            if job.keep_sketches:
                sketches |= {f"{step}/{name}": sketch(value) for name, value in trainer.state().weights.items() if value.dtype != np.int64}
            progress(step + 1, job.steps, losses[-1])
    if sketches:
        save_file(sketches, out / "sketches.safetensors")
    return losses


def count_correct(model: Model, room: Any, spec: Spec, test: Source) -> int:
    """How many test images the model classifies right, in eval mode."""
    images, labels = test.arrays(spec.in_channels)
    chunks = [np.arange(i, min(i + PREDICT_BATCH, len(images))) for i in range(0, len(images), PREDICT_BATCH)]
    correct = 0
    for batch, target in room.batches(images, labels, chunks, spec.preprocessing):
        correct += int((model.predict(batch.astype(model.precision)).argmax(axis=1) == target).sum())
    return correct


def _provenance(job: Job, framework: str) -> dict[str, Any]:
    return {"trained_in": framework, "data": Path(job.data).name, "steps": job.steps, "recipe": recipe.to_dict(job.recipe)}
