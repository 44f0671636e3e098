"""The numpy boundary: predict, forward, intercept, refusals, and the caller's globals."""

from __future__ import annotations

import os
import random
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from triptych.core.errors import InputRefused, TriptychError, UsageError
from triptych.core.initialize import parity_weights


def test_predict_in_batches_equals_predict_at_once(subject: Any) -> None:
    made = subject("resnet50")
    images, _ = made.batch(5)
    logits = made.model.predict(images)
    assert logits.shape == (5, made.spec.num_classes)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(made.model.predict(images, batch_size=2), logits, rtol=1e-12, atol=1e-12)
    assert made.model.predict(images[:0]).shape == (0, made.spec.num_classes)


def test_predict_is_the_native_model(subject: Any) -> None:
    made = subject("resnet20", precision="float32")
    images, _ = made.batch()
    assert isinstance(made.model.native, keras.Model)
    np.testing.assert_allclose(made.model.predict(images), made.model.native(images, training=False).numpy(), rtol=1e-5, atol=1e-5)


def test_wrong_images_are_refused_with_what_was_expected(subject: Any) -> None:
    made = subject("resnet20")
    images, labels = made.batch()
    for wrong in (images[0], images[:, 1:], images.transpose(0, 3, 1, 2)):
        for call in (made.model.predict, made.model.forward, lambda x: made.trainer.step(x, labels, 0.1)):
            with pytest.raises(UsageError, match=r"\(N, H, W, C\) = \(N, 16, 16, 3\); given"):
                call(wrong)
    with pytest.raises(UsageError, match="batch_size=0"):
        made.model.predict(images, batch_size=0)


@pytest.mark.parametrize("name", ["resnet50", "resnet20", "mlp"])
def test_forward_names_every_intermediate_in_order(name: str, subject: Any) -> None:
    made = subject(name)
    images, _ = made.batch()
    forward = made.model.forward(images)
    assert tuple(forward.intermediates) == made.spec.intermediates()
    assert forward.state == {}
    for layer in made.spec.layers():
        if layer.op != "dropout":
            array = forward.intermediates[layer.name]
            assert array.dtype == np.float64
            assert array.shape[-1] == layer.out_channels
    np.testing.assert_allclose(forward.intermediates["fc"], made.model.predict(images), rtol=1e-12, atol=1e-12)


def test_training_forward_gives_unbiased_statistics_and_leaves_the_model(subject: Any) -> None:
    made = subject("resnet50")
    images, _ = made.batch()
    before = made.model.weights()
    forward = made.model.forward(images, training=True)
    assert list(forward.state) == [tensor.name for tensor in made.spec.tensors() if not tensor.trainable]
    x = forward.intermediates["conv1"]
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(forward.state["bn1.running_mean"], 0.9 * before["bn1.running_mean"] + 0.1 * mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(forward.state["bn1.running_var"], 0.9 * before["bn1.running_var"] + 0.1 * variance, rtol=1e-12)
    assert forward.state["bn1.num_batches_tracked"] == 1
    assert forward.state["bn1.num_batches_tracked"].dtype == np.int64
    normalized = (x - mean) / np.sqrt(x.var((0, 1, 2)) + 1e-5) * before["bn1.weight"] + before["bn1.bias"]
    np.testing.assert_allclose(forward.intermediates["bn1"], normalized, rtol=1e-11, atol=1e-12)
    after = made.model.weights()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_layer_inputs_replace_what_a_layer_sees(subject: Any) -> None:
    made = subject("resnet20")
    images, _ = made.batch()
    clean = made.model.forward(images).intermediates
    probe = np.full_like(clean["bn1"], 3.0)
    probed = made.model.forward(images, layer_inputs={"bn1": probe}).intermediates
    weight, bias, mean, variance, _ = (array for name, array in made.model.weights().items() if name.startswith("bn1."))
    expected = (3.0 - mean) / np.sqrt(variance + 1e-5) * weight + bias
    np.testing.assert_allclose(probed["bn1"], np.broadcast_to(expected, probe.shape), rtol=1e-12)
    np.testing.assert_array_equal(probed["conv1"], clean["conv1"])
    np.testing.assert_array_equal(made.model.forward(images).intermediates["bn1"], clean["bn1"])
    with pytest.raises(UsageError, match="no layer 'bn9'"):
        made.model.forward(images, layer_inputs={"bn9": probe})


def test_intercept_reaches_everything_and_is_taken_back(subject: Any) -> None:
    made = subject("resnet20")
    images, labels = made.batch()
    observe = (
        lambda: made.model.predict(images),
        lambda: made.model.forward(images).intermediates["layer1.0.relu1"],
        lambda: made.trainer.gradients(images, labels).loss,
    )
    before = [look() for look in observe]
    with made.model.intercept("layer1.0.conv1", lambda layer, call, x: tf.abs(call(x)) + layer.filters):
        inside = [look() for look in observe]
        with made.model.intercept("layer1.0.conv1", lambda layer, call, x: call(x) * 0.0):
            nested = made.model.forward(images).intermediates["layer1.0.conv1"]
        again = made.model.predict(images)
    assert not nested.any()
    assert all(not np.allclose(x, y) for x, y in zip(before, inside, strict=True))
    np.testing.assert_array_equal(again, inside[0])
    assert all(np.array_equal(x, look()) for x, look in zip(before, observe, strict=True))
    with pytest.raises(UsageError, match="no layer 'conv9'"), made.model.intercept("conv9", lambda layer, call, x: x):
        pass


def test_a_probe_passes_through_an_interception(subject: Any) -> None:
    made = subject("resnet20")
    images, _ = made.batch()
    probe = np.ones_like(made.model.forward(images).intermediates["relu"])
    with made.model.intercept("relu", lambda layer, call, x: -call(x)):
        assert (made.model.forward(images, layer_inputs={"relu": probe}).intermediates["relu"] == -1.0).all()


def test_weights_that_do_not_fit_are_all_listed(room: Any, subject: Any) -> None:
    model = subject("resnet20").model
    before = model.weights()
    wrong = parity_weights(model.spec, 5)
    del wrong["bn1.bias"]
    wrong["bn1.gamma"] = np.zeros(8)
    wrong["fc.bias"] = np.zeros(11)
    wrong["bn1.num_batches_tracked"] = np.array(1.5)
    with pytest.raises(InputRefused) as refused:
        model.load_weights(wrong)
    for problem in (
        "missing bn1.bias",
        "unknown bn1.gamma",
        "mis-shaped fc.bias: (11,) given, (10,) expected",
        "mistyped bn1.num_batches_tracked",
    ):
        assert problem in str(refused.value)
    assert all(np.array_equal(array, model.weights()[key]) for key, array in before.items())
    with pytest.raises(InputRefused):
        room.create_model(model.spec, {}, precision="float32", device="cpu")


def test_unknown_precision_and_absent_device_are_refused(room: Any, subject: Any) -> None:
    spec = subject("mlp").spec
    weights = parity_weights(spec, 0)
    with pytest.raises(UsageError, match="float16"):
        room.create_model(spec, weights, precision="float16", device="cpu")
    with pytest.raises(UsageError, match="available: auto, cpu"):
        room.create_model(spec, weights, precision="float32", device="mps")
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        room.create_model(spec, weights, precision="float32", device="gpu")
    expected = "cuda" if tf.config.list_physical_devices("GPU") else "cpu"
    assert room.create_model(spec, weights, precision="float32", device="auto").device == expected


def _globals() -> dict[str, Any]:
    return {
        "floatx": keras.config.floatx(),
        "policy": keras.config.dtype_policy().name,
        "layout": keras.config.image_data_format(),
        "epsilon": keras.config.epsilon(),
        "tf32": tf.config.experimental.tensor_float_32_execution_enabled(),
        "threads": (tf.config.threading.get_inter_op_parallelism_threads(), tf.config.threading.get_intra_op_parallelism_threads()),
        "eager": tf.config.functions_run_eagerly(),
        "random": random.getstate(),
        "numpy": np.random.get_bit_generator().state["state"]["key"].tobytes(),
        "environment": dict(os.environ),
    }


@pytest.mark.parametrize("name", ["resnet20", "mlp"])
def test_the_callers_globals_are_left_alone(name: str, subject: Any) -> None:
    tf.random.set_seed(3)
    drawn = tf.random.uniform((2,)).numpy()
    following = tf.random.uniform((2,)).numpy()
    before = _globals()
    tf.random.set_seed(3)
    np.testing.assert_array_equal(tf.random.uniform((2,)).numpy(), drawn)
    made = subject(name, **({"dropout": 0.2} if name == "mlp" else {}))
    images, labels = made.batch()
    made.model.predict(images)
    made.model.forward(images, training=True)
    made.trainer.gradients(images, labels)
    made.trainer.step(images, labels, 0.1)
    np.testing.assert_array_equal(tf.random.uniform((2,)).numpy(), following)
    assert _globals() == before


def test_a_callers_policy_and_layout_do_not_matter(subject: Any) -> None:
    made = subject("resnet50", precision="float32")
    images, _ = made.batch()
    expected = made.model.predict(images)
    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.config.set_image_data_format("channels_first")
    try:
        other = subject("resnet50", precision="float32")
        np.testing.assert_array_equal(other.model.predict(images), expected)
    finally:
        keras.config.set_dtype_policy("float32")
        keras.config.set_image_data_format("channels_last")


def test_another_keras_backend_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch, subject: Any) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(TriptychError, match=r"'jax' backend.*KERAS_BACKEND=tensorflow"):
        subject("mlp")


def test_versions(room: Any) -> None:
    assert room.versions() == {"tensorflow": tf.__version__, "keras": keras.__version__}
