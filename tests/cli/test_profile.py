"""`triptych profile`: what is refused, and one whole run in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from triptych.cli import main
from triptych.core import contract


def ends(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as end:
        main(["profile", *arguments])
    shown = capsys.readouterr()
    return int(end.value.code or 0), shown.out, shown.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["resnet5"], 2, "did you mean 'resnet50'?"),
        (["resnet50", "--framework", "caffe"], 2, "choose from pytorch"),
        (["resnet50", "--mode", "sleep"], 2, "training_step"),
        (["resnet50", "--lane", "stock"], 2, "tuned_compiled"),
        (["resnet50", "--batch-size", "0"], 2, "batch-size"),
        (["mlp", "--lane", "tuned"], 2, "nothing to profile"),
        (["mlp", "--data", "nowhere"], 2, "no data at nowhere"),
        (["mlp", "--data", "digits", "--batch-size", "100000"], 2, "--batch-size of no more"),
    ],
)
def test_what_is_refused(arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, _, err = ends(arguments, capsys)
    assert (found, says in err) == (code, True), err


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = ends(["mlp", "--out", str(tmp_path / "file" / "out")], capsys)
    assert (code, "--out" in err) == (10, True), err


def test_a_whole_run_on_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    framework = contract.installed()[0]
    given = [
        "mlp",
        "--framework",
        framework,
        "--data",
        "digits",
        "--batch-size",
        "4",
        "--image-size",
        "8",
        "--threads",
        "1",
        "--repeats",
        "2",
    ]
    code, out, err = ends([*given, "--out", str(tmp_path / "out")], capsys)
    assert code == 0, err
    assert "matrix product" in out
    assert "trace.json.gz opens in ui.perfetto.dev" in out
    made = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert made["command"].startswith("triptych profile mlp --framework")
    assert str(tmp_path) not in made["command"]
    (row,) = made["rows"]
    assert row["data"] == "digits"
    assert len(row["traced_seconds"]) == 2
    assert row["categories"]["matrix_product"] > 0.0
    assert (tmp_path / "out" / "trace.json.gz").stat().st_size > 500
