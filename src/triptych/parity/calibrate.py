"""Measure float32 noise: the error of one framework against its own float64, which sets the float32 tolerances."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from triptych.core import catalog, environment, initialize, tolerance
from triptych.core.spec import Spec
from triptych.parity import plan as plans
from triptych.parity.compare import Comparer
from triptych.parity.observation import write_json
from triptych.parity.plan import Plan
from triptych.parity.rungs import climb
from triptych.parity.subject import Subject, calibrate
from triptych.parity.trajectory import MemoryTrajectory

SEEDS = 5
RUNGS = (3, 4, 5, 6, 7)
FRAMEWORK = "pytorch"
"""Whose noise is measured; any one framework would do."""


def measure_noise(spec: Spec, device: str, run: Path, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One row for `spec` and one for its tiny twin: the largest error by `rung/group` over `SEEDS` input seeds."""
    tiny = catalog.tiny(spec)
    for each in (spec, catalog.at_proof_size(tiny)):
        noise: dict[str, float] = {}
        for seed in range(SEEDS):
            progress(f"{each.name}: seed {seed + 1} of {SEEDS}")
            for key, error in _one_seed(each, device, seed):
                noise[key] = max(noise.get(key, 0.0), error)
        yield {
            "model": each.name,
            "noise": noise,
            "seeds": SEEDS,
            "framework": FRAMEWORK,
            "command": f"triptych parity {spec.name} --calibrate",
        }


def _one_seed(spec: Spec, device: str, seed: int) -> Iterator[tuple[str, float]]:
    """Errors of a float32 climb against a float64 climb from the same float32 weights; rung 7 replays the float64 run."""
    wide = Plan(spec, ("float64", "float32"), "float64", device=device, seed=seed)
    weights = initialize.parity_weights(spec, seed, "float32")
    weights = calibrate(Subject(FRAMEWORK, wide, weights), plans.forward_inputs(wide))
    weights = {name: value if value.dtype == "int64" else value.astype("float32") for name, value in weights.items()}
    narrow = dataclasses.replace(wide, precision="float32")
    recorded = MemoryTrajectory()
    streams = {
        "float64": climb(Subject(FRAMEWORK, wide, weights, inputs="float32"), recorded, RUNGS),
        "float32": climb(Subject(FRAMEWORK, narrow, weights), MemoryTrajectory(True, recorded.states), RUNGS),
    }
    for found in Comparer(wide).consume(streams):
        yield f"{found.rung}/{found.group}", found.error


def record(row: dict[str, Any]) -> dict[str, Any]:
    """Write a measured row into the committed table."""
    table = json.loads(tolerance.NOISE_FILE.read_text()) if tolerance.NOISE_FILE.exists() else {}
    table[row["model"]] = {**{key: value for key, value in row.items() if key != "model"}, "cpu": environment.environment()["cpu"]}
    write_json(tolerance.NOISE_FILE, dict(sorted(table.items())))
    return row
