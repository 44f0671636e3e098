"""The records of the comparison: which settings there are, and one JSON file a part, in which groups are replaced one by one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from measuring import RESULTS, head, write_json

from comparison.setting import TASKS, WORKLOADS, Setting
from triptych.core.environment import code_hash

FOLDER = RESULTS / "transformer"
REPORTS = "compilers"
SIZES: dict[tuple[str, str], tuple[int, ...]] = {
    ("passes", "block"): (1, 8),
    ("passes", "vit"): (1, 8),
    ("vmap", "block"): (1, 4, 16, 64),
    ("vmap", "vit"): (1, 4, 16),
    ("per_sample", "block"): (1, 4, 16, 64),
    ("layers", "block"): (8,),
    ("gradients", "block"): (8,),
}
"""Batch sizes on record."""


def plan(parts: list[str], workloads: list[str], batch_sizes: list[int] | None, tiny: bool) -> list[Setting]:
    """The settings asked for; of every part and workload that there is, and at its own batch sizes unless told otherwise."""
    return [
        Setting(part, workload, task, size, tiny)
        for part, tasks in TASKS.items()
        for workload in WORKLOADS
        if part in parts and workload in workloads and (part, workload) in SIZES
        for size in batch_sizes or SIZES[part, workload]
        for task in tasks
    ]


def reported(settings: list[Setting]) -> list[Setting]:
    """The settings whose compiled programs are looked into: passes without an optimizer and gradients of our own, at the largest batch."""
    wanted = [each for each in settings if each.part in ("passes", "gradients") and each.task != "step"]
    largest = {(each.part, each.workload): max(other.batch_size for other in wanted if other.workload == each.workload) for each in wanted}
    return [each for each in wanted if each.batch_size == largest[each.part, each.workload]]


def code() -> str:
    """SHA-256 of what is measured and of what measures: a group on record stands as long as this does."""
    digest = hashlib.sha256(code_hash("core", "in_pytorch", "in_tensorflow", "in_jax").encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem in ("setting", "in_jax", "in_pytorch", "in_tensorflow", "worker", "rounds", "proof", "hlo"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def groups(folder: Path, part: str) -> list[dict[str, Any]]:
    """The groups on record, in the order in which they were measured; none without a record."""
    path = folder / f"{part}.json"
    held: list[dict[str, Any]] = json.loads(path.read_text())["groups"] if path.exists() else []
    return held


def stands(folder: Path, part: str, key: str, frameworks: list[str], rounds: int) -> bool:
    """Whether a group is on record already: of this code, these frameworks, and as many rounds."""
    return any(
        each["key"] == key and each["code_sha256"] == code() and each["frameworks"] == frameworks and each["asked_rounds"] >= rounds
        for each in groups(folder, part)
    )


def keep(folder: Path, part: str, group: dict[str, Any], frameworks: list[str], rounds: int, command: str) -> None:
    """Replace the group of this key, or add it; the others stay. Each has its own processor: a file may be filled on several machines."""
    first = head(command)
    what = {"frameworks": frameworks, "asked_rounds": rounds, "code_sha256": code(), "command": command}
    mine = {**group, "processor": first["environment"]["cpu"]["model"], **what}
    others = [each for each in groups(folder, part) if each["key"] != group["key"]]
    write_json(folder / f"{part}.json", {**first, "part": part, "groups": [*others, mine]})
