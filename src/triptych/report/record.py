"""The committed records of the training system, `benchmarks/results/`, as evidence: runs on CIFAR-10, resumes, kills, speeds.

They took hours and are not made anew for a report. A file that is absent is a part that is missing, with the command that makes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from triptych.core.errors import InputRefused
from triptych.report.evidence import Evaluated, Kills, Outside, Overhead, RecordedRun, Records, ResumedPair, Speed
from triptych.report.revive import build

DEFAULT = Path("benchmarks/results")
SCHEMA = 1
PYTHON = ".venv/bin/python"
COMMANDS = {
    "cifar10": "benchmarks/cifar10.sh",
    "evaluated": "benchmarks/cifar10.sh evaluate",
    "resumed": f"{PYTHON} benchmarks/resume_matrix.py",
    "kills": f"{PYTHON} benchmarks/kill_resume.py",
    "overhead": f"{PYTHON} benchmarks/checkpoint_overhead.py",
    "steps": f"{PYTHON} benchmarks/step_speed.py",
    "pipelines": f"{PYTHON} benchmarks/data_speed.py",
}
# Part -> the file with its rows; the runs on CIFAR-10 and the evaluations of their checkpoints have a file each.
FILES = {
    "resumed": "resume/matrix.json",
    "kills": "resume/kills.json",
    "overhead": "resume/overhead.json",
    "steps": "speed/step.json",
    "pipelines": "speed/data.json",
}


def read(directory: Path) -> tuple[Records, dict[str, str]]:
    """The records in a folder, and why parts of them are missing. InputRefused, by name, for a file that is no such record."""
    found = {part: load(directory / name) for part, name in FILES.items() if (directory / name).is_file()}
    runs = [within(path, _run, load(path), path.stem) for path in sorted((directory / "cifar10").glob("*.json"))]
    evaluated = [within(path, _evaluated, load(path)) for path in sorted((directory / "evaluate").glob("cifar10-*.json"))]

    def rows(part: str, make: Callable[[Mapping[str, Any]], Any], key: str = "rows") -> tuple[Any, ...]:
        return tuple(within(directory / FILES[part], make, row) for row in found.get(part, {}).get(key, ()))

    records = Records(
        runs=tuple(runs), evaluated=tuple(evaluated), resumed=rows("resumed", _resumed),
        kills=rows("kills", lambda row: build(Kills, {**row})),
        overhead=rows("overhead", lambda row: build(Overhead, {**row})), steps=rows("steps", _speed),
        outside=rows("steps", lambda row: build(Outside, {**row}), "outside"), pipelines=rows("pipelines", _speed),
        hardware={part: hardware(data.get("environment")) for part, data in found.items()},
    )  # fmt: skip
    return records, _missing(records)


def _missing(records: Records) -> dict[str, str]:
    return {part: f"not recorded here; {command} records it" for part, command in COMMANDS.items() if not records.part(part)}


def hardware(environment: Any) -> str:
    """`2 cores of Intel(R) Xeon(R) ...`, and the accelerators, of a recorded environment; empty when it does not say."""
    cpu = environment.get("cpu", {}) if isinstance(environment, Mapping) else {}
    if "model" not in cpu:
        return ""
    count = cpu.get("affinity") or cpu.get("cores")
    cores = f"{count} core{'s' if count != 1 else ''} of " if count else ""
    return ", ".join([f"{cores}{cpu['model']}", *environment.get("accelerators", ())])


def load(path: Path) -> dict[str, Any]:
    """A record as plain data. InputRefused, by name, for a file that is none of this schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError) as error:
        raise InputRefused(f"{path} is no record: {error}") from None
    if not isinstance(data, dict) or data.get("schema", SCHEMA) != SCHEMA:
        raise InputRefused(f"{path} is no record of schema {SCHEMA}, which this version reads")
    for key in ("rows", "outside"):
        if not isinstance(data.get(key, []), list):
            raise InputRefused(f"{path} is no record: its {key!r} is {type(data[key]).__name__}, not a list")
    return data


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON; a record says null")


def within(path: Path, make: Callable[..., Any], *data: Any) -> Any:
    """What `make` makes of a record's data; what it refuses, it refuses by the file's name."""
    try:
        return make(*data)
    except (InputRefused, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputRefused(f"{path} is no record that this version reads: {error}") from None


def _run(data: Mapping[str, Any], stem: str) -> RecordedRun:
    """`<model>-<framework>` is in the file's name, when not in the file; a further seed's file has more after it."""
    model, _, framework = stem.partition("-")
    environment, about = data.get("environment", {}), data.get("data", {})
    cpu_seconds = data.get("cpu_seconds")
    known: dict[str, Any] = {"model": model, "framework": framework.partition("-")[0], "hardware": hardware(environment)}
    known |= {
        "cpu_minutes": None if cpu_seconds is None else cpu_seconds / 60,
        "code_sha256": data.get("triptych", {}).get("code_sha256", ""),
    }
    told = {"data": about["name"], "data_note": about.get("note", "")} if "name" in about else {}
    return build(RecordedRun, {**known, **{key: value for key, value in data.items() if key != "data"}, **told})


def _evaluated(data: Mapping[str, Any]) -> Evaluated:
    """What `triptych evaluate --json` prints."""
    agreement = data["agreement"]
    return Evaluated(
        Path(data["weights"]).name if Path(data["weights"]).is_absolute() else data["weights"],
        {name: row["top1_correct"] for name, row in data["frameworks"].items()}, agreement["images"], agreement["all"],
        tuple(agreement["differing"]), agreement.get("largest_logit_difference"), agreement.get("logit_scale"),
    )  # fmt: skip


def _resumed(row: Mapping[str, Any]) -> ResumedPair:
    return build(ResumedPair, {**row, "source": row["from"], "target": row["to"]})


def _speed(row: Mapping[str, Any]) -> Speed:
    return build(Speed, {**row})
