"""`triptych convert` from end to end: what it writes, what it prints, how it exits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych import cli
from triptych.core import catalog, checkpoint, initialize, tensor_file


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    """A safetensors file of a ResNet-20 for 7 classes, from a DataParallel model whose head is called `linear`."""
    weights = initialize.parity_weights(catalog.get_spec("resnet20", num_classes=7), 1, "float32")
    state = {f"module.{name.replace('fc.', 'linear.')}": array for name, array in weights.items()}
    path = tmp_path / "resnet20.safetensors"
    path.write_bytes(tensor_file.encode(state))
    return path


def convert(*arguments: object) -> int:
    """Run `triptych convert`; the exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", *map(str, arguments)])
    return int(caught.value.code or 0)


def test_it_writes_a_checkpoint_and_says_what_mapped_to_what(
    weights_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(weights_file, "--model", "resnet20", "--out", tmp_path / "c") == 0
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded.spec == catalog.get_spec("resnet20", num_classes=7)
    assert np.array_equal(loaded.weights["fc.bias"], initialize.parity_weights(loaded.spec, 1, "float32")["fc.bias"])
    source = loaded.provenance["converted_from"]
    assert (source["file"], source["sha256"]) == (weights_file.name, hashlib.sha256(weights_file.read_bytes()).hexdigest())
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "module.linear.weight -> fc.weight" in captured.out
    assert "num_classes=7" in captured.out


def test_json_holds_every_key(weights_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(weights_file, "--model", "resnet20", "--out", tmp_path / "c", "--json") == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (data["model"], data["precision"], data["tensors"]) == ("resnet20", "float32", len(data["mapped"]))
    assert {"source": "module.linear.bias", "canonical": "fc.bias", "note": "renamed"} in data["mapped"]


def test_an_existing_directory_needs_overwrite(weights_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (weights_file, "--model", "resnet20", "--out", tmp_path / "c")
    assert convert(*arguments) == 0
    assert convert(*arguments) == 10
    assert "exists already" in capsys.readouterr().err
    assert convert(*arguments, "--overwrite") == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "resnet32"), 8, "try --model resnet20"),
        (("--model", "resnet20", "--num-classes", "10"), 8, "module.linear.bias (as fc.bias) is (7,), expected (10,)"),
        (("--model", "resnet20", "--ema"), 8, "no averaged"),
        (("--model", "resnet2O"), 2, "did you mean"),
        (("--model", "resnet20", "--num-classes", "0"), 2, "num-classes"),
        ((), 2, "--model"),
    ],
)
def test_refusals_have_their_exit_code_and_leave_nothing(
    weights_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, message: str
) -> None:
    assert convert(weights_file, "--out", tmp_path / "c", *arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "c").exists()


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(tmp_path / "none.pth", "--model", "resnet20", "--out", tmp_path / "c") == 8
    assert "no such file" in capsys.readouterr().err
