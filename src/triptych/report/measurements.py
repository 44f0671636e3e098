"""Read the committed measurements of speed, memory, debugging and exports, below `benchmarks/results`.

Any suite and any model is read; what a newer writer adds is ignored, and a file that is no such record is refused by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from triptych.bench.statistics import paired_interval, smallest_difference, winner
from triptych.core.errors import InputRefused
from triptych.export import matrix
from triptych.export.runtimes import ADAPTERS
from triptych.report.measured import Exported, Pair, Performance, Profiled, ShapeError, Suite, Timed, Turns
from triptych.report.record import PYTHON, hardware, load, within
from triptych.report.revive import build

BENCH = "benchmarks/results/bench"
PROFILE, SHAPES, PASSES, VMAPS = "profile", "debugging/shape_bug.json", "transformer/passes.json", "transformer/vmap.json"
EXPORTS = "export/matrix.json"
COMPILED_JAX = "jax/jit"
SUITES = tuple(sorted(file.name.removesuffix(".yaml") for file in resources.files("triptych").joinpath("suites").iterdir()))
"""The suites that there are, each with a record to come."""
COMMANDS = {
    **{f"bench_{name}": f"triptych bench {name} --out {BENCH}/{name}.json" for name in SUITES},
    "profiles": "triptych profile resnet50 --batch-size 8",
    "shape_errors": f"{PYTHON} benchmarks/shape_bug.py",
    "passes": f"{PYTHON} benchmarks/transformer.py --part passes",
    "vmaps": f"{PYTHON} benchmarks/transformer.py --part vmap",
    "exports": f"{PYTHON} benchmarks/export_matrix.py",
}


def read(directory: Path) -> tuple[Performance, dict[str, str]]:
    """The measurements in a folder, and why parts of them are missing. InputRefused, by name, for a file that is no such record."""
    suites = [within(path, _suite, load(path), f"bench/{path.name}") for path in sorted((directory / "bench").glob("*.json"))]
    profiles = {path: load(path) for path in sorted((directory / PROFILE).glob("*.json"))}
    parts = (SHAPES, PASSES, VMAPS, EXPORTS)
    shapes, passes, vmaps, exports = (load(directory / name) if (directory / name).is_file() else {} for name in parts)
    found = Performance(
        suites=tuple(suites),
        profiles=tuple(row for path, data in profiles.items() for row in within(path, _profiles, data)),
        shape_errors=within(directory / SHAPES, _shape_errors, shapes),
        passes=within(directory / PASSES, _passes, passes),
        vmaps=within(directory / VMAPS, _vmaps, vmaps),
        exports=within(directory / EXPORTS, _exports, exports),
        bugs=within(directory / SHAPES, _bugs, shapes),
        hardware={name: hardware(data.get("environment")) for name, data in _named(profiles, shapes, passes, exports).items()},
    )
    return found, _missing(found)


def _named(profiles: Mapping[Path, Any], *parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"profiles": next(iter(profiles.values()), {}), **dict(zip(("shape_errors", "passes", "exports"), parts, strict=True))}


def _missing(found: Performance) -> dict[str, str]:
    recorded = {f"bench_{suite.name}" for suite in found.suites}
    recorded |= {part for part in ("profiles", "shape_errors", "passes", "vmaps", "exports") if getattr(found, part)}
    return {part: f"not recorded here; {command} records it" for part, command in COMMANDS.items() if part not in recorded}


def _suite(data: Mapping[str, Any], file: str) -> Suite:
    groups = data.get("groups", ())
    return Suite(
        name=data["suite"]["name"], command=data["command"], file=file, rows=tuple(build(Timed, dict(row)) for row in data["rows"]),
        pairs=tuple(build(Pair, {**_of(group), **pair}) for group in groups for pair in group["comparisons"]),
        groups=tuple(
            build(Turns, {**group, "smallest_difference": (group.get("a_a") or {}).get("smallest_difference")}) for group in groups
        ),
        import_seconds={name: told["import_seconds"] for name, told in data.get("frameworks", {}).items() if "import_seconds" in told},
        hardware=hardware(data.get("environment")), compile_cache=data["suite"].get("compile_cache", "cold"),
        marked_for=tuple(data.get("machine", {}).get("limits", ())),
    )  # fmt: skip


def _of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("model", "mode", "batch_size")}


def _profiles(data: Mapping[str, Any]) -> list[Profiled]:
    about = {key: data[key] for key in ("model", "mode", "lane", "batch_size")}
    return [build(Profiled, {**about, **row, "top": row.get("top", ())[:3]}) for row in data["rows"] if "failure" not in row]


def _shape_errors(data: Mapping[str, Any]) -> tuple[ShapeError, ...]:
    return tuple(build(ShapeError, dict(row)) for row in data.get("rows", ()))


def _bugs(data: Mapping[str, Any]) -> dict[str, str]:
    return {bug["name"]: bug["text"] for bug in data.get("bugs", ())}


def _passes(data: Mapping[str, Any]) -> tuple[Pair, ...]:
    """The lanes of one framework against each other, and all of them against JAX's compiled one."""
    wanted = {group["key"]: itertools.combinations(group["lanes"], 2) for group in data.get("groups", ())}
    kept = {key: [(a, b) for a, b in pairs if COMPILED_JAX in (a, b) or _framework(a) == _framework(b)] for key, pairs in wanted.items()}
    return tuple(pair for group in data.get("groups", ()) for pair in _pairs(group, kept[group["key"]]))


def _exports(data: Mapping[str, Any]) -> tuple[Exported, ...]:
    rows = tuple(build(Exported, dict(row)) for row in data.get("rows", ()))
    if unknown := {row.format for row in rows} - set(matrix.FORMATS) | {row.runtime for row in rows} - set(ADAPTERS):
        raise InputRefused(f"there is no {', '.join(sorted(unknown))} in the table of formats")
    return rows


def _framework(lane: str) -> str:
    return lane.partition("/")[0]


def _vmaps(data: Mapping[str, Any]) -> tuple[Pair, ...]:
    """In each lane the loop, `vmap` and the hand-written batch against each other."""
    found = []
    for group in data.get("groups", ()):
        ways = {tuple(name.rsplit(" ", 1)) for name in group["lanes"] if name.endswith((" loop", " vmap", " batched"))}
        lanes = [
            lane for lane in dict.fromkeys(name.rsplit(" ", 1)[0] for name in group["lanes"]) if {(lane, "loop"), (lane, "vmap")} <= ways
        ]
        wanted = [(f"{lane} {a}", f"{lane} {b}") for lane in lanes for a, b in itertools.combinations(("loop", "vmap", "batched"), 2)]
        found += _pairs(group, wanted)
    return tuple(found)


def _pairs(group: Mapping[str, Any], wanted: Iterable[tuple[str, str]]) -> list[Pair]:
    """The pairs of a group of the transformer comparison that both were timed in the same rounds."""
    lanes, setting, twin = group["lanes"], group["setting"], group.get("twin") or {}
    seconds = {name: told.get("seconds") or [] for name, told in lanes.items()}
    floor = smallest_difference(paired_interval(seconds[twin["of"]], twin["seconds"])[1]) if twin.get("seconds") else 0.0
    found = []
    for a, b in wanted:
        if seconds.get(a) and len(seconds[a]) == len(seconds.get(b, ())):
            ratio, interval = paired_interval(seconds[a], seconds[b])
            first = {"a": a, "b": b, None: None}[winner(interval, floor)]
            found.append(Pair(setting["workload"], setting["task"], setting["batch_size"], a, b, ratio, interval, first))
    return found
