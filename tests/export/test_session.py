"""Export from end to end, with a small ResNet: every artefact runs in a process of its own, and one that is wrong leaves nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych import cli
from triptych.core import catalog, contract, initialize
from triptych.core.conversation import Failed
from triptych.core.errors import ExportFailed, StorageError, UsageError
from triptych.core.tolerance import EXPORTED
from triptych.data import digits
from triptych.export import images, matrix, session

SPEC = catalog.tiny(catalog.get_spec("resnet20"))
ELSEWHERE = {"pytorch-aotinductor", "pytorch-saved_model", "tensorflow-openvino", "jax-openvino"}
"""Compiled by a C++ compiler for minutes, of another environment (test_converters.py), or another framework's is tested."""


def cells(source: str, *formats: str) -> tuple[matrix.Cell, ...]:
    """These cells of a source, or all quick ones; the test is skipped when a library is missing."""
    found = [cell for cell in matrix.chosen([source], list(formats or ["all"])) if cell.name not in ELSEWHERE]
    reason = next((reason for cell in found if (reason := cell.missing())), None)
    if reason:
        pytest.skip(reason)
    return tuple(found)


def exported(
    out: Path, chosen: tuple[matrix.Cell, ...], start: Any = session.process, weights: Any = None, **options: Any
) -> list[dict[str, Any]]:
    """The rows of an export of the small model."""
    return session.run(session.Request(SPEC, weights, chosen, out, **{"calibration_images": 64, **options}), lambda text: None, start)


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
        assert row["tolerance"] == EXPORTED[matrix.FORMATS[row["format"]].bound]
        assert row["same_class"] >= (32 if row["tolerance"] == 1e-5 else 30)
        assert row["of_images"] == 32
        assert all(check["scale"] > 0.1 for check in row["checks"]), "logits that are all but zero would prove nothing"
        written = json.loads((folder / "export.json").read_text())
        assert written["worst_error"] == row["worst_error"]
        assert written["files"].keys() == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"export.json"}
        for name, entry in written["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
        assert ("calibration" in written) == bool(matrix.FORMATS[row["format"]].calibration)
        assert set(row["written_with"]) >= {"pytorch": {"torch"}, "tensorflow": {"tensorflow"}, "jax": {"jax"}}[source]
        check_loaded(row)


def check_loaded(row: dict[str, Any]) -> None:
    """No framework ran but the runtime's own, and none of ours."""
    own = {
        "torchscript": ["torch"], "torch_export": ["torch"], "stablehlo": ["jax"],
        "saved_model": ["tensorflow"], "keras": ["tensorflow", "keras"],
    }  # fmt: skip
    assert row["frameworks_loaded"] == own.get(row["runtime"], [])


def test_int8_is_calibrated_on_training_images_and_judged_on_test_images(tmp_path: Path) -> None:
    (cell,) = cells("pytorch", "onnx_int8")
    weights = initialize.parity_weights(SPEC, 0, "float32")
    (row,) = exported(tmp_path, (cell,), weights=weights, calibration="digits", calibration_images=40)
    assert row["passed"], row["failure"]
    kept = json.loads((tmp_path / cell.name / "export.json").read_text())["calibration"]
    source = images.training("digits", SPEC, None, trained=True)
    chosen = images.calibration(source, 3, 40, set())
    assert kept == {
        **images.told(source, chosen), "split": "train", "order": images.ORDER, "method": matrix.FORMATS["onnx_int8"].calibration,
    }  # fmt: skip
    labels = digits.open_digits("test").labels
    assert row["of_images"] == row["accuracy"]["images"] == len(labels)
    assert row["same_class"] / row["of_images"] > 0.85, "untrained, its classes are close to each other"
    assert row["accuracy"]["artefact"] == pytest.approx(row["accuracy"]["source"], abs=0.05)
    check_int8(tmp_path / cell.name / "model.onnx")


def check_int8(path: Path) -> None:
    """Every kernel is int8, of 7 bits, with a scale a channel; the logits are what the last product gives, in float32."""
    import onnx

    graph = onnx.load(path).graph
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    kernels = {name: value for name, value in stored.items() if name.endswith("weight_quantized")}
    assert len(kernels) == sum(layer.op in ("conv", "linear") for layer in SPEC.layers())
    for name, value in kernels.items():
        assert value.dtype == np.int8
        assert 32 < np.abs(value.astype(int)).max() <= 64
        assert stored[name.removesuffix("_quantized") + "_scale"].shape == (len(value) if value.ndim == 4 else SPEC.num_classes,)
    (last,) = [node for node in graph.node if "logits" in node.output]
    assert last.op_type == "Gemm"


def test_images_that_do_not_fit_are_an_error_only_where_int8_was_asked_for(tmp_path: Path) -> None:
    (cell,) = cells("pytorch", "onnx_int8")
    options: dict[str, Any] = {"weights": initialize.parity_weights(SPEC, 0, "float32"), "labels": tuple("abcdefghij")}
    with pytest.raises(UsageError, match="by --calibration"):
        exported(tmp_path / "a", (cell,), **options)
    assert not (tmp_path / "a").exists()
    (row,) = exported(tmp_path / "b", (cell,), optional_calibration=True, **options)
    assert "by --calibration" in row["unavailable"]
    assert session.outcome([row]) is None
    assert list((tmp_path / "b").iterdir()) == []


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
    assert run("mlp", "--to", "torchscript", "--from", "pytorch", "--calibration", "digits", "--out", tmp_path / "x") == 2
    assert "--calibration is for tflite_int8, onnx_int8, openvino_int8: leave it out" in capsys.readouterr().err
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
