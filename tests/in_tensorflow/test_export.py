"""What a SavedModel prepares inside its graph is what `preprocess` prepares outside of it."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from triptych.core import catalog, initialize
from triptych.core.errors import UsageError
from triptych.core.preprocess import geometry
from triptych.core.spec import Preprocessing
from triptych.in_tensorflow import data
from triptych.in_tensorflow.export import WRITERS, boxes, finite_padding, prepared

IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Preprocessing(None, 28, (0.3,), (0.4,))
side = st.integers(1, 3000)


@given(side, side, st.one_of(st.none(), st.integers(32, 300)), st.integers(1, 32))
def test_the_boxes_are_those_of_the_core(height: int, width: int, short: int | None, crop: int) -> None:
    given = Preprocessing(short, crop, (0.5,), (0.5,))
    box = geometry(given, height, width)
    found = [int(value) for value in boxes(given, tf.constant([height, width, 1]))]
    assert found == [box.resized_height, box.resized_width, box.top, box.left]


@pytest.mark.parametrize(("height", "width"), [(300, 500), (500, 301), (256, 256), (257, 400), (40, 31)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("preprocessing", [IMAGENET, GREY], ids=["RGB", "grey"])
def test_files_are_prepared_as_outside(height: int, width: int, kind: str, preprocessing: Preprocessing) -> None:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([(y * 3 + x) % 256, (x * x + y) % 256, (y * x) % 256], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    expected = data.preprocess(data.decode(file.getvalue(), preprocessing.channels), preprocessing)
    inside = tf.function(lambda encoded: prepared(encoded, preprocessing))(tf.constant(file.getvalue())).numpy()
    np.testing.assert_allclose(inside, expected, rtol=0, atol=1e-5)


def test_an_unknown_format_is_refused_with_those_there_are(room: Any) -> None:
    spec = catalog.get_spec("mlp", image_size=8)
    model = room.create_model(spec, initialize.initial_weights(spec, 0), precision="float32", device="cpu")
    with pytest.raises(UsageError, match=f"TensorFlow writes no 'pdf'; choose from {', '.join(WRITERS)}"):
        room.export(model, "pdf", None)
    with pytest.raises(UsageError, match="'tflite_int8' takes the ranges of its activations from images"):
        room.export(model, "tflite_int8", None)


def test_zeros_around_a_max_pool_behind_a_relu_change_nothing(room: Any) -> None:
    spec = catalog.tiny(catalog.get_spec("resnet50"))
    model = room.create_model(spec, initialize.parity_weights(spec, 0, "float32"), precision="float32", device="cpu")
    pool = model.native.get_layer("maxpool")
    images = np.random.default_rng(0).standard_normal((2, *spec.input_shape), dtype=np.float32)
    plain = model.native(images, training=False).numpy()
    with finite_padding(model):
        assert pool.fill == 0.0
        padded = model.native(images, training=False).numpy()
    assert pool.fill == -np.inf
    np.testing.assert_array_equal(padded, plain)


def test_int8_has_a_range_for_every_activation(room: Any, tmp_path: Path) -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    spec = catalog.tiny(catalog.get_spec("resnet50"))
    model = room.create_model(spec, initialize.parity_weights(spec, 0, "float32"), precision="float32", device="cpu")
    images = np.random.default_rng(0).standard_normal((4, *spec.input_shape), dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter warns of TensorFlow's own interpreter
        room.export(model, "tflite_int8", tmp_path / "model.tflite", images)
    details = interpreter.Interpreter(str(tmp_path / "model.tflite")).get_tensor_details()
    scales = np.concatenate([each["quantization_parameters"]["scales"] for each in details])
    assert scales.size > len(spec.layers())
    assert scales.max() < 10.0, "padding with minus infinity would make a scale of 1e36, and the rest of the network nothing"
