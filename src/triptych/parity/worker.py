"""One framework's process: climb the ladder and stream what is seen into the run directory.

`python -m triptych.parity.worker RUN FRAMEWORK`. The run directory is the whole interface: a worker may as well be a
container or another machine that shares it. Globals of the framework (TF32, compilation cache) are set here, never in the library.
"""

from __future__ import annotations

import dataclasses
import functools
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from triptych.core import batch, contract, initialize
from triptych.core.contract import Model
from triptych.core.initialize import Weights
from triptych.parity import faults, pipeline, rungs
from triptych.parity import plan as plans
from triptych.parity.observation import Observation, ShardWriter, wait_until, write_json, write_tensors
from triptych.parity.plan import Plan
from triptych.parity.subject import Subject, calibrate
from triptych.parity.trajectory import FileTrajectory


def run(run_directory: Path, framework: str) -> None:
    """Climb as `plan.json` says, and leave `done.json` or `error.json`."""
    directory = run_directory / framework
    directory.mkdir(parents=True, exist_ok=True)
    try:
        plan, weights = plans.load(run_directory)
        writer = ShardWriter(directory)
        weights = _weights(run_directory, plan, framework, weights)
        summary = _climb(run_directory, plan, framework, weights, writer)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        writer.close({**summary, "versions": contract.load(framework).versions(), "device": plan.device, "peak_memory_bytes": peak})
    except BaseException as error:
        write_json(directory / "error.json", {"message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
        raise


def _weights(run_directory: Path, plan: Plan, framework: str, weights: Weights) -> Weights:
    """The plan's weights; parity weights first get running statistics from one float64 train-mode pass of the reference."""
    if not plan.calibrates:
        return weights
    path = run_directory / "weights.safetensors"
    if framework == plan.frameworks[0] and not path.exists():
        subject = Subject(framework, plan, weights, precision="float64")
        write_tensors(path, calibrate(subject, plans.forward_inputs(plan)))
    wait_until(path.exists)
    return load_file(path)


def _climb(run_directory: Path, plan: Plan, framework: str, weights: Weights, writer: ShardWriter) -> dict[str, object]:
    reference = framework == plan.frameworks[0] and not plan.faults
    readers = tuple(name for name in plan.frameworks if name != framework)
    trajectory = FileTrajectory(run_directory / plan.trajectory, framework, readers, replays=not reference, keep=plan.keep_trajectory)
    trajectory.before_wait = writer.flush
    if plan.faults:
        for observation in _faulty(plan, framework, weights, trajectory):
            writer.write(observation)
        return {"self_divergence": {}}
    subject = Subject(framework, plan, weights)
    if plan.data:
        subject.training_batch = _training_batches(run_directory, subject)
    for observation in rungs.climb(subject, trajectory, plan.rungs):
        writer.write(observation)
    writer.flush()
    trajectory.close()
    for observation in _context(subject, plan):
        writer.write(observation)
    runs = {kind: list(rungs.free_run(subject, kind, subject.weights)) for kind in plan.free} if 8 in plan.rungs else {}
    for kind, run in runs.items():
        for step, sketches in enumerate(run):
            for number, value in enumerate(sketches):
                writer.write(Observation(8, "free", f"{kind} sketch {number}", value, step))
    writer.flush()
    return {"self_divergence": {kind: rungs.self_divergence(subject, kind, run) for kind, run in runs.items()} if reference else {}}


def _training_batches(run_directory: Path, subject: Subject) -> pipeline.BatchOf:
    """The batches of the training rungs: made once, by the reference, and read by all."""
    path = run_directory / "batches.safetensors"
    if subject.framework == subject.plan.frameworks[0] and not path.exists():
        pipeline.write_batches(subject, path)
    wait_until(path.exists)
    return pipeline.read_batches(path)


def _context(subject: Subject, plan: Plan) -> Iterator[Observation]:
    """What stands beside the proof and does not decide it: AlgoPerf's setting in float32, and the fault table's yardstick."""
    if 3 not in plan.rungs:
        return
    if plan.float32_logits:
        yield float32_logits(Subject(subject.framework, plan, subject.weights, precision="float32"))
    if plan.precision == "float32":
        inputs = batch.cast(plans.forward_inputs(plan), "float32")
        model = subject.room.create_model(
            plan.spec, initialize.initial_weights(plan.spec, plan.seed), precision="float32", device=plan.device
        )
        logits = model.predict(inputs)
        yield Observation(3, "context", "random initialization", logits)
        # PyTorch runs the same kernels' two layouts on a CPU; where a framework, or an input, has one only, its noise is not measured.
        images = any(each.kind == "image" for each in plan.spec.inputs())
        other = getattr(model, "predict_channels_last", None) if images else None
        yield Observation(3, "context", "layout noise", np.asarray(np.abs(other(inputs) - logits).max() if other else -1.0))


def float32_logits(subject: Subject) -> Observation:
    """The field's customary check, for the fault table: eval-mode logits in float32."""
    inputs = batch.cast(plans.forward_inputs(subject.plan), "float32")
    return Observation(3, "context", "float32 logits", subject.model.predict(inputs))


def _faulty(plan: Plan, framework: str, weights: Weights, trajectory: FileTrajectory) -> Iterator[Observation]:
    """Each fault planted in turn in a fresh subject, climbed up to the rung that should catch it.

    Those that leave the model alone share one, which then needs to be traced and compiled but once; it begins each with the plan's weights.
    """
    shared: dict[str, Model] = {}

    def subject(fault: faults.Planted, precision: str) -> Subject:
        fresh = Subject(framework, plan, dict(weights), precision=precision)
        if not fault.leaves_model:
            return fresh
        if precision not in shared:
            shared[precision] = fresh.model
        shared[precision].load_weights(fresh.weights)
        return Subject(framework, plan, dict(weights), precision=precision, model=shared[precision])

    for name in plan.faults:
        fault = faults.find(name, plan.training_spec)
        for observation in _one_fault(fault, functools.partial(subject, fault), plan, trajectory):
            yield dataclasses.replace(observation, fault=name)


def _one_fault(fault: faults.Planted, create: Callable[[str], Subject], plan: Plan, trajectory: FileTrajectory) -> Iterator[Observation]:
    subject, rung = create(plan.precision), 1
    try:
        with fault.plant(subject):
            for rung in (r for r in plan.rungs if r <= fault.rung and r < 8 and not (r == 2 and fault.leaves_pipeline)):
                yield from rungs.climb(subject, trajectory, (rung,))
        single = create("float32")
        with fault.plant(single):
            yield float32_logits(single)
    except faults.LeftClean:
        return
    except Exception as error:
        # A fault may be so wrong that the framework refuses to compute: that, too, is a divergence, at this rung.
        yield Observation(rung, "exception", f"{type(error).__name__}: {str(error)[:200]}", np.zeros(1))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
