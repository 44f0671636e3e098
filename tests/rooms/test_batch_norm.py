"""The sums of BatchNorm in every room: rounding that does not grow with the number of values (numerics 38)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract, initialize

LAYER, BATCH, SIZE = "bn1", 16, 32


@pytest.fixture(scope="module", params=contract.installed())
def trained(request: pytest.FixtureRequest) -> tuple[np.ndarray, Any]:
    """A room's BatchNorm over values of one sign, as images are: its input and what a training pass shows of it."""
    spec = catalog.get_spec("resnet20", image_size=SIZE)
    model = contract.load(request.param).create_model(spec, initialize.initial_weights(spec, 0), precision="float64", device="cpu")
    numbers = np.random.default_rng(0)
    x = 10.0 + numbers.random((BATCH, SIZE, SIZE, 16))
    images = numbers.random((BATCH, SIZE, SIZE, 3))
    return x, model.forward(images, training=True, layer_inputs={LAYER: x})


def test_normalization_is_as_exact_as_its_input(trained: tuple[np.ndarray, Any]) -> None:
    x, found = trained
    exact = x.astype(np.longdouble)
    centred = exact - exact.mean((0, 1, 2))
    expected = centred / np.sqrt(np.square(centred).mean((0, 1, 2)) + np.longdouble(1e-5))
    # A mean of 10 to one unit in the last place, over a deviation of 0.3, is 6e-15; added one after the other it was 3e-13 off.
    assert np.abs(found.intermediates[LAYER] - expected).max() < 5e-14


def test_running_statistics_are_exact(trained: tuple[np.ndarray, Any]) -> None:
    x, found = trained
    mean, var = x.astype(np.longdouble).mean((0, 1, 2)), x.astype(np.longdouble).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(found.state[f"{LAYER}.running_mean"], (0.1 * mean).astype(np.float64), rtol=2e-15)
    np.testing.assert_allclose(found.state[f"{LAYER}.running_var"], (0.9 + 0.1 * var).astype(np.float64), rtol=2e-15)
