"""A converter in its own environment: found or told how to build, and what it makes is verified as every other artefact."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from triptych import cli
from triptych.core import catalog, contract
from triptych.core.conversation import Failed
from triptych.core.spec import ImageSpec
from triptych.export import converters, matrix, session

ROOT = Path(__file__).parents[2]
(CELL,) = matrix.chosen(["pytorch"], ["saved_model"])
ONNX2TF = converters.CONVERTERS["onnx2tf"]


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No environment: the variable names a file that is not there."""
    monkeypatch.setenv(ONNX2TF.variable, str(tmp_path / "nowhere" / "python"))


def exported(name: str, out: Path) -> dict[str, Any]:
    """The row of a small model's SavedModel from PyTorch."""
    spec = catalog.tiny(catalog.get_spec(name))
    assert isinstance(spec, ImageSpec)
    (row,) = session.run(session.Request(spec, None, (CELL,), out), lambda text: None)
    return row


def test_it_is_where_the_variable_says_or_beside_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ONNX2TF.variable, raising=False)
    assert ONNX2TF.python() == Path(sys.prefix).parent / ".venv-onnx2tf" / "bin" / "python"
    monkeypatch.setenv(ONNX2TF.variable, "elsewhere/bin/python")
    assert ONNX2TF.python() == Path("elsewhere/bin/python")
    assert ONNX2TF.command()[1:] == ["-I", str(Path(converters.__file__).parent / "convert_onnx2tf.py")]


@pytest.mark.usefixtures("absent")
def test_without_its_environment_the_cell_is_unavailable_and_the_command_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if reason := contract.missing("pytorch"):
        pytest.skip(reason)
    reason = CELL.missing()
    assert reason is not None
    assert "make converters" in reason
    assert ONNX2TF.variable in reason
    assert str(tmp_path) not in reason, "records name no path"
    row = exported("mlp", tmp_path / "out")
    assert (row["unavailable"], row["failure"], row["passed"]) == (reason, None, False)
    assert session.outcome([row]) is None
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", "mlp", "--from", "pytorch", "--to", "saved_model", "--out", str(tmp_path / "out")])
    assert caught.value.code == 3
    assert "make converters" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_python_without_the_converter_is_a_failure_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho no onnx2tf here >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setenv(ONNX2TF.variable, str(bare))
    worker = session.process("onnx2tf", tmp_path / "log")
    with pytest.raises(Failed, match=r"onnx2tf was ended with code 1; its last words: 'no onnx2tf here'"):
        worker.ask("start")
    worker.stop()


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_what_it_makes_computes_what_pytorch_does(name: str, tmp_path: Path) -> None:
    """resnet20: as many channels as rows and columns, where onnx2tf by itself was wrong by a quarter of the largest logit."""
    if reason := CELL.missing():
        pytest.skip(reason)
    row = exported(name, tmp_path)
    assert row["failure"] is None
    assert row["worst_error"] <= row["tolerance"] == 1e-5
    assert [check["batch"] for check in row["checks"]] == [7, 1]
    assert (row["layout"], row["frameworks_loaded"]) == ("NHWC", ["tensorflow"])
    assert row["written_with"]["onnx2tf"] == "1.29.24"


def test_what_it_cannot_convert_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    if reason := CELL.missing():
        pytest.skip(reason)
    row = exported("vit_tiny_patch16_224", tmp_path)
    assert "Dimensions must be equal" in row["failure"]
    assert list(tmp_path.iterdir()) == []


def test_its_lock_is_pinned_by_hash_and_made_by_the_script() -> None:
    lock = (ROOT / "requirements" / "onnx2tf.txt").read_text()
    entries = re.split(r"\n(?=\S)", re.sub(r"^\s*#.*\n", "", lock, flags=re.MULTILINE).strip())
    assert len(entries) > 50
    assert all(re.match(r"[\w.-]+==\S+ \\\n\s+--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    assert "pinned onnx2tf " in (ROOT / "requirements" / "lock.sh").read_text()
    assert "http" not in lock
    assert os.access(ROOT / "requirements" / "lock.sh", os.X_OK)
