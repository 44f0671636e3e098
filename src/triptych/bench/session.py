"""A whole suite: prove, start the processes, run every group, write the record and its raw samples."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.bench import machine, record
from triptych.bench.processes import NUMERICS, chosen_cores
from triptych.bench.proof import Proof, prove
from triptych.bench.suite import EXPORTER, Case, Subject, Suite
from triptych.bench.turns import Entry, Group, Progress, build, run_group
from triptych.core.conversation import Asked, Failed, Process, settings
from triptych.core.errors import ParityFailed, TriptychError
from triptych.core.workers import available
from triptych.export import runtimes

CALIBRATOR = "calibrator"
"""The process of the fixed kernel: it imports no framework."""


@dataclass(slots=True)
class Processes:
    """The workers by framework; one that ended is started again for the next group."""

    limit_seconds: float
    work: Path
    settings: dict[str, str]
    cores: list[int]
    running: dict[str, Process]
    started: dict[str, dict[str, Any]]

    def new(self, framework: str, log: str) -> Process:
        """One more process, which the caller stops."""
        return Process(framework, self.work / f"{log}.log", self.settings, self.cores, self.limit_seconds)

    def start(self, name: str) -> Process:
        """The worker called `name`, alive if it can be."""
        if name not in self.running or self.running[name].ended:
            self.running[name] = self.new(name, name)
            with contextlib.suppress(Failed):  # whatever is wrong will be the reason in each of its rows
                if name != CALIBRATOR:
                    self.started[name] = self.running[name].ask("start")
        return self.running[name]

    def stop(self) -> None:
        """End them all."""
        for process in self.running.values():
            process.stop()


@contextlib.contextmanager
def processes(suite: Suite, work: Path) -> Iterator[Processes]:
    """Workers with one setting of threads, cores and caches; stopped on the way out, whatever happened."""
    threads, cores = chosen_cores(suite.threads)
    cache = work / f"compile-cache-{suite.compile_cache}"
    if suite.compile_cache == "cold":
        shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    held = Processes(suite.limit_seconds, work, settings(threads, cache), cores, {}, {})
    try:
        yield held
    finally:
        held.stop()


def run(suite: Suite, command: str, work: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Run the suite and return its record, which is also written to `out`, the raw samples beside it.

    What fails is a row with its reason. UsageError when no proof is possible, StorageError when nothing can be written.
    """
    work.mkdir(parents=True, exist_ok=True)
    ours: list[str] = [name for name in suite.frameworks if name in available()]
    foreign: list[str] = [name for name in suite.frameworks if name in runtimes.RUNTIMES and runtimes.missing(name) is None]
    proofs: dict[str, Proof] = {}
    groups: list[Group] = []
    threads, cores = chosen_cores(suite.threads)
    with processes(suite, work) as held:
        calibrator = held.start(CALIBRATOR)
        peaks = [calibrator.ask("peak")["flops"]]
        for subject, cases in _by_model(suite):
            spec = subject.spec()
            progress(f"{spec.name}: proof")
            try:
                proof = prove(spec, ours, suite.modes, work, progress)
                if foreign and "inference" in suite.modes and EXPORTER in available():
                    progress(f"{spec.name}: export")
                    proof = dataclasses.replace(proof, exported=exported(subject, proof, held))
            except TriptychError as error:
                groups += [_not_proven(group, error) for group in cases]
                continue
            proofs[spec.name] = proof
            for group in cases:
                wanted = {case.framework for case in group}
                workers: dict[str, Asked] = {name: held.start(name) for name in (*ours, *foreign) if name in wanted}
                if suite.compile_cache == "warm":
                    warm_up(group, held, suite, proof, progress)
                groups.append(run_group(group, workers, calibrator, suite, proof, progress))
                peaks.append(calibrator.ask("peak")["flops"])  # again: another program may have taken a core in that one second
        started = dict(held.started)
    machine_ = {"peak_flops": max(peaks), "threads": threads, "cores": cores, "numerics": NUMERICS}
    made = record.make(suite, command, machine_, started, proofs, groups)
    record.write(out, made, groups)
    return made


def warm_up(cases: list[Case], held: Processes, suite: Suite, proof: Proof, progress: Progress) -> None:
    """Fill the caches of compiled programs: each case is built once by a process that then ends. What fails here will fail again."""
    for framework in dict.fromkeys(case.framework for case in cases if case.framework not in runtimes.RUNTIMES):
        process = held.new(framework, f"{framework}-warm-up")
        try:
            for case in (case for case in cases if case.framework == framework):
                progress(f"{case.group}: warming the compile cache of {case.contestant}")
                build(Entry(case), {framework: process}, suite, proof)
        finally:
            process.stop()


def exported(subject: Subject, proof: Proof, held: Processes) -> Path | TriptychError:
    """The ONNX model of the proven weights, written by a process of its own, that leaves nothing behind in one that is timed."""
    path = proof.weights.with_name("model.onnx")
    process = held.new(EXPORTER, "export")
    try:
        process.ask("export", model=subject.name, options=subject.options, weights=str(proof.weights), path=str(path))
    except Failed as error:
        return error
    finally:
        process.stop()
    return path


def _by_model(suite: Suite) -> Iterator[tuple[Subject, list[list[Case]]]]:
    """Each model with its groups, in the suite's order."""
    groups = suite.groups()
    size = len(groups) // len(suite.models)
    for number, subject in enumerate(suite.models):
        yield subject, groups[number * size : (number + 1) * size]


def _not_proven(cases: list[Case], error: TriptychError) -> Group:
    entries = [Entry(case) for case in cases]
    for entry in entries:
        reason = entry.case.unavailable()
        if reason is not None:
            entry.fail(reason, "LaneMissing", unavailable=True)
        else:
            entry.fail(f"no proof: {str(error).strip().partition(chr(10))[0]}", type(error).__name__)
    return Group(cases[0].group, entries)


def outcome(made: dict[str, Any]) -> TriptychError | None:
    """The error that a record ends a command with: ParityFailed when outputs or proofs failed, else that cases failed; None if none did."""
    failed = [row for row in made["rows"] if "failure" in row and not row["unavailable"]]
    if not failed:
        return None
    lines = [f"{row['model']} {row['mode']} {row['batch_size']} {row['framework']}/{row['lane']}: {row['failure']}" for row in failed]
    kind = ParityFailed if any(row["error"] == "ParityFailed" for row in failed) else TriptychError
    return kind(f"{len(failed)} case(s) failed:\n  " + "\n  ".join(lines))


def plan(suite: Suite) -> dict[str, Any]:
    """What `run` would do, without doing it."""
    threads, cores = chosen_cores(suite.threads)
    rows = [{**case.to_json(), "unavailable": case.unavailable()} for group in suite.groups() for case in group]
    return {
        "suite": suite.model_dump(mode="json"), "threads": threads, "cores": cores, "cases": rows,
        "memory_phase": machine.begin_memory_phase() is not None,
        "turns": suite.rounds * (sum(row["unavailable"] is None for row in rows) + len(suite.groups())),
    }  # fmt: skip
