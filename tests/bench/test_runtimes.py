"""ONNX Runtime and OpenVINO run our exported model, held to a proven lane before and while they are timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from triptych.bench import session, suite
from triptych.core import catalog, contract, initialize
from triptych.core.errors import FrameworkMissing
from triptych.export import runtimes

INSTALLED = [name for name in runtimes.RUNTIMES if runtimes.missing(name) is None]

needs_both = pytest.mark.skipif(
    not INSTALLED or "pytorch" not in contract.installed(), reason="what is exported, and run, needs PyTorch and triptych[runtimes]"
)


@pytest.fixture(scope="module")
def pytorch(lab: Any) -> Any:
    """A worker that has exported the tiny model, and the same with a bias that is a thousandth off."""
    worker, folder = lab.Local("pytorch"), lab.proof.weights.parent
    weights = load_file(lab.proof.weights)
    save_file({**weights, "fc.bias": weights["fc.bias"] + 1e-3}, folder / "other.safetensors")
    for source, name in ((lab.proof.weights, "model.onnx"), (folder / "other.safetensors", "other.onnx")):
        worker.ask("export", model="mlp", options=lab.options, weights=str(source), path=str(folder / name))
    return worker


def proof(lab: Any, name: str = "model.onnx") -> Any:
    """The proof, with an exported model."""
    return dataclasses.replace(lab.proof, exported=lab.proof.weights.with_name(name))


@needs_both
@pytest.mark.parametrize("name", INSTALLED)
def test_a_runtime_is_timed_with_its_outputs_held_to_ours(name: str, lab: Any, pytorch: Any, tmp_path: Path) -> None:
    chosen = lab.suite(frameworks=["pytorch", name], check_every=2)
    group = lab.group(chosen, {"pytorch": pytorch, name: lab.Local(name)}, proof(lab))
    made = lab.record(tmp_path / "tiny.json", chosen, [group])
    ours, row = made["rows"]
    assert (ours["certificate"]["kind"], row["certificate"]["kind"]) == ("parity", "outputs")
    assert row["certificate"]["against"] == "pytorch/default"
    assert row["certificate"]["turns"] == 3, "before the first round, and in every second"
    assert row["certificate"]["worst_error"] <= row["certificate"]["tolerance"] == 1e-5
    assert (row["lane"], row["n"]) == ("default", 4)
    assert session.outcome(made) is None


@needs_both
@pytest.mark.parametrize("name", INSTALLED)
def test_a_runtime_with_other_weights_has_no_row(name: str, lab: Any, pytorch: Any) -> None:
    chosen = lab.suite(frameworks=["pytorch", name])
    group = lab.group(chosen, {"pytorch": pytorch, name: lab.Local(name)}, proof(lab, "other.onnx"))
    ours, foreign = group.entries
    assert ours.failure is None
    assert foreign.failure is not None
    assert "from pytorch/default's, more than 1.0e-05" in foreign.failure
    assert foreign.turns == []


@needs_both
@pytest.mark.parametrize("name", INSTALLED)
def test_one_file_serves_every_batch_size(name: str, lab: Any, pytorch: Any) -> None:
    contender = runtimes.load(name).contender(proof(lab).exported)
    images = np.random.default_rng(0).standard_normal((5, *catalog.get_spec("mlp", **lab.options).input_shape), dtype=np.float32)
    whole = contender.run(contender.stage(images, np.zeros(5)))
    for size in (1, 3):
        part = contender.run(contender.stage(images[:size], np.zeros(size)))
        np.testing.assert_allclose(part, whole[:size], rtol=1e-5, atol=1e-6)


@needs_both
@pytest.mark.parametrize("name", INSTALLED)
def test_a_model_of_features_is_exported_under_its_own_name(name: str, lab: Any, tmp_path: Path) -> None:
    spec = catalog.get_spec("transformer_block", tokens=4, width=8, heads=2, mlp_width=12)
    weights, room = initialize.parity_weights(spec, 0, "float32"), contract.load("pytorch")
    room.export(room.create_model(spec, weights, precision="float32", device="cpu"), "onnx", tmp_path / "block.onnx")
    contender = runtimes.load(name).contender(tmp_path / "block.onnx")
    model = room.create_model(spec, weights, precision="float32", device="cpu")
    for size in (1, 3):
        features = np.random.default_rng(size).standard_normal((size, *spec.output_shape), dtype=np.float32)
        found = contender.run(contender.stage(features, np.zeros(size)))
        np.testing.assert_allclose(found, model.predict(features), rtol=1e-5, atol=1e-5)


def test_what_is_not_installed_is_a_row_with_the_pip_line(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    line = "OpenVINO is not installed (openvino, onnx, onnxscript not found). Install it with: pip install 'triptych[runtimes]'"
    assert suite.Case("openvino", "mlp", {}, "default", "inference", 1).unavailable() == line
    with pytest.raises(FrameworkMissing, match="triptych"):
        runtimes.load("openvino")


def test_an_export_that_failed_is_the_reason_in_the_row_and_no_other_row_suffers(lab: Any) -> None:
    refused = FrameworkMissing("disk full")
    name = next(iter(runtimes.RUNTIMES))
    chosen = lab.suite(frameworks=["pytorch", name])
    if suite.Case(name, "mlp", {}, "default", "inference", 1).unavailable():
        pytest.skip("the runtime is not installed")
    group = lab.group(chosen, {"pytorch": lab.Local("pytorch")}, dataclasses.replace(lab.proof, exported=refused))
    assert [entry.failure for entry in group.entries] == [None, "nothing was exported for it: disk full"]
