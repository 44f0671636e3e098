"""The orchestrator: contestants take randomised interleaved turns, one at a time, while every other process sleeps.

No framework is imported here. A group is what takes turns with each other: one model, mode and batch size. In each round the calibration
kernel runs, then everybody once in random order, and one of them twice: the ratio of its two turns (A/A) is what this machine, today,
makes of no difference at all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from triptych.bench import machine
from triptych.bench.proof import Checks, Outputs, Proof, tolerances
from triptych.bench.suite import Case, Suite
from triptych.core.conversation import Asked, Failed
from triptych.core.errors import TriptychError
from triptych.core.tolerance import UPDATED_LOSS_PERTURBATIONS
from triptych.export.runtimes import RUNTIMES

Progress = Callable[[str], None]
TWIN = "twin"
SETTLE_SECONDS = 0.1
"""Before each turn, the kernel's too. Thread pools spin for a while when their work is done: one would take a core from the next."""


@dataclass(slots=True)
class Entry:
    """What became of one case."""

    case: Case
    failure: str | None = None
    unavailable: bool = False
    error: str | None = None
    built: dict[str, Any] = field(default_factory=dict)
    checks: Checks | None = None
    turns: list[list[float]] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    """Of every step, where the machine has counters."""
    peaks: list[int] = field(default_factory=list)
    residents: list[int] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """Whether it still takes turns."""
        return self.failure is None

    def fail(self, why: str, error: str, *, unavailable: bool = False) -> None:
        """Take it out, with the reason; what it showed so far counts for nothing."""
        self.failure, self.error, self.unavailable, self.turns = why, error, unavailable, []


@dataclass(slots=True)
class Group:
    """What a group gave: its entries, the second turns of one of them, and the rounds' weather."""

    name: str
    entries: list[Entry]
    twin_of: str | None = None
    twin: list[list[float]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    tolerances: list[float] | None = None
    """How far outputs may be from the reference's, once there is one."""


def run_group(
    cases: list[Case], workers: Mapping[str, Asked], calibrator: Asked, suite: Suite, proof: Proof, progress: Progress = lambda text: None
) -> Group:
    """Build, check, and let take turns. What fails becomes a reason in its entry; nothing is raised for it."""
    entries = [Entry(case) for case in cases]
    group = Group(cases[0].group, entries)
    for entry in entries:
        progress(f"{group.name}: building {entry.case.contestant}")
        build(entry, workers, suite, proof)
    _check(group, [(entry, _turn(entry, workers, suite, 1, check=True)) for entry in entries if entry.alive], workers, suite)
    twin = next((entry for entry in entries if entry.alive), None)
    if twin is not None:
        group.twin_of = twin.case.contestant
    shuffle = random.Random(suite.seed)
    for number in range(1, suite.rounds + 1):
        if any(entry.alive for entry in entries):
            progress(f"{group.name}: round {number} of {suite.rounds}")
            _round(group, twin, number, shuffle, workers, calibrator, suite)
    median = float(np.median([each["kernel_seconds"] for each in group.rounds])) if group.rounds else 1.0
    for each in group.rounds:
        each["noisy"] = machine.reasons(each, median)
    for worker in workers.values():
        _release(worker)
    return group


def build(entry: Entry, workers: Mapping[str, Asked], suite: Suite, proof: Proof) -> None:
    """Have its worker build a case and make its first call, if it may; what fails is the entry's reason."""
    case = entry.case
    reason = case.unavailable()
    if reason is not None:
        return entry.fail(reason, "LaneMissing", unavailable=True)
    if case.ours and not proof.passed:
        return entry.fail(f"not proven: the ladder failed for {case.model}, see its certificate", "ParityFailed")
    given = proof.exported if case.framework in RUNTIMES else proof.weights
    if isinstance(given, TriptychError):
        return entry.fail(f"nothing was exported for it: {given}", type(given).__name__)
    try:
        asked = {"key": case.contestant, "case": case.to_json(), "given": str(given), "seed": suite.seed, "data": suite.data}
        entry.built = workers[case.framework].ask("build", **asked)
    except Failed as error:
        entry.fail(error.message if error.kind == "LaneMissing" else str(error), error.kind, unavailable=error.kind == "LaneMissing")
    return None


def _round(
    group: Group, twin: Entry | None, number: int, shuffle: random.Random, workers: Mapping[str, Asked], calibrator: Asked, suite: Suite
) -> None:
    """Everybody once in random order, and the twin a second time; outputs are compared when all have had their turn."""
    before = machine.counters()
    time.sleep(SETTLE_SECONDS)
    kernel = calibrator.ask("kernel")["seconds"]
    check = number % suite.check_every == 0
    order: list[tuple[Entry, bool]] = [(entry, False) for entry in group.entries if entry.alive]
    if twin is not None and twin.alive:
        order.append((twin, True))
    shuffle.shuffle(order)
    seen: list[tuple[Entry, dict[str, Any] | None]] = []
    rested = SETTLE_SECONDS
    for entry, second in order:
        rested += SETTLE_SECONDS * entry.alive
        answer = _turn(entry, workers, suite, 1 + number * suite.steps, check=check) if entry.alive else None
        if answer is None:
            continue
        (group.twin if second else entry.turns).append(answer["seconds"])
        if not second:
            seen.append((entry, answer))
            entry.joules += [each for each in answer["joules"] if each is not None]
            entry.peaks += [answer["peak_bytes"]] if answer["peak_bytes"] else []
            entry.residents += [answer["resident_bytes"]] if answer["resident_bytes"] else []
    if check:
        _check(group, seen, workers, suite)
    names = [f"{entry.case.contestant}/{TWIN}" if second else entry.case.contestant for entry, second in order]
    weather = machine.weather(before, machine.counters(), rested)
    group.rounds.append({"kernel_seconds": kernel, **weather, "order": names})


def _turn(entry: Entry, workers: Mapping[str, Asked], suite: Suite, number: int, *, check: bool) -> dict[str, Any] | None:
    """The answer to one turn; None, and the entry out, when it failed."""
    asked = {
        "key": entry.case.contestant,
        "number": number,
        "seed": suite.seed,
        "steps": suite.steps,
        "warm_up": suite.warm_up,
        "check": check,
    }
    time.sleep(SETTLE_SECONDS)
    try:
        return workers[entry.case.framework].ask("turn", **asked)
    except Failed as error:
        entry.fail(str(error), error.kind)
        return None


def _check(group: Group, seen: list[tuple[Entry, dict[str, Any] | None]], workers: Mapping[str, Asked], suite: Suite) -> None:
    """Hold the outputs of all that should be equal to those of the first proven lane; who strays is out.

    The first of the entries, whatever the order of turns: a lane that strays would take all others with it if it had the first turn.
    """
    outputs = [(entry, answer["outputs"]) for entry in group.entries for who, answer in seen if who is entry and answer is not None]
    for entry, found in outputs:
        if not all(np.isfinite(np.asarray(each)).all() for each in found):
            entry.fail("its outputs are not finite", "ParityFailed")
    equal = [(entry, found) for entry, found in outputs if entry.alive and entry.built["unequal"] is None]
    reference = next(((entry, found) for entry, found in equal if entry.case.ours), None)
    if reference is None:
        return None
    if group.tolerances is None:
        strayed = _strayed(reference[0], workers, suite)
        if strayed is None:
            return _check(group, seen, workers, suite)  # against the next one: nothing is known of this one's rounding
        group.tolerances = tolerances(strayed, reference[1])
    for entry, found in equal:
        entry.checks = entry.checks or Checks(reference[0].case.contestant, group.tolerances)
        entry.checks.look(found, reference[1])
        if entry.checks.failure is not None:
            entry.fail(entry.checks.failure, "ParityFailed")
    return None


def _strayed(entry: Entry, workers: Mapping[str, Asked], suite: Suite) -> list[Outputs] | None:
    """Outputs of the first check from weights one unit in the last place away, none unless the lane trains; None, and the entry out, when
    it failed."""
    asked = {"key": entry.case.contestant, "number": 1, "seed": suite.seed, "perturbations": UPDATED_LOSS_PERTURBATIONS}
    try:
        return list(workers[entry.case.framework].ask("stray", **asked)["outputs"])
    except Failed as error:
        entry.fail(str(error), error.kind)
        return None


def _release(worker: Asked) -> None:
    try:
        worker.ask("release")
    except Failed:
        return
