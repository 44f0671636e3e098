"""The section on the training system: what is read of committed records, what is asked of them, and what is said of absent ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from triptych.cli import main
from triptych.core.contract import FRAMEWORKS
from triptych.core.errors import InputRefused
from triptych.report import record
from triptych.report.asked import asked
from triptych.report.blocks import Note, Table
from triptych.report.evidence import Evidence
from triptych.report.on_record import on_record

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"
ENVIRONMENT = {"cpu": {"model": "Test CPU", "cores": 2, "affinity": 2}}
INTERVAL = {"ratio": 1.2, "interval": [1.1, 1.3], "n": 20}
PAIRS = [(a, b) for a in FRAMEWORKS for b in FRAMEWORKS if a != b]


def run(accuracy: float) -> dict[str, Any]:
    return {
        "schema": 1, "test_accuracy": accuracy, "seconds": 600.0, "epochs": 19.0, "seed": 0, "environment": ENVIRONMENT,
        "data": {"name": "JPEG-compressed CIFAR-10", "note": "Not quite the original pixels."},
    }  # fmt: skip


def whole() -> dict[str, Any]:
    """A record of each part, under its path, in which everything that is asked holds."""
    rows: dict[str, list[dict[str, Any]]] = {
        "resume/matrix.json": [
            {"from": a, "to": b, "state_bit_equal": True, "first_step_error": 2e-14, "ratio": 0.5, "passed": True} for a, b in PAIRS
        ],
        "resume/kills.json": [{"framework": name, "kills": 24, "during_save": 9, "bitwise_equal": True} for name in FRAMEWORKS],
        "resume/overhead.json": [{"framework": name, "ratio": 1.01, "interval": [1.0, 1.02], "n": 20} for name in FRAMEWORKS],
        "speed/step.json": [
            {"framework": name, "model": "resnet50", "lane": lane, "against": "stock", **INTERVAL, "ratio": 2.5}
            for name in FRAMEWORKS
            for lane in ("default", "tuned")
        ],
        "speed/data.json": [{"framework": name, "against": "a DataLoader", **INTERVAL, "ratio": 8.0} for name in FRAMEWORKS],
    }
    files: dict[str, Any] = {path: {"schema": 1, "environment": ENVIRONMENT, "rows": found} for path, found in rows.items()}
    outside = [{"framework": name, "model": "resnet50", "share": 0.01, "interval": [0.0, 0.02], "n": 20} for name in FRAMEWORKS]
    files["speed/step.json"]["outside"] = outside
    files |= {f"cifar10/resnet20-{name}.json": run(0.866 + 0.001 * i) for i, name in enumerate(FRAMEWORKS)}
    files["cifar10/resnet18_cifar-pytorch.json"] = run(0.9)
    files["evaluate/cifar10-resnet20.json"] = {
        "weights": "checkpoints/resnet20", "frameworks": {name: {"top1_correct": 8660} for name in FRAMEWORKS},
        "agreement": {"images": 10_000, "all": 10_000, "differing": []},
    }  # fmt: skip
    return files


def evidence_of(folder: Path, files: dict[str, Any]) -> Evidence:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(data))
    records, missing = record.read(folder)
    return Evidence(records=records, missing=missing, commands=dict(record.COMMANDS))


def test_everything_that_is_asked_can_hold(tmp_path: Path) -> None:
    claims = list(asked(evidence_of(tmp_path, whole())))
    assert len(claims) == 1 + 2 + 4 + 2 * len(FRAMEWORKS) + 2
    assert [claim.text for claim in claims if claim.holds is not True] == []
    assert all(claim.command for claim in claims)


def test_nothing_holds_of_an_empty_folder_and_the_command_is_named(tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path, {})
    assert {claim.holds for claim in asked(evidence)} == {None}
    notes = [block.text for block in on_record(evidence) if isinstance(block, Note)]
    assert len(notes) == len(record.COMMANDS)
    assert all(any(command in note for note in notes) for command in record.COMMANDS.values())
    assert not any(isinstance(block, Table) for block in on_record(evidence))


@pytest.mark.parametrize(
    ("path", "changes", "text"),
    [
        ("cifar10/resnet18_cifar-pytorch.json", {"test_accuracy": 0.85}, "resnet18_cifar .* lowest test accuracy"),
        ("cifar10/resnet20-jax.json", {"test_accuracy": 0.88}, "resnet20 .* frameworks apart"),
        ("resume/kills.json", {"bitwise_equal": False}, "Killed and resumed"),
        ("resume/kills.json", {"kills": 19}, "Killed and resumed"),
        ("resume/matrix.json", {"state_bit_equal": False}, "resumed in another framework"),
        ("resume/matrix.json", {"first_step_error": 1e-9}, "resumed in another framework"),
        ("resume/matrix.json", {"ratio": 5.1}, "resumed in another framework"),
        ("resume/overhead.json", {"ratio": 1.04}, "Time with checkpoints"),
        ("speed/step.json", {"interval": [0.96, 1.3]}, "A training step of resnet50 in .* over the stock one"),
        ("speed/data.json", {"ratio": 4.9}, "An input pipeline"),
    ],
)
def test_one_row_that_misses_what_is_asked_fails_its_claim(path: str, changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    files = whole()
    files[path].get("rows", [files[path]])[0].update(changes)
    failed = [claim.text for claim in asked(evidence_of(tmp_path, files)) if claim.holds is False]
    assert len(failed) == 1
    assert re.search(text, failed[0])


@pytest.mark.parametrize(
    "absent", ["cifar10/resnet20-jax.json", "cifar10/resnet18_cifar-pytorch.json", "resume/kills.json", "resume/matrix.json"]
)
def test_what_is_there_in_part_only_is_not_shown(absent: str, tmp_path: Path) -> None:
    files = whole()
    if "rows" in files[absent]:
        files[absent]["rows"].pop()
    else:
        del files[absent]
    claims = list(asked(evidence_of(tmp_path, files)))
    assert [claim.holds for claim in claims].count(None) == 1
    assert False not in [claim.holds for claim in claims]


def test_every_part_has_its_table(tmp_path: Path) -> None:
    blocks = list(on_record(evidence_of(tmp_path, whole())))
    captions = " ".join(block.caption for block in blocks if isinstance(block, Table))
    for words in (
        "what was asked",
        "resnet20",
        "resnet18_cifar",
        "evaluated in several",
        "resumed in another",
        "kill -9",
        "checkpoints written",
    ):
        assert words in captions
    assert "2 cores of Test CPU" in captions
    assert not [block for block in blocks if isinstance(block, Note)]


def test_the_committed_records_are_read() -> None:
    records, missing = record.read(COMMITTED)
    assert {(run.model, run.framework) for run in records.runs} >= {("resnet20", name) for name in FRAMEWORKS}
    assert not set(missing) & {"cifar10", "evaluated"}
    recorded = {Path(row.weights).name: row for row in records.evaluated}
    for found in (each for each in records.runs if each.model == "resnet20"):
        assert set(recorded[f"resnet20-{found.framework}"].correct.values()) == {found.test_correct}


KILLS = '{"framework": "jax", "during_save": 0, "bitwise_equal": true, "kills": %s}'


@pytest.mark.parametrize(
    "text",
    [
        *(f'{{"rows": [{KILLS % wrong}]}}' for wrong in ('"24"', "24.5", "null", "true", "[24]")),
        "{",
        "[]",
        '{"schema": 2}',
        '{"schema": 1, "rows": [{"kills": 3}]}',
        '{"schema": 1, "rows": [{"kills": NaN}]}',
        '{"rows": 3}',
    ],
)
def test_a_file_that_is_no_record_is_refused_by_name(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "records" / "resume" / "kills.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(InputRefused, match=r"kills\.json is no record"):
        record.read(tmp_path / "records")
    with pytest.raises(SystemExit) as ended:
        main(["report", "--records", str(tmp_path / "records"), "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")])
    assert ended.value.code == InputRefused.exit_code
    assert "kills.json is no record" in capsys.readouterr().err
