"""`triptych doctor`: the environment for a bug report. No framework is imported, and no host, user or path is named."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import click

from triptych.cli import emit, json_option
from triptych.core import hosts
from triptych.core.contract import FRAMEWORKS, Framework
from triptych.core.environment import environment


@click.command("doctor")
@json_option
def doctor_command(as_json: bool) -> None:
    """Print the environment for a bug report: machine, versions, and how to install what is missing."""
    data = environment()
    data["frameworks"] = {row.name: _framework(row) for row in FRAMEWORKS.values()}
    usage = shutil.disk_usage(".")
    data["disk_bytes"] = {"total": usage.total, "free": usage.free}
    data["notes"] = list(_notes(data))
    emit(data, as_json, "\n".join(_lines(data)))


def _framework(row: Framework) -> dict[str, Any]:
    missing = [need for need in row.needs if row.name not in hosts.table() and importlib.util.find_spec(need) is None]
    return {"installed": not missing, "missing": missing, "install": f"pip install 'triptych[{row.extra}]'" if missing else None}


def _notes(data: dict[str, Any]) -> Iterator[str]:
    """What a reader of the bug report should know before asking."""
    installed = [name for name, row in data["frameworks"].items() if row["installed"]]
    if len(installed) < 2:
        yield "a parity proof needs at least two frameworks"
    if data["cpu"]["simd"].get("bf16") is False:
        yield "no native bfloat16 on this processor: bf16 runs 40 to 500 times slower here"
    if data["triptych"]["modified"]:
        yield "the source differs from the commit"


def _lines(data: dict[str, Any]) -> Iterator[str]:
    machine, own = data["cpu"], data["triptych"]
    commit = f", commit {own['commit'][:12]}{' (modified)' if own['modified'] else ''}" if own["commit"] else ""
    quota = f", quota {machine['quota']:g}" if machine["quota"] else ""
    rows = {
        "triptych": f"{own['version']}{commit}, code {own['code_sha256'][:12]}",
        "python": data["python"],
        "system": data["system"],
        "cpu": machine["model"],
        "cores": f"{machine['cores']}, usable {machine['affinity'] or 'unknown'}{quota}",
        "simd": ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in machine["simd"].items()) or "unknown",
        "accelerators": "; ".join(data["accelerators"]) or "none seen",
        "memory": _sizes(data["memory_bytes"]),
        "disk here": _sizes(data["disk_bytes"]),
        "variables": ", ".join(f"{name}={value}" for name, value in data["variables"].items()) or "none set",
    }
    yield from (f"{name:<14}{text}" for name, text in rows.items())
    yield "\nframeworks"
    yield from (f"  {FRAMEWORKS[name].title:<18}{_state(row, FRAMEWORKS[name], data)}" for name, row in data["frameworks"].items())
    yield "\nversions"
    yield from (f"  {name:<18}{version}" for name, version in data["versions"].items())
    yield from (f"\nnote: {note}" for note in data["notes"])


def _state(row: dict[str, Any], framework: Framework, data: dict[str, Any]) -> str:
    if not row["installed"]:
        return f"not installed ({', '.join(row['missing'])} not found): {row['install']}"
    where = "at a host: " if framework.name in hosts.table() else ""
    return where + ", ".join(f"{need} {data['versions'].get(need, '(version unknown)')}" for need in framework.needs)


def _sizes(sizes: dict[str, int | None]) -> str:
    return ", ".join(f"{value / 2**30:.1f} GiB {name}" for name, value in sizes.items() if value is not None) or "unknown"
