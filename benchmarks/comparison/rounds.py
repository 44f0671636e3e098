"""The orchestrator: prove a setting, build its lanes in one process a framework, let them take turns in random order. No framework here."""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparison import proof
from comparison.setting import MODES, Setting
from comparison.worker import read
from triptych.bench import machine
from triptych.core.conversation import Asked, Process, settings

TURN_SECONDS = 0.1
"""A turn is as many calls as fill this, so that short ones are not lost in the clock."""
LIMIT_SECONDS = 1200.0
PROVEN_MODES = {"jax": ("jit",), "pytorch": ("eager",), "tensorflow": ("function",)}
"""Modes that compute in float64, too; the others are held to these in float32."""


@contextlib.contextmanager
def processes(frameworks: Sequence[str], script: Path, work: Path) -> Iterator[dict[str, Process]]:
    """A worker a framework, with one number of threads and compile caches that are cold at first; stopped on the way out."""
    cores = machine.cores(None)
    environment = settings(len(cores) or 1, work / "cache")
    made: dict[str, Process] = {}
    try:
        for name in frameworks:
            command = [sys.executable, str(script), "--worker", name]
            made[name] = Process(name, work / f"{name}.log", environment, cores, LIMIT_SECONDS, command)
            made[name].ask("start")
        yield made
    finally:
        for process in made.values():
            process.stop()


def measure(
    setting: Setting, workers: Mapping[str, Asked], rounds: int, work: Path, modes: Mapping[str, tuple[str, ...]] = MODES
) -> dict[str, Any]:
    """The record of one setting. What is not proven equal is not timed: its lane has a failure, and no seconds."""
    asked = setting.to_json()
    exact, outputs, lanes = {}, {}, {}
    for name, worker in workers.items():
        out = str(work / f"{name}.npz")
        proven = [mode for mode in modes[name] if mode in PROVEN_MODES[name]]
        exact |= {f"{name}/{lane}": found for lane, found in read(worker.ask("prove", setting=asked, modes=proven, out=out)["out"]).items()}
        built = worker.ask("build", setting=asked, modes=modes[name], out=out)
        outputs |= {f"{name}/{lane}": found for lane, found in read(built["out"]).items()}
        lanes |= {f"{name}/{lane}": told for lane, told in built["told"].items()}
    proven64 = proof.in_float64(exact)
    proven32 = proof.in_float32(outputs, exact, next(iter(outputs)))
    for lane, share in proven32["share_of_bound"].items():
        if not proven64["passed"] or not share <= 1.0:
            lanes[lane] = {"failure": "its outputs are not equal to the others'" if proven64["passed"] else "float64 outputs are not equal"}
    timed = take_turns(lanes, workers, rounds)
    for worker in workers.values():
        worker.ask("release")
    return {"key": setting.key, "setting": asked, "proof": {"float64": proven64, "float32": proven32}, **timed}


def take_turns(lanes: dict[str, dict[str, Any]], workers: Mapping[str, Asked], rounds: int) -> dict[str, Any]:
    """Seconds of every turn; in a round every lane takes one, in random order, and the first of them two (A/A).

    On one core they are those that the process computed: what other programs took of a busy machine is left out, and there is no second
    thread to wait for. On several cores they are those of the clock.
    """
    cores = len(machine.cores(None)) or 1
    clock = "cpu" if cores == 1 else "wall"
    alive = [name for name, told in lanes.items() if "failure" not in told]
    seconds: dict[str, list[float]] = {name: [] for name in alive}
    wall: dict[str, list[float]] = {name: [] for name in alive}
    twin: list[float] = []
    weather = []
    order = [*((name, False) for name in alive), *((name, True) for name in alive[:1])]
    shuffle = random.Random(0)
    for _ in range(rounds if alive else 0):
        before, kernel = machine.counters(), machine.kernel_seconds()
        shuffle.shuffle(order)
        for name, second in order:
            taken = turn(workers, name, lanes[name])
            (twin if second else seconds[name]).append(taken[clock])
            wall[name] += [] if second else [taken["wall"]]
        weather.append({"kernel_seconds": kernel, **machine.weather(before, machine.counters())})
    median = float(np.median([each["kernel_seconds"] for each in weather])) if weather else 1.0
    told = {name: {**lanes[name], "seconds": seconds.get(name, []), "wall_seconds": wall.get(name, [])} for name in lanes}
    return {
        "cores": cores,
        "clock": clock,
        "lanes": told,
        "twin": {"of": alive[0] if alive else None, "seconds": twin},
        "rounds": [{**each, "noisy": machine.reasons(each, median)} for each in weather],
    }


def turn(workers: Mapping[str, Asked], name: str, told: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a call, by clock, in one turn of a lane."""
    framework, _, lane = name.partition("/")
    repeats = min(100, max(1, math.ceil(TURN_SECONDS / told["second_call_seconds"])))
    return workers[framework].ask("turn", lane=lane, repeats=repeats)
