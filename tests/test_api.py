"""The public face: one call for three frameworks, one checkpoint between them, and nothing of the caller's changed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import triptych
from triptych.cli import main
from triptych.core import catalog, checkpoint, contract, initialize, philox
from triptych.core.errors import FrameworkMissing, InputRefused, StorageError, UsageError

FRAMEWORKS = contract.installed()
SMALL: dict[str, Any] = {"hidden": (6, 5), "image_size": 8, "in_channels": 3, "num_classes": 4}
each_framework = pytest.mark.parametrize("framework", FRAMEWORKS)
needs_two = pytest.mark.skipif(len(FRAMEWORKS) < 2, reason="needs two frameworks installed")


def create(framework: str, *, precision: str = "float64", **options: Any) -> triptych.ZooModel:
    """A small MLP on the CPU."""
    return triptych.create_model("mlp", framework, precision=precision, device="cpu", **{**SMALL, **options})


def images(count: int, model: triptych.ZooModel) -> np.ndarray:
    """(count, H, W, C) preprocessed images."""
    return philox.normal("images", (count, *model.spec.input_shape)).astype(np.float32)


@pytest.fixture(scope="module")
def mlps() -> dict[str, triptych.ZooModel]:
    """The same small MLP in every installed framework."""
    return {name: create(name) for name in FRAMEWORKS}


@pytest.fixture(scope="module")
def resnets() -> dict[str, triptych.ZooModel]:
    """The same ResNet-20 on 8-pixel images in every installed framework."""
    return {name: triptych.create_model("resnet20", name, precision="float64", device="cpu", image_size=8, seed=3) for name in FRAMEWORKS}


# What is made


@each_framework
def test_a_model_knows_what_it_is(framework: str, mlps: dict[str, triptych.ZooModel]) -> None:
    model = mlps[framework]
    assert (model.framework, model.spec) == (framework, catalog.get_spec("mlp", **SMALL))
    assert repr(model) == f"ZooModel('mlp', framework='{framework}', precision='float64', device='cpu')"
    assert model.provenance == {"initialized": {"seed": 0}}


@each_framework
def test_weights_are_the_canonical_ones_of_the_seed(framework: str) -> None:
    for precision in contract.PRECISIONS:
        model = create(framework, seed=5, precision=precision)
        expected = initialize.initial_weights(model.spec, 5, precision)
        held = model.model.weights()
        assert list(held) == list(expected)
        assert all(held[name].tobytes() == value.tobytes() for name, value in expected.items())


def test_the_package_offers_its_public_names() -> None:
    assert set(triptych.__all__) <= set(dir(triptych))
    assert triptych.list_models("mlp") == ["mlp"]
    with pytest.raises(AttributeError, match="module 'triptych' has no attribute 'no_such_name'"):
        triptych.__getattr__("no_such_name")


# What it computes


@each_framework
@pytest.mark.parametrize("precision", contract.PRECISIONS)
def test_predict_gives_logits_in_the_models_precision(framework: str, precision: str) -> None:
    model = create(framework, precision=precision)
    batch = images(5, model)
    logits = model.predict(batch)
    assert (logits.shape, logits.dtype.name) == ((5, 4), precision)
    tolerance = 1e-14 if precision == "float64" else 1e-6
    assert np.abs(model.predict(batch, batch_size=2) - logits).max() <= tolerance
    assert model.predict(batch[:0]).shape == (0, 4)


@needs_two
def test_frameworks_predict_the_same(mlps: dict[str, triptych.ZooModel], resnets: dict[str, triptych.ZooModel]) -> None:
    for models in (mlps, resnets):
        logits = [model.predict(images(3, model)) for model in models.values()]
        assert all(np.abs(one - logits[0]).max() <= 1e-12 * np.abs(logits[0]).max() for one in logits)


def test_features_have_the_same_names_and_shapes_everywhere(resnets: dict[str, triptych.ZooModel]) -> None:
    found = {name: model.features(images(2, model)) for name, model in resnets.items()}
    spec = catalog.get_spec("resnet20", image_size=8)
    for features in found.values():
        assert tuple(features) == spec.intermediates()
        assert features["layer2.0.conv1"].shape == (2, 4, 4, 32)  # (N, H, W, C)
        assert features["fc"].shape == (2, 10)
    first = found[FRAMEWORKS[0]]
    assert all(
        np.abs(value - first[name]).max() <= 1e-12 * np.abs(first[name]).max() for each in found.values() for name, value in each.items()
    )


@each_framework
@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 8, 8, 1), (1, 3, 8, 8), (2, 9, 8, 3), (0,)])
def test_images_of_another_shape_are_refused(framework: str, shape: tuple[int, ...], mlps: dict[str, triptych.ZooModel]) -> None:
    with pytest.raises(UsageError, match=r"\(N, 8, 8, 3\)"):
        mlps[framework].predict(np.zeros(shape, np.float32))
    with pytest.raises(UsageError, match="batch_size=0"):
        mlps[framework].predict(np.zeros((1, 8, 8, 3), np.float32), batch_size=0)


# One checkpoint


@each_framework
def test_a_saved_model_loads_bit_for_bit_in_every_framework(framework: str, resnets: dict[str, triptych.ZooModel], tmp_path: Path) -> None:
    saved = resnets[framework].save(tmp_path / "model")
    held = resnets[framework].model.weights()
    for other in FRAMEWORKS:
        loaded = triptych.create_model("resnet20", other, weights=saved, precision="float64", device="cpu")
        assert loaded.spec == resnets[framework].spec  # image_size=8 comes from the checkpoint
        assert {name: value.tobytes() for name, value in loaded.model.weights().items()} == {k: v.tobytes() for k, v in held.items()}


def test_a_checkpoint_is_read_once(mlps: dict[str, triptych.ZooModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = mlps[FRAMEWORKS[0]].save(tmp_path / "model")
    reads: list[Path] = []
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path, **options: (reads.append(path), load(path, **options))[1])
    create(FRAMEWORKS[0], weights=saved)
    create(FRAMEWORKS[0], weights=saved, head="new")
    assert reads == [saved, saved]


def test_labels_travel_with_the_weights(mlps: dict[str, triptych.ZooModel], tmp_path: Path) -> None:
    model = triptych.ZooModel(mlps[FRAMEWORKS[0]].model, labels=["a", "b", "c", "d"])
    saved = model.save(tmp_path / "model")
    assert list(create(FRAMEWORKS[0], weights=saved).labels or ()) == ["a", "b", "c", "d"]
    assert create(FRAMEWORKS[0], weights=saved, head="new").labels is None


@pytest.mark.parametrize("file", ["model.safetensors", "bare.safetensors"])
def test_a_single_file_of_weights(file: str, mlps: dict[str, triptych.ZooModel], tmp_path: Path) -> None:
    """The model file inside its checkpoint brings its config along; a bare one is held to the options."""
    saved = mlps[FRAMEWORKS[0]].save(tmp_path / "model")
    (tmp_path / "bare.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    path, options = (saved / file, {}) if file == "model.safetensors" else (tmp_path / file, SMALL)
    model = triptych.create_model("mlp", FRAMEWORKS[0], weights=path, precision="float64", device="cpu", **options)
    assert model.spec == mlps[FRAMEWORKS[0]].spec
    with pytest.raises(InputRefused, match=r"wrong shape: fc1\.weight"):
        triptych.create_model("mlp", FRAMEWORKS[0], weights=path, device="cpu", **{**SMALL, "hidden": (7, 5)})


@each_framework
def test_a_new_head_keeps_the_backbone(framework: str, mlps: dict[str, triptych.ZooModel], tmp_path: Path) -> None:
    saved = mlps[framework].save(tmp_path / "model")
    tuned = create(framework, weights=saved, head="new", num_classes=3, seed=9)
    held, old = tuned.model.weights(), mlps[framework].model.weights()
    fresh = initialize.initial_weights(tuned.spec, 9, "float64")
    assert tuned.predict(images(2, tuned)).shape == (2, 3)
    for name, value in held.items():
        assert value.tobytes() == (fresh if name.startswith("fc.") else old)[name].tobytes()


@each_framework
def test_a_model_of_features_is_saved_and_loaded(framework: str, tmp_path: Path) -> None:
    options = {"tokens": 3, "width": 8, "heads": 2, "mlp_width": 12}
    made = triptych.create_model("transformer_block", framework, device="cpu", **options)
    features = philox.normal("features", (2, 3, 8)).astype(np.float32)
    saved = made.save(tmp_path / "block")
    config = json.loads((saved / "config.json").read_text())
    assert (config["preprocessing"], config["spec"]["width"]) == (None, 8)
    assert "pretrained_cfg" not in config
    loaded = triptych.create_model("transformer_block", framework, weights=saved, device="cpu")
    assert np.array_equal(loaded.predict(features), made.predict({"features": features}))
    assert list(loaded.features(features)) == list(loaded.spec.intermediates())
    with pytest.raises(UsageError, match="transformer_block has no classifier to draw anew"):
        triptych.create_model("transformer_block", framework, weights=saved, head="new", device="cpu")


def test_a_bare_file_takes_a_new_head(tmp_path: Path) -> None:
    model = triptych.create_model("mlp", FRAMEWORKS[0], device="cpu")
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((model.save(tmp_path / "model") / "model.safetensors").read_bytes())
    tuned = triptych.create_model("mlp", FRAMEWORKS[0], weights=bare, head="new", num_classes=3, device="cpu")
    assert tuned.model.weights()["fc.weight"].shape == (3, 256)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 3}, UsageError, "has 4 classes, not 3; head='new' draws a new classifier"),
        ({"hidden": (6, 7)}, InputRefused, r"wrong shape: fc2\.weight is \(5, 6\), expected \(7, 6\)"),
        ({"in_channels": 1, "head": "new"}, InputRefused, r"wrong shape: fc1\.weight"),
        ({"name": "resnet20"}, UsageError, "holds a mlp, not a resnet20"),
        ({"weights": "elsewhere"}, InputRefused, "no such checkpoint directory"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    arguments: dict[str, Any], error: type[Exception], message: str, mlps: dict[str, triptych.ZooModel], tmp_path: Path
) -> None:
    saved = mlps[FRAMEWORKS[0]].save(tmp_path / "model")
    with pytest.raises(error, match=message):
        triptych.create_model(**{"name": "mlp", "framework": FRAMEWORKS[0], "weights": saved, "device": "cpu", **arguments})


def test_saving_over_a_checkpoint_needs_overwrite(mlps: dict[str, triptych.ZooModel], tmp_path: Path) -> None:
    model = mlps[FRAMEWORKS[0]]
    saved = model.save(tmp_path / "model")
    with pytest.raises(StorageError, match="exists"):
        model.save(saved)
    assert model.save(saved, overwrite=True) == saved


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"framework": "mxnet"}, "unknown framework 'mxnet'; choose from pytorch, tensorflow, jax"),
        ({"name": "resnet5"}, "unknown model 'resnet5'; did you mean 'resnet50'"),
        ({"device": "gpu"}, "unknown device 'gpu'; choose from auto, cpu, cuda, mps, tpu"),
        ({"precision": "float16"}, "unknown precision 'float16'; choose from float32, float64"),
        ({"head": "fresh"}, "head='fresh'; choose 'keep' or 'new'"),
        ({"classes": 3}, "mlp has no option 'classes'"),
    ],
)
def test_a_wrong_argument_says_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        triptych.create_model(**{"name": "mlp", "framework": FRAMEWORKS[0], **arguments})
    assert raised.value.exit_code == 2


@each_framework
def test_a_device_that_is_not_here(framework: str) -> None:
    with pytest.raises(UsageError, match="'tpu'"):
        triptych.create_model("mlp", framework, device="tpu", **SMALL)


@pytest.fixture
def without_flax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flax cannot be found; everything else can."""
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "flax" else find(name, *rest))


PIP_LINE = "JAX/Flax is not installed (flax not found). Install it with: pip install 'triptych[jax]'"


@pytest.mark.usefixtures("without_flax")
def test_a_missing_framework_is_the_exact_pip_line() -> None:
    with pytest.raises(FrameworkMissing) as raised:
        triptych.create_model("mlp", "jax")
    assert str(raised.value) == PIP_LINE
    assert "jax" not in contract.installed()


@pytest.mark.usefixtures("without_flax")
def test_a_missing_framework_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "mlp", "--framework", "jax", "--out", str(tmp_path / "run")])
    assert ended.value.code == 3
    assert capsys.readouterr().err == f"triptych: {PIP_LINE}\n"
    assert not (tmp_path / "run").exists()


# assert_equal


@needs_two
def test_the_same_model_in_two_frameworks_is_equal(mlps: dict[str, triptych.ZooModel]) -> None:
    first = mlps[FRAMEWORKS[0]]
    for other in FRAMEWORKS[1:]:
        before = mlps[other].model.weights()
        triptych.assert_equal(first, mlps[other])
        after = mlps[other].model.weights()
        assert all(after[name].tobytes() == value.tobytes() for name, value in before.items())


@each_framework
@pytest.mark.parametrize("tensor", ["fc1.weight", "fc2.bias"])
def test_one_changed_element_is_found_and_named(framework: str, tensor: str, mlps: dict[str, triptych.ZooModel]) -> None:
    changed = create(framework)
    weights = changed.model.weights()
    weights[tensor].flat[1] = np.nextafter(weights[tensor].flat[1], 1.0)
    changed.model.load_weights(weights)
    with pytest.raises(AssertionError, match=rf"differ: rung 1, tensor '{tensor}'"):
        triptych.assert_equal(mlps[FRAMEWORKS[0]], changed)


def test_models_of_different_specs_cannot_be_compared(mlps: dict[str, triptych.ZooModel]) -> None:
    with pytest.raises(UsageError, match="only models of one spec and precision can be equal"):
        triptych.assert_equal(mlps[FRAMEWORKS[0]], create(FRAMEWORKS[0], precision="float32"))


# The caller's globals


def global_state() -> dict[str, Any]:
    """What a user may have set, of every library that a model may touch."""
    numpy_state = np.random.get_bit_generator().state["state"]["key"].tolist()
    state: dict[str, Any] = {"numpy": numpy_state, "random": random.getstate(), "environ": dict(os.environ)}
    state |= {"errors": np.geterr(), "dlopen": sys.getdlopenflags(), "recursion": sys.getrecursionlimit()}
    readers = {"pytorch": torch_state, "tensorflow": tensorflow_state, "jax": jax_state}
    return state | {name: readers[name]() for name in FRAMEWORKS}


def torch_state() -> dict[str, Any]:
    """PyTorch's globals."""
    import torch

    return {
        "dtype": torch.get_default_dtype(), "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(),
        "matmul": torch.get_float32_matmul_precision(), "tf32": torch.backends.cudnn.allow_tf32,
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(), "seed": torch.get_rng_state().tolist(),
    }  # fmt: skip


def tensorflow_state() -> dict[str, Any]:
    """TensorFlow's and Keras' globals."""
    import keras
    import tensorflow as tf

    return {
        "floatx": keras.config.floatx(), "policy": keras.config.dtype_policy().name, "layout": keras.config.image_data_format(),
        "backend": keras.config.backend(), "epsilon": keras.config.epsilon(), "eager": tf.config.functions_run_eagerly(),
        "tf32": tf.config.experimental.tensor_float_32_execution_enabled(), "jit": tf.config.optimizer.get_jit(),
        "threads": (tf.config.threading.get_inter_op_parallelism_threads(), tf.config.threading.get_intra_op_parallelism_threads()),
    }  # fmt: skip


def jax_state() -> dict[str, Any]:
    """JAX's globals."""
    import jax

    return dict(jax.config.values)


def test_nothing_of_the_callers_is_left_changed() -> None:
    for name in FRAMEWORKS:
        contract.load(name)
    before = global_state()
    models = [create(name, precision=precision) for name in FRAMEWORKS for precision in contract.PRECISIONS]
    for model in models:
        model.predict(images(2, model))
        model.features(images(2, model))
    for a, b in zip(models[1::2], models[3::2], strict=False):
        triptych.assert_equal(a, b)
    after = global_state()
    assert {name: value for name, value in after.items() if value != before[name]} == {}
