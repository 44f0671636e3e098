"""docs/transformer.md: its tables stand between markers and come from the records; everything else in it is written by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from comparison import records, tables
from comparison.setting import TASKS

ROOT = Path(__file__).parents[2]
DOCUMENT, FIGURES = ROOT / "docs" / "transformer.md", ROOT / "benchmarks" / "figures"
OTHER = "xeon"
"""The folder of what was measured on another processor than the rest."""
_SECTION = re.compile(r"(<!-- begin (?P<name>[\w-]+) -->\n).*?(<!-- end (?P=name) -->)", re.S)


def rendered(text: str, folder: Path) -> str:
    """The document with every table as the records have it. KeyError for a marker that no table answers to."""
    made = tables.sections(measured(folder), records.groups(folder, records.REPORTS), records.groups(folder / OTHER, "passes"))
    return _SECTION.sub(lambda found: f"{found[1]}{made[found['name']]()}\n{found[3]}", text)


def measured(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The groups of every part that is on record."""
    found = {part: records.groups(folder, part) for part in TASKS}
    return {part: groups for part, groups in found.items() if groups}


def write(folder: Path) -> None:
    """Write tables and figures."""
    from comparison.pictures import pictures

    DOCUMENT.write_text(rendered(DOCUMENT.read_text(encoding="utf-8"), folder), encoding="utf-8")
    for name, data in pictures(measured(folder)).items():
        (FIGURES / name).write_bytes(data)


def summary(group: dict[str, Any]) -> list[str]:
    """A group in a few lines, for whoever watches."""
    proofs = [f"{name} {'equal' if proof['passed'] else 'NOT EQUAL'}" for name, proof in group["proof"].items()]
    lines = [", ".join(proofs)]
    for lane, told in group["lanes"].items():
        value = tables.median(group, lane)
        lines.append(f"{lane}: {told['failure'] if value is None else tables.milliseconds(value) + ' ms'}")
    return lines
