"""Model repositories of other servers: what these will read is read here by their own definitions, and computes what the artefact does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from safetensors.numpy import save_file
from tensorboard.compat.tensorflow_stub.errors import DataLossError

from triptych.cli.serve import SERVERS, serve_command
from triptych.core.errors import ExportFailed, InputRefused, StorageError, UsageError
from triptych.export import matrix, runtimes, session
from triptych.serving import layouts, prediction_log
from triptych.serving.layouts import LAYOUTS
from triptych.serving.options import Options
from triptych.serving.prediction_log import Request

onnx = pytest.importorskip("onnx")
FLOATS = np.array([[[[0.5], [-2.0]], [[1.0], [3.25]]]], np.float32)
# What tensorflow-serving-api 2.21 serializes of the same requests, deterministically.
GOLDEN = {
    "32510a4f0a1b0a087265736e657432301a0f73657276696e675f64656661756c7412300a06696d61676573122608011210120208011202080212020802120208012210"
    "0000003f000000c00000803f00005040": Request("resnet20", "serving_default", "images", FLOATS),
    "32410a3f0a180a087265736e657432301a0c73657276655f696d6167657312230a07656e636f646564121808071204120208024205ffd86f6e65420789504e4774776f":
        Request("resnet20", "serve_images", "encoded", [b"\xff\xd8one", b"\x89PNGtwo"]),
}  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("data", GOLDEN)
def test_a_warm_up_request_is_what_tensorflow_servings_own_library_writes(data):
    request = GOLDEN[data]
    assert prediction_log.encoded(request).hex() == data
    read = prediction_log.decoded(bytes.fromhex(data))
    assert (read.model, read.signature, read.input) == (request.model, request.signature, request.input)
    np.testing.assert_array_equal(read.value, request.value)


def test_a_damaged_warm_up_file_is_not_read(tmp_path):
    prediction_log.write(tmp_path / "requests", list(GOLDEN.values()))
    assert len(list(prediction_log.read(tmp_path / "requests"))) == 2
    data = bytearray((tmp_path / "requests").read_bytes())
    data[40] ^= 1
    (tmp_path / "requests").write_bytes(data)
    with pytest.raises(DataLossError):
        list(prediction_log.read(tmp_path / "requests"))


def model_config(path: Path) -> Any:
    """A Triton configuration, parsed by Triton's own definition of it, without gRPC."""
    pytest.importorskip("tritonclient")
    place = Path(str(importlib.util.find_spec("tritonclient").submodule_search_locations[0])) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return text_format.Parse(path.read_text(), module.ModelConfig())


def test_triton_is_told_what_the_file_takes(exported, tmp_path):
    row = layouts.write(LAYOUTS["triton"], exported, tmp_path / "models", Options(max_batch=16, max_delay=0.003))
    assert set(files(tmp_path / "models")) == {"resnet20/config.pbtxt", "resnet20/1/model.onnx"} == set(row["files"])
    assert (tmp_path / "models/resnet20/1/model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()
    assert row["errors"] == {"logits": 0.0}
    assert row["server_was_run"] is False
    config = model_config(tmp_path / "models/resnet20/config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("resnet20", "onnxruntime", 16)
    assert [(each.name, each.data_type, list(each.dims)) for each in config.input] == [("images", 11, [3, 32, 32])]
    assert [(each.name, each.data_type, list(each.dims)) for each in config.output] == [("logits", 11, [10])]
    assert config.dynamic_batching.max_queue_delay_microseconds == 3000


def test_triton_does_not_batch_where_we_would_not(exported, tmp_path):
    layouts.write(LAYOUTS["triton"], exported, tmp_path / "models", Options(max_batch=1))
    assert not model_config(tmp_path / "models/resnet20/config.pbtxt").HasField("dynamic_batching")


def test_a_file_of_one_batch_size_is_not_laid_out(written, tmp_path):
    def fix(path: Path) -> None:
        model = onnx.load(path)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
        onnx.save(model, path)

    with pytest.raises(InputRefused, match="dynamic batch"):
        layouts.write(LAYOUTS["triton"], written(tmp_path, change=fix), tmp_path / "models", Options())
    assert not (tmp_path / "models").exists()


def test_tensorflow_serving_is_warmed_up_by_requests_that_were_called(saved_model, tmp_path):
    directory, _ = saved_model
    row = layouts.write(LAYOUTS["tf-serving"], directory, tmp_path / "models", Options())
    version = tmp_path / "models/resnet20/1"
    assert {"saved_model.pb", "variables/variables.index", prediction_log.PLACE} <= set(files(version))
    assert row["errors"] == {"serving_default": 0.0, "serve_images": 0.0}
    requests = list(prediction_log.read(version / prediction_log.PLACE))
    assert [(each.model, each.signature, each.input, len(each.value)) for each in requests] == [
        ("resnet20", signature, given, count)
        for count in (7, 1)
        for signature, given in (("serving_default", "images"), ("serve_images", "encoded"))
    ]
    assert requests[0].value.shape == (7, 32, 32, 3)
    assert requests[0].value.std() > 0.1, "real images"


def test_openvinos_server_finds_the_model_beside_its_configuration(written, tmp_path):
    reason = runtimes.missing("openvino")
    if reason:
        pytest.skip(reason)

    def converted(path: Path) -> None:
        converter = session.process("openvino", tmp_path / "log")
        try:
            converter.ask("convert", given=str(path), path=str(path.with_suffix(".xml")))
        finally:
            converter.stop()
        path.unlink()

    directory = written(tmp_path, change=converted, format="openvino")
    layouts.write(LAYOUTS["ovms"], directory, tmp_path / "models", Options())
    assert set(files(tmp_path / "models")) == {"config.json", "resnet20/1/model.xml", "resnet20/1/model.bin"}
    (model,) = json.loads((tmp_path / "models/config.json").read_text())["model_config_list"]
    assert model == {"config": {"name": "resnet20", "base_path": "resnet20"}}


@pytest.mark.parametrize(("server", "runtime"), [("triton", "onnxruntime"), ("ovms", "openvino")])
def test_int8_is_laid_out_too(written, tmp_path, server, runtime):
    form = next(name for name in LAYOUTS[server].formats if name.endswith("int8"))
    reason = runtimes.missing(runtime) or next(cell for cell in matrix.CELLS if cell.name == f"pytorch-{form}").missing()
    if reason:
        pytest.skip(reason)
    images = np.random.default_rng(0).standard_normal((8, 32, 32, 3), dtype=np.float32)
    save_file({"images": images}, tmp_path / "calibration")

    def quantized(path: Path) -> None:
        exact = path.rename(tmp_path / "exact.onnx")
        converter = session.process(runtime, tmp_path / "log")
        try:
            target, calibration = path.with_name(matrix.FORMATS[form].file), str(tmp_path / "calibration")
            converter.ask("quantize", given=str(exact), path=str(target), calibration=calibration, channels_first=True)
        finally:
            converter.stop()

    row = layouts.write(LAYOUTS[server], written(tmp_path, change=quantized, format=form), tmp_path / "models", Options())
    assert (row["format"], row["errors"]) == (form, {"logits": 0.0})
    assert f"resnet20/1/{matrix.FORMATS[form].file}" in files(tmp_path / "models")


def test_what_computes_something_else_is_not_handed_over(exported, tmp_path, monkeypatch):
    copied = layouts._copy

    def spoilt(served: Any, version: Path) -> None:
        copied(served, version)
        model = onnx.load(version / "model.onnx")
        values = np.array(onnx.numpy_helper.to_array(model.graph.initializer[0]))
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values * 1.01, model.graph.initializer[0].name))
        onnx.save(model, version / "model.onnx")

    monkeypatch.setattr(layouts, "_copy", spoilt)
    with pytest.raises(ExportFailed, match="logits"):
        layouts.write(LAYOUTS["triton"], exported, tmp_path / "models", Options())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_lost_unasked(exported, tmp_path):
    out = tmp_path / "models"
    (out / "resnet20").mkdir(parents=True)
    (out / "resnet20" / "mine").write_text("kept")
    with pytest.raises(StorageError, match="exists already"):
        layouts.write(LAYOUTS["triton"], exported, out, Options())
    assert files(out) == {"resnet20/mine": b"kept"}
    (out / "other").touch()
    with pytest.raises(StorageError, match="other"):
        layouts.write(LAYOUTS["triton"], exported, out, Options(), overwrite=True)
    (out / "other").unlink()
    layouts.write(LAYOUTS["triton"], exported, out, Options(), overwrite=True)
    assert set(files(out)) == {"resnet20/config.pbtxt", "resnet20/1/model.onnx"}


def test_the_command_line(exported, tmp_path):
    assert tuple(LAYOUTS) == SERVERS
    run = CliRunner().invoke
    for arguments in (["--layout", "triton"], ["--out", str(tmp_path / "x")], ["--overwrite"]):
        assert isinstance(run(serve_command, [str(exported), *arguments]).exception, UsageError)
    wrong = run(serve_command, [str(exported), "--layout", "ovms", "--out", str(tmp_path / "x")]).exception
    assert isinstance(wrong, UsageError)
    assert "wanted is openvino or openvino_int8: `triptych export resnet20 --from pytorch --to openvino" in str(wrong)
    done = run(serve_command, [str(exported), "--layout", "triton", "--out", str(tmp_path / "x"), "--json"])
    assert json.loads(done.output)["server"] == "Triton Inference Server"
