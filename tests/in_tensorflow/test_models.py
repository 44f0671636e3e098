"""The native models against their specs: names, shapes, counts, order, serialization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from triptych.core import catalog
from triptych.core.initialize import parity_weights
from triptych.in_tensorflow import weights as canonical
from triptych.in_tensorflow.model import BUILDERS


@pytest.mark.parametrize("name", catalog.CATALOG)
def test_parameter_count_is_that_of_the_catalog(name: str) -> None:
    spec = catalog.get_spec(name)
    model = BUILDERS[spec.family](spec)
    assert sum(int(np.prod(variable.shape)) for variable in model.trainable_variables) == catalog.CATALOG[name].parameters


@pytest.mark.parametrize("name", catalog.CATALOG)
def test_layers_and_tensors_are_those_of_the_spec(name: str) -> None:
    spec = catalog.tiny(catalog.get_spec(name))
    model = BUILDERS[spec.family](spec, "float64")
    for layer in spec.layers():
        output = model.get_layer(layer.name).output
        sides = {4: (layer.size, layer.size), 3: (layer.tokens,), 2: ()}[len(output.shape)]
        assert output.shape == (None, *sides, layer.out_channels), layer.name
        assert output.dtype == "float64"
    bindings = canonical.bind(model, spec)
    assert len(bindings) == len(model.variables)
    for binding in bindings:
        shape, axes = tuple(binding.variable.shape), canonical.TO_CANONICAL.get(binding.tensor.kind)
        assert (shape if axes is None else tuple(shape[axis] for axis in axes)) == binding.tensor.shape
        assert binding.variable.trainable == binding.tensor.trainable
        assert binding.variable.dtype == ("int64" if binding.tensor.kind == "batch_counter" else "float64")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own saving of its variables under numpy 2
@pytest.mark.parametrize("name", ["resnet50", "resnet20", "mlp", "vit_tiny_patch16_224", "transformer_block"])
def test_saves_and_loads_as_a_keras_file(name: str, subject: Any, tmp_path: Path) -> None:
    made = subject(name, precision="float32")
    images, _ = made.batch()
    made.model.native.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images).numpy(), made.model.native(images).numpy())


@pytest.mark.parametrize("name", ["resnet50", "resnet20", "mlp", "vit_tiny_patch16_224", "transformer_block"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_weights_make_the_round_trip_bit_for_bit(name: str, precision: str, subject: Any) -> None:
    model = subject(name, precision=precision).model
    given = parity_weights(model.spec, 9, precision)
    counters = [tensor.name for tensor in model.spec.tensors() if tensor.kind == "batch_counter"]
    given |= {counter: np.array(2**40 + i) for i, counter in enumerate(counters)}
    model.load_weights(given)
    back = model.weights()
    assert list(back) == [tensor.name for tensor in model.spec.tensors()]
    for key, array in given.items():
        assert back[key].dtype == array.dtype, key
        assert back[key].tobytes() == array.tobytes(), key


def test_what_weights_returns_is_not_a_view_of_the_model(subject: Any) -> None:
    model = subject("mlp").model
    for array in model.weights().values():
        array[...] = 0
    assert all(array.any() for array in model.weights().values())
