"""The record of a suite: a row a case, the paired comparisons within each group, and the raw samples in a file beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from triptych.bench import machine, statistics
from triptych.bench.proof import Proof
from triptych.bench.suite import Suite
from triptych.bench.turns import Entry, Group
from triptych.core import catalog
from triptych.core.contract import FRAMEWORKS
from triptych.core.cost import CONVENTION, cost
from triptych.core.environment import PACKAGE, environment
from triptych.core.errors import InputRefused
from triptych.core.storage import make_directory, storing, write_whole

SCHEMA = 1
BACKWARD = 3
"""A training step counts as three forward passes: each product of the forward pass has two of its size in the backward one."""


def make(
    suite: Suite, command: str, machine_: dict[str, Any], started: Mapping[str, Any], proofs: Mapping[str, Proof], groups: list[Group]
) -> dict[str, Any]:
    """The record as plain data, without NaN: what is not known is None, what failed has a reason."""
    comparisons = {group.name: compared(group) for group in groups}
    rows = [row(entry, group, proofs.get(entry.case.model), machine_["peak_flops"]) for group in groups for entry in group.entries]
    _break_even(rows)
    return {
        "schema": SCHEMA,
        "command": command,
        "environment": environment(),
        "suite": {**suite.model_dump(mode="json"), "data": Path(suite.data).name},
        "machine": {
            **machine_,
            "flops": CONVENTION + "; a training step is three forward passes",
            "energy": machine.energy_source(),
            "kernel": list(machine.KERNEL),
            "limits": {"kernel": machine.KERNEL_LIMIT, "steal": machine.STEAL_LIMIT, "others": machine.OTHERS_LIMIT},
        },
        "frameworks": {name: {**told, "lines_of_code": lines_of_code(name)} for name, told in started.items()},
        "proofs": {model: proof.summary() for model, proof in proofs.items()},
        "groups": [_group(group, comparisons[group.name]) for group in groups],
        "rows": rows,
    }


def row(entry: Entry, group: Group, proof: Proof | None, peak_flops: float) -> dict[str, Any]:
    """One case: what was timed, how equal it was shown to be, and every figure; of a failed one, the reason."""
    case = entry.case
    head = {
        "framework": case.framework, "model": case.model, "options": case.options, "lane": case.lane, "mode": case.mode,
        "batch_size": case.batch_size, "certificate": certificate(entry, proof),
    }  # fmt: skip
    if not entry.turns:
        nothing = dict.fromkeys(("median", "interval", "images_per_second", "compile_seconds", "peak_memory_bytes", "peak_share"))
        failure = entry.failure or "it never had a turn"
        return {**head, **nothing, "failure": failure, "error": entry.error, "unavailable": entry.unavailable}
    samples = list(itertools.chain.from_iterable(entry.turns))
    median, interval = statistics.median_interval([float(np.median(turn)) for turn in entry.turns])
    built = entry.built
    macs = built["macs"] or cost(catalog.get_spec(case.model, **case.options)).macs
    passes = 1 if case.mode == "inference" else BACKWARD
    return {
        **head,
        "median": median,
        "interval": interval,
        "n": len(samples),
        **statistics.percentiles(samples),
        "slowest": max(samples),
        "outliers": statistics.outliers(samples),
        "images_per_second": case.batch_size / median,
        "data": built["data"],
        "build_seconds": built["build_seconds"],
        "trace_seconds": built["phases"].get("trace"),
        "backend_seconds": built["phases"].get("compile"),
        "cache_hits": built["phases"].get("cache_hits"),
        "cache_misses": built["phases"].get("cache_misses"),
        "first_call_seconds": built["first_call_seconds"],
        "compile_seconds": max(0.0, built["first_call_seconds"] - median) if built["compiles"] else 0.0,
        "joules_per_image": float(np.median(entry.joules)) / case.batch_size if entry.joules else None,
        "peak_memory_bytes": max(entry.peaks, default=None),
        "resident_memory_bytes": int(np.median(entry.residents)) if entry.residents else None,
        "macs": macs,
        "peak_share": 2.0 * macs * passes * case.batch_size / median / peak_flops,
        "levers": built["levers"],
        "noisy_rounds": sum(bool(each["noisy"]) for each in group.rounds),
    }


def certificate(entry: Entry, proof: Proof | None) -> dict[str, Any]:
    """How equal a case was shown to be: `parity` (the ladder), `outputs` (the same weights, the same logits), or `none` and why."""
    checked = entry.checks.to_json() if entry.checks else None
    if entry.failure is not None:
        return {"kind": "none", "reason": entry.failure, "checked": checked}
    unequal = entry.built.get("unequal")
    if unequal:
        ours = cost(catalog.get_spec(entry.case.model, **entry.case.options)).macs
        return {"kind": "none", "reason": unequal, "flop_ratio": entry.built["macs"] / ours}
    if entry.case.ours and proof is not None and proof.passed and entry.built:
        return {**{key: value for key, value in proof.summary().items() if key != "rungs"}, "checked": checked}
    if checked is not None and not entry.case.ours:
        return {"kind": "outputs", **checked}
    return {"kind": "none", "reason": "there was no proven lane to hold its outputs to"}


def compared(group: Group) -> list[dict[str, Any]]:
    """Every pair of a group: the ratio of their turns in the same rounds, its interval, and who took less time, if anybody did."""
    floor = (aa(group) or {"smallest_difference": 0.0})["smallest_difference"]
    entries = [entry for entry in group.entries if entry.turns]
    rows = []
    for a, b in itertools.combinations(entries, 2):
        ratio, interval = statistics.paired_interval(medians(a.turns), medians(b.turns))
        first = statistics.winner(interval, floor)
        names = {"a": a.case.contestant, "b": b.case.contestant}
        rows.append({**names, "ratio": ratio, "interval": interval, "winner": names[first] if first else None})
    return rows


def aa(group: Group) -> dict[str, Any] | None:
    """The ratio of a contestant to itself, and the smallest difference that this machine can show; None when nobody ran twice."""
    twin = next((entry for entry in group.entries if entry.case.contestant == group.twin_of), None)
    if twin is None or not twin.turns or len(twin.turns) != len(group.twin):
        return None
    ratio, interval = statistics.paired_interval(medians(twin.turns), medians(group.twin))
    smallest = statistics.smallest_difference(interval)
    return {"contestant": group.twin_of, "ratio": ratio, "interval": interval, "smallest_difference": smallest}


def medians(turns: list[list[float]]) -> list[float]:
    """Each turn's median step."""
    return [float(np.median(turn)) for turn in turns]


def _group(group: Group, comparisons: list[dict[str, Any]]) -> dict[str, Any]:
    case = group.entries[0].case
    noisy = [each["noisy"] for each in group.rounds]
    return {
        "model": case.model, "mode": case.mode, "batch_size": case.batch_size, "a_a": aa(group), "comparisons": comparisons,
        "rounds": len(noisy), "noisy_rounds": sum(map(bool, noisy)),
        "kernel_seconds": float(np.median([each["kernel_seconds"] for each in group.rounds])) if noisy else None,
    }  # fmt: skip


def _break_even(rows: list[dict[str, Any]]) -> None:
    """Beside each lane of ours: after how many steps it has made up for its compilation against the same framework's default lane."""
    what = ("framework", "model", "mode", "batch_size")
    default = {tuple(each[key] for key in what): each for each in rows if each["lane"] == "default" and "failure" not in each}
    for each in rows:
        other = default.get(tuple(each[key] for key in what))
        if other is not None and other is not each and "failure" not in each:
            figures = each["compile_seconds"], each["median"], other["compile_seconds"], other["median"]
            each["break_even_steps"] = statistics.break_even_steps(*figures)


def lines_of_code(framework: str) -> int | None:
    """Lines of a room's Python that are neither blank nor comments; None for what is no room."""
    if framework not in FRAMEWORKS:
        return None
    files = (PACKAGE / FRAMEWORKS[framework].package.rpartition(".")[2]).rglob("*.py")
    lines = (line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def samples_file(path: Path) -> Path:
    """The raw samples beside a record: a line a case with the seconds of every step by round, then a line a group with its rounds."""
    return path.with_name(f"{path.name.removesuffix('.json')}.samples.jsonl")


def write(path: Path, made: Mapping[str, Any], groups: list[Group]) -> None:
    """The record and its samples, each whole or not at all. StorageError when that fails."""
    lines: list[dict[str, Any]] = []
    for group in groups:
        lines += [{**_identity(entry), "turns": entry.turns} for entry in group.entries if entry.turns]
        lines.append({"group": group.name, "twin_of": group.twin_of, "twin": group.twin, "rounds": group.rounds})
    make_directory(path.parent)
    with storing(path):
        write_whole(samples_file(path), "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        write_whole(path, json.dumps(made, indent=1, allow_nan=False) + "\n")


IDENTITY = ("framework", "model", "options", "lane", "mode", "batch_size")
"""What makes two rows of two records the same case."""


def _identity(entry: Entry) -> dict[str, Any]:
    return {key: getattr(entry.case, key) for key in IDENTITY}


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A record and the lines of its samples. InputRefused, by name, for a file that is no such record or whose samples are missing."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in samples_file(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputRefused(f"{error.filename}: {(error.strerror or str(error)).lower()}; give a record of `triptych bench`") from None
    except ValueError as error:
        raise InputRefused(f"{path}: not a record of `triptych bench` ({error})") from None
    if not isinstance(made, dict) or made.get("schema") != SCHEMA or not isinstance(made.get("rows"), list):
        raise InputRefused(f"{path}: not a record of `triptych bench` of schema {SCHEMA}")
    return made, lines
