"""Export from end to end, with a small ResNet: every artefact runs in a process of its own, and one that is wrong leaves nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych import cli
from triptych.core import catalog, contract
from triptych.core.conversation import Failed
from triptych.core.errors import ExportFailed, StorageError
from triptych.export import matrix, session

SPEC = catalog.tiny(catalog.get_spec("resnet20"))
ELSEWHERE = {"pytorch-aotinductor", "tensorflow-openvino", "jax-openvino"}
"""Compiled by a C++ compiler for minutes, or another framework's is tested: benchmarks/results/export/matrix.json has them all."""


def cells(source: str, *formats: str) -> tuple[matrix.Cell, ...]:
    """These cells of a source, or all quick ones; the test is skipped when a library is missing."""
    found = [cell for cell in matrix.chosen([source], list(formats or ["all"])) if cell.name not in ELSEWHERE]
    reason = next((reason for cell in found if (reason := cell.missing())), None)
    if reason:
        pytest.skip(reason)
    return tuple(found)


def exported(out: Path, chosen: tuple[matrix.Cell, ...], start: Any = session.process, **options: Any) -> list[dict[str, Any]]:
    """The rows of an export of the small model."""
    return session.run(session.Request(SPEC, None, chosen, out, **options), lambda text: None, start)


@pytest.mark.parametrize("source", matrix.SOURCES)
def test_every_artefact_computes_what_its_source_does(source: str, tmp_path: Path) -> None:
    chosen = cells(source)
    rows = exported(tmp_path, chosen)
    assert session.outcome(rows) is None
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(cell.name for cell in chosen)
    for row in rows:
        folder = tmp_path / f"{row['source']}-{row['format']}"
        assert [check["batch"] for check in row["checks"]] == [7, 1]
        assert row["worst_error"] <= row["tolerance"]
        assert row["tolerance"] == 1e-5 or row["format"] in ("tflite_float16", "tflite_int8")
        assert all(check["scale"] > 0.1 for check in row["checks"]), "logits that are all but zero would prove nothing"
        written = json.loads((folder / "export.json").read_text())
        assert written["worst_error"] == row["worst_error"]
        assert written["files"].keys() == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"export.json"}
        for name, entry in written["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
        assert set(row["written_with"]) >= {"pytorch": {"torch"}, "tensorflow": {"tensorflow"}, "jax": {"jax"}}[source]
        check_loaded(row)


def check_loaded(row: dict[str, Any]) -> None:
    """No framework ran but the runtime's own, and none of ours."""
    own = {
        "torchscript": ["torch"], "torch_export": ["torch"], "stablehlo": ["jax"],
        "saved_model": ["tensorflow"], "keras": ["tensorflow", "keras"],
    }  # fmt: skip
    assert row["frameworks_loaded"] == own.get(row["runtime"], [])


class Spoiler:
    """A worker whose ONNX files have other weights in one convolution."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """As the worker answers."""
        answer: dict[str, Any] = self.worker.ask(do, **given)
        if do == "write":
            spoil(Path(given["path"]), "layer2.1.conv1.weight")
        return answer

    def stop(self) -> None:
        """End it."""
        self.worker.stop()


def spoil(path: Path, tensor: str) -> None:
    """A thousandth more in one weight of this tensor."""
    import onnx

    model = onnx.load(path)
    (found,) = [each for each in model.graph.initializer if each.name == tensor]
    values = np.array(onnx.numpy_helper.to_array(found))
    values[0] *= 1.01
    found.CopyFrom(onnx.numpy_helper.from_array(values, tensor))
    onnx.save(model, path)


def test_a_wrong_file_is_removed_and_its_first_wrong_node_is_named(tmp_path: Path) -> None:
    chosen = cells("pytorch", "onnx")
    (good,) = exported(tmp_path, chosen)
    before = {path.name: path.read_bytes() for path in (tmp_path / "pytorch-onnx").iterdir()}
    (row,) = exported(tmp_path, chosen, lambda role, log: Spoiler(session.process(role, log)), overwrite=True)
    assert good["passed"]
    assert not row["passed"]
    assert "the first layer that differs is layer2.1.conv1, node " in row["failure"]
    assert "(Conv)" in row["failure"]
    failed = session.outcome([good, row])
    assert isinstance(failed, ExportFailed)
    assert failed.exit_code == 7
    assert {path.name: path.read_bytes() for path in (tmp_path / "pytorch-onnx").iterdir()} == before, "the verified one stays"
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch-onnx"], "and nothing half-written beside it"


class Dead:
    """A worker that cannot even start."""

    stopped = 0

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """What a process tells that was killed."""
        raise Failed("ProcessEnded", "killed, as systems do when memory ends")

    def stop(self) -> None:
        """Counted."""
        Dead.stopped += 1


def test_a_process_that_dies_is_the_reason_of_each_of_its_cells(tmp_path: Path) -> None:
    rows = exported(tmp_path, cells("pytorch", "torchscript", "torch_export"), lambda role, log: Dead())
    assert [row["failure"] for row in rows] == ["ProcessEnded: killed, as systems do when memory ends"] * 2
    assert Dead.stopped == 2
    failed = session.outcome(rows)
    assert failed is not None
    assert failed.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "pytorch-torchscript").mkdir()
    with pytest.raises(StorageError, match="it exists already"):
        exported(tmp_path, cells("pytorch", "torchscript"))


def run(*arguments: object) -> int:
    """Run `triptych export`; the exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", *map(str, arguments)])
    return int(caught.value.code or 0)


def test_the_list_shows_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == matrix.table()


def test_the_command_refuses_by_name_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("mlp", "--to", "torchscript", "--from", "jax", "--out", tmp_path / "x") == 2
    assert "jax does not export to torchscript: TorchScript" in capsys.readouterr().err
    assert run("mlp", "--to", "onnx") == 2
    assert run("resnet5", "--to", "all", "--out", tmp_path / "x") == 2
    assert not (tmp_path / "x").exists()


def test_the_command_exports_and_prints_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "pytorch" not in contract.installed():
        pytest.skip("pytorch is not installed")
    options = ("--from", "pytorch", "--to", "torchscript", "--out", tmp_path, "--image-size", 8, "--json")
    assert run("mlp", *options) == 0
    printed = json.loads(capsys.readouterr().out)
    (row,) = printed["rows"]
    assert row["passed"]
    assert row["worst_error"] <= 1e-5
    assert json.loads((tmp_path / "pytorch-torchscript" / "export.json").read_text())["command"].startswith("triptych export mlp --from")
