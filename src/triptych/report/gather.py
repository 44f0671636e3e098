"""The parts of the evidence that need no run: counts, versions, and what other commands have written as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from triptych.core import catalog
from triptych.core.cost import cost
from triptych.core.environment import environment
from triptych.core.errors import InputRefused
from triptych.report import lines, measurements, record
from triptych.report.evidence import Certificate, Evidence, FaultTable, ModelCost, from_dict
from triptych.report.revive import build

COMMANDS = {
    "costs": "triptych info MODEL",
    "lines": "triptych report",
    "environment": "triptych doctor",
}


def costs(models: Iterable[str] | None = None) -> tuple[ModelCost, ...]:
    """Parameters and FLOPs of catalogued models at their default options; of all of them by default."""
    rows = [cost(catalog.get_spec(name)) for name in (models or catalog.CATALOG)]
    return tuple(ModelCost(row.model, row.image_size, row.parameters, row.macs, row.flops) for row in rows)


def static() -> dict[str, Any]:
    """The fields of `Evidence` that are computed on the spot: `Evidence(**static(), certificates=...)`."""
    return {"costs": costs(), "code": lines.count_rooms(), "environment": environment()}


def recorded(directory: Path) -> dict[str, Any]:
    """The fields of `Evidence` that are read from committed records, and why parts of them are missing.

    InputRefused, by name, for a file that is no such record.
    """
    (records, no_record), (performance, not_measured) = record.read(directory), measurements.read(directory)
    return {"records": records, "performance": performance, "missing": {**no_record, **not_measured}}


def renewed(evidence: Evidence, directory: Path) -> Evidence:
    """The evidence of an earlier report with what needs no run made anew: the records, the costs and the size of the code."""
    found = recorded(directory)
    parts = {*record.COMMANDS, *measurements.COMMANDS}
    found["missing"] |= {part: why for part, why in evidence.missing.items() if part not in parts}
    commands = {**evidence.commands, **record.COMMANDS, **measurements.COMMANDS}
    return dataclasses.replace(evidence, **found, costs=costs(), code=lines.count_rooms(), commands=commands)


def certificate(data: Mapping[str, Any]) -> Certificate:
    """A certificate from the JSON of `triptych parity`. InputRefused when it lacks a field."""
    rungs = [{**row, "pair": " / ".join(filter(None, row.get("pair") or ())) or None} for row in data.get("rungs", ())]
    curves = [_curves(row) for row in rungs if row.get("curves")]
    return build(Certificate, {**data, "rungs": rungs, "curves": curves, "context": _context(data.get("context"))})


def _curves(row: Mapping[str, Any]) -> dict[str, Any]:
    """The curves of a certificate's rung 8 as the fields of `Curves`."""
    data = row["curves"]
    return {
        "self_divergence": data["median_self_divergence"], "self_runs": data["self_divergence"], "pairs": data["pairs"],
        "counted": data["counted_steps"], "precision": row["precision"],
    }  # fmt: skip


def _context(data: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A certificate's context as the fields of `Context`."""
    if data is None:
        return None
    difference, published = data["max_absolute_logit_difference"], data.get("published_algoperf_difference")
    return {**data, "max_abs_logit_difference": difference, "published": published}


def fault_table(data: Mapping[str, Any]) -> FaultTable:
    """A fault table from the JSON of `triptych parity MODEL --fault all`. InputRefused when it lacks a field."""
    absent = [_not_expressible(name, reason) for name, reason in data.get("not_expressible", {}).items()]
    return build(FaultTable, {**data, "not_expressible": absent})


def _not_expressible(name: str, reason: str) -> dict[str, Any]:
    """`numerics 8` is a row of docs/numerics.md; anything else is the name of a fault."""
    word, _, row = name.partition(" ")
    return {"name": name, "reason": reason, "numerics": int(row) if word == "numerics" and row.isdigit() else None}


def read(path: Path) -> Evidence:
    """The evidence of an earlier report (`evidence.json`). InputRefused when it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputRefused(f"{path} is no evidence of a report ({error}); run `triptych report`") from None
    if not isinstance(data, dict):
        raise InputRefused(f"{path} holds a {type(data).__name__}, not the evidence of a report; run `triptych report`")
    return from_dict(data)
