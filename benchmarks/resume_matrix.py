"""A run begun in one framework and resumed in another, all ordered pairs, float64: what is loaded, the next step, and the drift.

    .venv/bin/python benchmarks/resume_matrix.py [--framework F] [--steps 10] [--set KEY=VALUE]

For each pair A, B: A takes `--steps` steps and saves, B goes on from there as `--resume` does. `state_bit_equal`: what B holds after
loading is what A saved, bit for bit, at the same place in the sampling plan. `first_step_error`: the largest scale-relative difference
between B's first step and A's own of that number, over loss, weights, statistics, momentum and average. `ratio`: how far B's steps stray
from those of A's uninterrupted run, over how far A strays from itself when its initial weights move by one unit in the last place
(the median of `--perturbations` runs), at the worst step; only steps where A is still near itself count, as on the ladder's rung 8.
Rows of frameworks that do not begin a run now are kept from the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import RESULTS, head, write_json

from triptych.core import contract, tolerance
from triptych.core.contract import TrainingState
from triptych.core.difference import NOTHING_IN_COMMON, scaled_error
from triptych.data import open_source
from triptych.parity.trajectory import flatten
from triptych.training import checkpoints, recipe_file
from triptych.training.checkpoints import Resumed
from triptych.training.job import Intervals, Job, Limits
from triptych.training.loop import train

COMMAND = "benchmarks/resume_matrix.py"
RECIPE = "digits_resnet20"
# Everything that has a state of its own, and a rate that moves at every step. No colour jitter, MixUp or other
# image size: pixels are float32 whatever the precision of the model, and sums of products round differently in each framework (by 1e-7).
SETTINGS = (
    "precision=float64", "device=cpu", "epochs=null", "global_batch_size=16", "micro_batch_size=5",
    "schedule.warmup_steps=4", "loss_scaling={initial: 64, interval: 3}", "transforms.jitter=null", "transforms.mixup=0",
)  # fmt: skip


def job_of(steps: int, overrides: Sequence[str]) -> Job:
    """The run of 2 x `steps` steps, saved after each step of its second half."""
    recipe = recipe_file.load(RECIPE, [*SETTINGS, f"steps={2 * steps}", *overrides])
    job = recipe.job(len(open_source(recipe.data, "train")))
    return dataclasses.replace(job, intervals=Intervals(checkpoint=1, keep_last=steps))


def after(out: Path, step: int) -> Resumed:
    """What a run saved after so many steps."""
    return checkpoints.load(out / checkpoints.STEPS / f"{step:06d}")


def drift(out: Path, base: Path, steps: int) -> list[float]:
    """How far the weights and statistics of one run are from those of another after each step of the second half."""
    pairs = [(after(out, step).state.weights, after(base, step).state.weights) for step in range(steps + 1, 2 * steps + 1)]
    return [max(scaled_error(mine[name], theirs[name]) for name in theirs if theirs[name].dtype != np.int64) for mine, theirs in pairs]


def difference(one: TrainingState, other: TrainingState) -> tuple[float, str]:
    """The largest scale-relative error of two states, and the tensor that has it."""
    a, b = flatten(one), flatten(other)
    if a.keys() != b.keys() or counts(one) != counts(other):
        return NOTHING_IN_COMMON, "which tensors there are, or a count"
    return max((scaled_error(a[name], b[name]), name) for name in a)


def counts(state: TrainingState) -> tuple[Any, ...]:
    """What of a state is no tensor."""
    return state.step, state.loss_scale, state.good_steps


def loads_bit_for_bit(job: Job, framework: str, saved: Resumed) -> bool:
    """Whether a trainer of this framework holds, after loading, every bit of what was saved."""
    room = contract.load(framework)
    model = room.create_model(job.spec(job.source("train")), dict(saved.state.weights), precision=job.precision, device=job.device)
    trainer = room.create_trainer(model, job.recipe, job.execution)
    trainer.load_state(saved.state)
    held, given = flatten(trainer.state()), flatten(saved.state)
    same = all(held[name].dtype == given[name].dtype and held[name].tobytes() == given[name].tobytes() for name in given)
    return held.keys() == given.keys() and counts(trainer.state()) == counts(saved.state) and same


@dataclasses.dataclass(frozen=True, slots=True)
class Begun:
    """Framework A's side: its uninterrupted run, its first half, and its curves of self-divergence over the second half."""

    whole: Path
    half: Path
    self_divergence: list[list[float]]


def begin(job: Job, steps: int, framework: str, perturbations: int, folder: Path) -> Begun:
    """Train all that a framework has to train alone."""
    whole, half = folder / "whole", folder / "half"
    train(job, framework, whole)
    train(dataclasses.replace(job, limits=Limits(max_steps=steps)), framework, half)
    curves = []
    for number in range(perturbations):
        sys.stderr.write(f"{framework}: one unit in the last place away, {number + 1} of {perturbations}\n")
        out = folder / f"moved-{number}"
        train(dataclasses.replace(job, perturbation=number), framework, out)
        curves.append(drift(out, whole, steps))
        shutil.rmtree(out)
    return Begun(whole, half, curves)


def resumed_in(job: Job, steps: int, first: str, second: str, begun: Begun, out: Path) -> dict[str, Any]:
    """The row of one pair. Losses, drift and self-divergence are those of the second half, step by step."""
    saved = after(begun.half, steps)
    equal = saved.next_step == steps and loads_bit_for_bit(job, second, saved)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "going on from")  # not bit for bit in another framework: that is what is measured
        losses = train(job, second, out, resume=str(saved.path))["losses"]
    own = json.loads((begun.whole / "result.json").read_text())["losses"][steps:]
    one, other = after(out, steps + 1), after(begun.whole, steps + 1)
    error, tensor = max(difference(one.state, other.state), (scaled_error(np.array(losses[:1]), np.array(own[:1])), "loss"))
    curve = drift(out, begun.whole, steps)
    typical = np.median(np.asarray(begun.self_divergence), axis=0).tolist()
    counted = [step for step, value in enumerate(typical) if 0.0 < value < tolerance.FREE_RUN_HORIZON]
    enough = len(counted) >= tolerance.FREE_RUN_MINIMUM_STEPS
    ratio = max(curve[step] / typical[step] for step in counted) if enough else None
    position = one.next_step == other.next_step == steps + 1
    passed = equal and position and error <= tolerance.STEP and ratio is not None and ratio <= tolerance.FREE_RUN_RATIO
    return {
        "from": first, "to": second, "state_bit_equal": equal, "first_step_error": error, "ratio": ratio, "passed": passed,
        "first_step_tensor": tensor, "position": saved.next_step, "steps": [steps, steps],
        "counted_steps": [steps + 1 + each for each in counted], "drift": curve, "self_divergence": typical,
        "self_runs": begun.self_divergence, "losses": losses, "losses_uninterrupted": own,
    }  # fmt: skip


def said(row: dict[str, Any]) -> str:
    """A row in a line."""
    state, verdict = "bit-equal" if row["state_bit_equal"] else "different", "passed" if row["passed"] else "FAILED"
    first = f"first step {row['first_step_error']:.1e} ({row['first_step_tensor']})"
    return f"state {state}, {first}, ratio {row['ratio']}, {verdict}"


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and what the file holds of runs begun in other frameworks."""
    held = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {row["from"] for row in rows}
    return [row for row in held if row["from"] not in fresh] + rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--framework", action="append", choices=list(contract.FRAMEWORKS), help="That begins; all installed without it.")
    parser.add_argument("--steps", type=int, default=10, help="Of each half of a run.")
    parser.add_argument("--perturbations", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"An override of the recipe {RECIPE}.")
    parser.add_argument("--out", type=Path, default=RESULTS / "resume" / "matrix.json")
    return parser.parse_args()


def main() -> None:
    """Train every pair and write the record, a framework that begins at a time."""
    given = arguments()
    os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    job = job_of(given.steps, given.set)
    options = [f"--steps {given.steps}", f"--perturbations {given.perturbations}", *(f"--set '{each}'" for each in given.set)]
    for first in given.framework or contract.installed():
        with tempfile.TemporaryDirectory() as folder:
            begun = begin(job, given.steps, first, given.perturbations, Path(folder))
            rows = []
            for second in [name for name in contract.installed() if name != first]:
                row = resumed_in(job, given.steps, first, second, begun, Path(folder) / second)
                rows.append({**row, "model": job.model, "command": " ".join([COMMAND, "--framework", first, *options])})
                sys.stderr.write(f"{first} -> {second}: {said(row)}\n")
        record = {**head(COMMAND), "job": job.to_json(), "precision": job.precision, "rows": merged(given.out, rows)}
        write_json(given.out, record)


if __name__ == "__main__":
    main()
