"""`triptych bench compare OLD NEW`: what became slower between two records, and what they cannot tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from triptych.bench import record, statistics
from triptych.core.errors import InputRefused

THRESHOLD = 0.05
"""The regression that a comparison must be able to see; one that could not have seen it says so."""
FLOOR = 0.02
"""Differences of less are nobody's concern, however narrow the interval: code moves in memory when anything is changed."""


def compare(old: Path, new: Path) -> dict[str, Any]:
    """Each case that both records have: the ratio new / old, corrected by the calibration kernel of each if it was the same, and a verdict.

    InputRefused for files that are no records, or that have no case in common.
    """
    (made_old, lines_old), (made_new, lines_new) = record.read(old), record.read(new)
    olds, news = _cases(lines_old), _cases(lines_new)
    kernels = _kernels(lines_old), _kernels(lines_new)
    floors = _floors(made_old), _floors(made_new)
    otherwise, rows = unlike(made_old, made_new), []
    for key in [key for key in olds if key in news]:
        case = {name: news[key][name] for name in record.IDENTITY}
        group = _group(case)
        seconds = record.medians(news[key]["turns"]), record.medians(olds[key]["turns"])
        beside = () if "kernel" in otherwise else (kernels[1][group], kernels[0][group])
        ratio, interval = statistics.unpaired_interval(*seconds, *beside)
        floor = max(FLOOR, *(each.get(group, 0.0) for each in floors))
        rows.append({**case, "ratio": ratio, "interval": interval, "floor": floor, "verdict": verdict(interval, floor)})
    if not rows:
        raise InputRefused(f"{old} and {new} have no case in common: compare two runs of one suite")
    return {
        "schema": record.SCHEMA, "threshold": THRESHOLD, "rows": rows,
        "unlike": otherwise,
        "only_old": [json.loads(key) for key in olds if key not in news], "only_new": [json.loads(key) for key in news if key not in olds],
    }  # fmt: skip


def unlike(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """What was set otherwise, [old, new]: no difference between two such records is the code's alone."""
    told = [
        {
            "threads": made["machine"]["threads"], "steps": made["suite"]["steps"], "data": made["suite"].get("data"),
            "warm_up": made["suite"].get("warm_up", 0), "kernel": made["machine"].get("kernel"),
            "processor": made["environment"].get("cpu", {}).get("model"), "versions": made["environment"].get("versions"),
        }
        for made in (old, new)
    ]  # fmt: skip
    return {name: [told[0][name], told[1][name]] for name in told[0] if told[0][name] != told[1][name]}


def verdict(interval: statistics.Interval, floor: float) -> str:
    """From the interval of new / old: `slower` or `faster` when all of it is more than `floor` away from 1; `same` when all of it is
    within 5 % of 1; else `cannot tell`. `floor` is the smallest difference that the A/A turns of either record could show."""
    low, high = interval
    if low > 1.0 + floor:
        return "slower"
    if high < 1.0 / (1.0 + floor):
        return "faster"
    return "same" if low >= 1.0 / (1.0 + THRESHOLD) and high <= 1.0 + THRESHOLD else "cannot tell"


def table(result: dict[str, Any]) -> str:
    """The comparison as text."""
    lines = [f"{'case':<52}{'new / old':>10}{'95 % interval':>18}{'floor':>8}  verdict"]
    for row in result["rows"]:
        name = f"{_group(row)}/{row['framework']}/{row['lane']}"
        low, high = row["interval"]
        lines.append(f"{name:<52}{row['ratio']:>10.3f}{f'{low:.3f} to {high:.3f}':>18}{row['floor']:>8.1%}  {row['verdict']}")
    lines += [f"set otherwise: {name}, {old} in the old record, {new} in the new" for name, (old, new) in result["unlike"].items()]
    for which in ("old", "new"):
        count = len(result[f"only_{which}"])
        lines += [f"{count} case(s) were timed in the {which} record only"] * bool(count)
    return "\n".join(lines)


def _cases(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The lines of cases by what identifies them."""
    return {json.dumps({key: line[key] for key in record.IDENTITY}, sort_keys=True): line for line in lines if "turns" in line}


def _kernels(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {line["group"]: [each["kernel_seconds"] for each in line["rounds"]] for line in lines if "group" in line}


def _floors(made: dict[str, Any]) -> dict[str, float]:
    return {_group(group): group["a_a"]["smallest_difference"] for group in made["groups"] if group["a_a"]}


def _group(case: dict[str, Any]) -> str:
    return f"{case['model']}/{case['mode']}/{case['batch_size']}"
