"""Malicious artefacts, made here: each is refused by name, and what it would have done is not done."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core import contract
from triptych.core.errors import InputRefused
from triptych.export import runtimes, safety

MARK = "was-here"


class Bomb:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that must not come to be."""
    return tmp_path / MARK


def framework(name: str) -> Any:
    """The room, which also sees to the order of imports; the test is skipped without it."""
    if name not in contract.installed():
        pytest.skip(f"{name} is not installed")
    return contract.load(name)


def check_refused(runtime: str, artefact: Path, match: str) -> None:
    """The runtime does not open this, and says why."""
    if runtimes.missing(runtime):
        pytest.skip(str(runtimes.missing(runtime)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn of their own end and of files that they then refuse
        with pytest.raises(InputRefused, match=match):
            runtimes.opened(runtime, artefact)


# Paths


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "model.onnx").symlink_to(tmp_path / "secret")
    folder = tmp_path / "saved_model"
    folder.mkdir()
    (folder / "saved_model.pb").symlink_to(tmp_path / "secret")
    for path in (tmp_path / "model.onnx", folder):
        with pytest.raises(InputRefused, match="is a link or a special file"):
            safety.check(path)
    with pytest.raises(InputRefused, match=r"absent cannot be read: No such file"):
        safety.check(tmp_path / "absent")


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../out", "..\\out", "C:/out"])
def test_an_archive_stays_where_it_is_unpacked(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(InputRefused, match="leads out of the archive"):
        safety.check(path)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(2**26))
    with pytest.raises(InputRefused, match=r"would unpack to 67,108,864 bytes"):
        safety.check(path)


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "link", "absent"])
def test_onnx_data_lies_beside_the_file(place: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(np.zeros(4, np.float32).tobytes())
    (folder / "link").symlink_to(tmp_path / "secret")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=place)
    value = onnx.helper.make_tensor_value_info("logits", 1, [4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["logits"])], "g", [], [value], [tensor])
    (folder / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    check_refused("onnxruntime", folder / "model.onnx", "points to '.*its data must lie beside it")


# PyTorch


def test_a_pickle_is_no_torchscript(tmp_path: Path, mark: Path) -> None:
    framework("pytorch")
    import torch

    torch.save(Bomb(mark), tmp_path / "model.pt")
    check_refused("torchscript", tmp_path / "model.pt", "is not a TorchScript archive")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb(mark)))
    check_refused("torchscript", tmp_path / "raw.pt", "is not a TorchScript archive")
    assert not mark.exists()


def test_torchscript_writes_no_file(tmp_path: Path) -> None:
    framework("pytorch")
    import torch

    class Writes(torch.nn.Module):
        def forward(self, x):  # annotations that are strings are not what the compiler takes
            torch.save(x, "was-here")
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Writes()).save(str(tmp_path / "model.pt"))
    check_refused("torchscript", tmp_path / "model.pt", r"calls 'save\('")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torch.export.save writes of a small model."""
    framework("pytorch")
    import torch

    path = tmp_path_factory.mktemp("program") / "model.pt2"
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(2, 3),), dynamic_shapes=batch), path)
    return path


def altered(program: Path, out: Path, change: Callable[[str, bytes], bytes], more: dict[str, bytes] | None = None) -> Path:
    """The archive with every member put through `change`, and more members."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in (more or {}).items():
            new.writestr(f"{old.namelist()[0].partition('/')[0]}/{name}", data)
    return out


def test_a_torch_export_archive_that_we_wrote_is_opened(program: Path, tmp_path: Path) -> None:
    run = runtimes.opened("torch_export", program)
    assert run(np.ones((5, 3), np.float32)).shape == (5, 2)


def test_a_torch_export_archive_runs_no_pickle(program: Path, tmp_path: Path, mark: Path) -> None:
    bomb = pickle.dumps(Bomb(mark))

    def flagged(name: str, data: bytes) -> bytes:
        return data.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("weights_config.json") else data

    check_refused("torch_export", altered(program, tmp_path / "a.pt2", flagged), "is stored as a pickle")
    example = altered(program, tmp_path / "b.pt2", lambda name, data: bomb if "/sample_inputs/" in name else data)
    check_refused("torch_export", example, "cannot be read without running code")
    older = altered(program, tmp_path / "c.pt2", lambda name, data: data, {"data/weights/model.pt": bomb})
    check_refused("torch_export", older, "is a pickle")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("guards_code", ["__import__('os').system('true')"], "carries guards"),
        ("expr_str", "__import__('pathlib').Path('was-here').touch()", "loading it would evaluate it"),
        ("target", "os.system", "only PyTorch's own operators"),
    ],
)
def test_a_torch_export_archive_evaluates_no_python(key: str, value: Any, match: str, program: Path, tmp_path: Path) -> None:
    def change(name: str, data: bytes) -> bytes:
        if "/models/" not in name:
            return data
        model = json.loads(data)
        assert key in str(model)
        for holder in holders(model, key):
            holder[key] = value
        return json.dumps(model).encode()

    check_refused("torch_export", altered(program, tmp_path / "model.pt2", change), match)


def holders(value: Any, key: str) -> list[dict[str, Any]]:
    """Every object of nested JSON that has the key."""
    each = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value] if isinstance(value, dict) and key in value else []
    return own + [found for inner in each for found in holders(inner, key)]


def test_machine_code_is_opened_for_no_stranger(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="is machine code"):
        runtimes.opened("aotinductor", tmp_path / "model.pt2")


# TensorFlow


@pytest.mark.parametrize("kind", ["writes", "calls Python"])
def test_a_saved_model_reaches_no_file_and_no_python(kind: str, tmp_path: Path, mark: Path) -> None:
    framework("tensorflow")
    import tensorflow as tf

    def writes(images: Any) -> dict[str, Any]:
        with tf.control_dependencies([tf.io.write_file(str(mark), "x")]):
            return {"logits": tf.identity(images)}

    def calls(images: Any) -> dict[str, Any]:
        return {"logits": tf.numpy_function(lambda x: x, [images], tf.float32)}

    spec = tf.TensorSpec((None, 4), tf.float32, name="images")
    function = tf.function(writes if kind == "writes" else calls, autograph=False).get_concrete_function(spec)
    tf.saved_model.save(tf.Module(), str(tmp_path / "m"), signatures={"serving_default": function})
    check_refused("saved_model", tmp_path / "m", r"has the operator\(s\) (WriteFile|PyFunc)")
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, of its own variables
def test_a_keras_archive_runs_no_lambda_and_names_no_module(tmp_path: Path, mark: Path) -> None:
    framework("tensorflow")
    import keras

    layer = keras.layers.Lambda(lambda x: x + 1.0)
    keras.Sequential([keras.Input((4,)), layer]).save(tmp_path / "lambda.keras")
    check_refused("keras", tmp_path / "lambda.keras", r"was not opened by Keras.*[Ll]ambda")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "plain.keras")
    assert runtimes.opened("keras", tmp_path / "plain.keras")(np.ones((3, 4), np.float32)).shape == (3, 2)

    def named(name: str, data: bytes) -> bytes:
        if name != "config.json":
            return data
        config = json.loads(data)
        hostile = {"module": "pathlib", "class_name": "Path", "config": {"name": str(mark)}, "registered_name": "touch"}
        config["config"]["layers"].append(hostile)
        return json.dumps(config).encode()

    hostile = tmp_path / "hostile.keras"
    with zipfile.ZipFile(tmp_path / "plain.keras") as old, zipfile.ZipFile(hostile, "w") as new:
        for name in old.namelist():
            new.writestr(name, named(name, old.read(name)))
    check_refused("keras", hostile, "was not opened by Keras")
    assert not mark.exists()


# The rest


def test_openvino_leaves_no_identity_and_tells_nobody(tmp_path: Path, python: Callable[..., Any]) -> None:
    if runtimes.missing("openvino"):
        pytest.skip(str(runtimes.missing("openvino")))
    code = "from triptych.export import runtimes; runtimes.load('openvino').versions(); import sys; print('nncf' in sys.modules)"
    done = python("-c", code, env={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
    assert list(tmp_path.iterdir()) == [], "openvino_telemetry writes an identity to ~/intel when it is imported"


def test_a_stablehlo_module_calls_nothing_outside(tmp_path: Path) -> None:
    framework("jax")
    import jax
    import jax.export
    import jax.numpy as jnp

    foreign = jax.export.export(jax.jit(jnp.linalg.cholesky), platforms=("cpu",))(jax.ShapeDtypeStruct((3, 3), jnp.float32))
    (tmp_path / "model.stablehlo").write_bytes(foreign.serialize())
    check_refused("stablehlo", tmp_path / "model.stablehlo", r"calls \w+, code outside of StableHLO")


@pytest.mark.parametrize("runtime", sorted(set(runtimes.ADAPTERS) - {"aotinductor", "saved_model"}))
def test_noise_is_refused_by_name(runtime: str, tmp_path: Path) -> None:
    path = tmp_path / ("model.xml" if runtime == "openvino" else "model.keras" if runtime == "keras" else "model")
    path.write_bytes(np.random.default_rng(0).bytes(4096))
    for name in ("pytorch", "tensorflow", "jax"):
        framework(name)
    check_refused(runtime, path, "model")
