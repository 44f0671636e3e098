"""The proof of the proof: climb clean, then once more with each fault planted in each framework, and see every one caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core import catalog, tolerance
from triptych.core.difference import NOTHING_IN_COMMON, scaled_error
from triptych.core.errors import UsageError
from triptych.core.recipe import Clip, LossScaling, Recipe
from triptych.core.spec import Spec
from triptych.parity import faults
from triptych.parity.compare import Comparer, Comparison, Values, layer_of
from triptych.parity.observation import Observation, ShardReader, write_json, write_tensors
from triptych.parity.plan import ADAMW_RECIPE, SGD_RECIPE, Plan
from triptych.parity.prove import Progress, Proof, alive, prove, worker_processes

# Five images in parts of three and two: of an uneven last part BatchNorm still has a variance. No gradient's norm is below the limit.
BATCH, MICRO_BATCH, CLIP_NORM = 5, 3, 0.05

Kept = dict[tuple[str, int, int, str, str], Values]


def plant_all(spec: Spec, names: tuple[str, ...], frameworks: tuple[str, ...], run: Path, progress: Progress) -> dict[str, Any]:
    """Plant the named faults in every framework that can express them; `spec` should be tiny (`catalog.tiny`).

    Returns {"clean": "pass" | "fail", "faults": [row, ...], "not_expressible": {...}}; a fault that no framework can express is a
    UsageError when it was asked for by name.
    """
    spec = catalog.at_proof_size(spec)
    plan = Plan(
        spec, frameworks, "float64", rungs=(1, 2, 3, 4, 5, 6, 7), steps=3, adamw_steps=2, keep_trajectory=True, float32_logits=True,
        training_batch=BATCH, sgd=everything_on(SGD_RECIPE), adamw=everything_on(ADAMW_RECIPE),
    )  # fmt: skip
    clean = prove(plan, None, run / "clean", progress, keep=True)
    rows = _planted(clean, names, run / "faulty", progress) if clean.passed else []
    if not rows and clean.passed:
        raise UsageError(f"none of {', '.join(frameworks)} can express {', '.join(names)}")
    not_expressible = {**faults.expressible(spec)[1], **{f"numerics {row}": reason for row, reason in faults.NOT_EXPRESSIBLE.items()}}
    result = {
        "schema": 1, "model": spec.name, "clean": "pass" if clean.passed else "fail", "faults": rows, "not_expressible": not_expressible,
        "customary_forward_check": tolerance.CUSTOMARY_FORWARD_CHECK,
    }  # fmt: skip
    write_json(run / "faults.json", result)
    return result


def everything_on(recipe: Recipe) -> Recipe:
    """A recipe of the ladder with all that a fault may be planted in: uneven micro-batches, clipping (always in effect), loss scaling."""
    return dataclasses.replace(
        recipe, global_batch_size=BATCH, micro_batch_size=MICRO_BATCH, clip=Clip(norm=CLIP_NORM), loss_scaling=LossScaling()
    )


def _planted(clean: Proof, names: tuple[str, ...], run: Path, progress: Progress) -> list[dict[str, Any]]:
    plan = dataclasses.replace(clean.plan, faults=names, calibrate=False, trajectory="../clean/trajectory")
    run.mkdir(parents=True)
    write_json(run / "plan.json", plan.to_json())
    write_tensors(run / "inputs.safetensors", clean.weights)
    with worker_processes(plan, run) as processes, ThreadPoolExecutor(len(processes)) as pool:
        # Side by side: a worker that nobody reads stops when its share of the disk is full.
        def judge(framework: str) -> list[dict[str, Any]]:
            partner = next(name for name in plan.frameworks if name != framework)
            reader = ShardReader(run / framework, alive(processes[framework]))
            return _judge_all(plan, clean.comparer.kept, framework, partner, reader, progress)

        rows = [row for found in pool.map(judge, processes) for row in found]
    order = {name: i for i, name in enumerate(names)}
    return sorted(rows, key=lambda row: (order[row["name"]], plan.frameworks.index(row["framework"])))


def _judge_all(
    plan: Plan, kept: Kept, framework: str, partner: str, observations: Iterable[Observation], progress: Progress
) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    comparers: dict[str, Comparer] = {}
    for observation in observations:
        name = observation.fault
        if name not in rows:
            progress(f"{plan.spec.name}: {name} planted in {framework}")
            rows[name] = _row(faults.find(name, plan.spec), framework)
            comparers[name] = Comparer(plan)
        _judge(rows[name], comparers[name], kept, framework, partner, observation)
    for row in rows.values():
        _conclude(row, plan)
    return list(rows.values())


def _row(planted: faults.Planted, framework: str) -> dict[str, Any]:
    return {
        "name": planted.name, "framework": framework, "caught": False, "rung": None, "tensor": None, "error": None, "tolerance": None,
        "float32_forward_error": None, "numerics": planted.fault.numerics, "cause": planted.fault.cause,
        "expected_rung": planted.rung if planted.fault.numerics else None, "expected_rungs": list(planted.rungs),
        "planted_layer": planted.layer, "expected_layer": planted.named,
    }  # fmt: skip


def _judge(row: dict[str, Any], comparer: Comparer, kept: Kept, framework: str, partner: str, observation: Observation) -> None:
    """Hold one observation of a planted framework against the partner's clean one; the first divergence decides the row."""
    clean = kept.get(("", *observation.key[1:]), {}).get(partner, np.empty((0, 0)))
    if observation.group == "context":
        row["float32_forward_error"] = scaled_error(observation.value, clean)
        return
    if row["caught"]:
        return
    if observation.group == "exception":
        row.update(caught=True, rung=observation.rung, tensor=observation.name, error=NOTHING_IN_COMMON, tolerance=0.0)
        return
    found: Comparison = comparer.compare(observation, {framework: observation.value, partner: clean})
    if not found.passed:
        row.update(caught=True, rung=found.rung, tensor=found.tensor, error=found.error, tolerance=found.tolerance)


def _conclude(row: dict[str, Any], plan: Plan) -> None:
    """Was it caught where it should be, and would the customary check have missed it?"""
    layer = layer_of(plan, row["tensor"] or "")
    row["layer"] = layer
    expected = row["expected_layer"]
    row["right_rung"] = row["caught"] and (row["expected_rung"] is None or row["rung"] in row["expected_rungs"])
    row["right_layer"] = row["caught"] and (not expected or layer == expected or (layer or "").startswith(f"{expected}."))
    error = row["float32_forward_error"]
    # A fault that breaks the float32 pass altogether is not missed by anybody.
    row["missed_by_customary_check"] = error is not None and error <= tolerance.CUSTOMARY_FORWARD_CHECK


def table(result: dict[str, Any]) -> str:
    """The fault table as text."""
    lines = [f"clean: {result['clean']}", f"{'fault':<38}{'framework':<12}{'caught':<8}{'rung':<6}{'error':>10}  first diverging tensor"]
    for row in result["faults"]:
        note = "" if row["right_rung"] and row["right_layer"] else f"  <-- expected rung {row['expected_rung']}, {row['expected_layer']}"
        error = f"{row['error']:.1e}" if row["error"] is not None else "-"
        lines.append(
            f"{row['name']:<38}{row['framework']:<12}{'yes' if row['caught'] else 'NO':<8}{row['rung'] or '-'!s:<6}{error:>10}  "
            f"{row['tensor']}{note}"
        )
    missed = sum(row["missed_by_customary_check"] for row in result["faults"])
    caught = sum(row["caught"] for row in result["faults"])
    lines.append(f"{caught} of {len(result['faults'])} caught; a float32 forward check at 1e-4 would have missed {missed}")
    return "\n".join(lines)
