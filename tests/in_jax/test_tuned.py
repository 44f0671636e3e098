"""The fast layers are the plain ones, and a tuned step is the plain step: equal to rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from triptych.core import philox
from triptych.core.contract import Execution

BFLOAT16 = 2.0**-8
"""Its relative rounding error, at most half of which a single number has."""


def differentiated(convolution: Any, x: np.ndarray, kernel: np.ndarray, strides: tuple[int, int], **options: Any) -> list[np.ndarray]:
    """Output, input gradient and weight gradient of a convolution, under an output gradient that differs everywhere."""
    import jax

    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": jax.lax.Precision.HIGHEST, **options}
    with jax.enable_x64(True):
        y, pull = jax.vjp(lambda x, kernel: convolution(x, kernel, strides, **options), x, kernel)
        return [np.asarray(array) for array in (y, *pull(jax.numpy.asarray(philox.normal("dy", y.shape))))]


def assert_lax(x: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, int], **options: Any) -> None:
    """Forward pass and both gradients are lax's."""
    from jax import lax

    from triptych.in_jax.layers import fast_convolution

    arrays = philox.normal("x", x), philox.normal("kernel", kernel)
    fast = differentiated(fast_convolution, *arrays, strides, **options)
    for found, expected in zip(fast, differentiated(lax.conv_general_dilated, *arrays, strides, **options), strict=True):
        assert found.dtype == np.float64
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 2), (3, 1))], ids=str)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_it_is_laxs_convolution(lab: Any, kernel: int, strides: tuple[int, int], padding: Any) -> None:
    assert_lax((2, 9, 8, 3), (kernel, kernel, 3, 20), strides, padding=padding)


@pytest.mark.parametrize(("kernel", "options"), [((3, 3, 2, 8), {"feature_group_count": 2}), ((3, 3, 4, 8), {"rhs_dilation": (2, 2)})])
def test_what_it_does_not_know_is_left_to_lax(lab: Any, kernel: tuple[int, ...], options: dict[str, Any]) -> None:
    assert_lax((2, 9, 8, 4), kernel, (1, 1), padding="SAME", **options)


@pytest.mark.parametrize("geometry", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 3, 0)], ids=str)
def test_the_fast_pool_is_the_plain_one_and_the_first_of_equals_wins(lab: Any, geometry: tuple[int, int, int]) -> None:
    import jax

    from triptych.in_jax.layers import MaxPool

    x = np.floor(3.0 * philox.normal("pool", (2, 9, 8, 3)))  # full of ties
    assert np.unique(x).size < x.size / 10
    results = []
    with jax.enable_x64(True):
        for tuned in (True, False):
            y, pull = jax.vjp(lambda x, tuned=tuned: MaxPool(*geometry, tuned).apply({}, x), jax.numpy.asarray(x))
            results.append([np.asarray(array) for array in (y, *pull(jax.numpy.asarray(philox.normal("dy", y.shape))))])
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=0, atol=1e-14)


def test_the_fast_normalization_has_the_gradients_of_the_plain_one(lab: Any) -> None:
    import jax

    from triptych.in_jax import layers

    x, dy = 2.0 + philox.normal("x", (4, 5, 5, 3)), philox.normal("dy", (4, 5, 5, 3))
    scale, bias = philox.normal("scale", (3,)), philox.normal("bias", (3,))

    def plain(x: Any, scale: Any, bias: Any) -> Any:
        return layers.normalize(x, *layers.batch_statistics(x), scale, bias, 1e-5)

    def differentiated(normalized: Any) -> list[np.ndarray]:
        y, pull = jax.vjp(normalized, *map(jax.numpy.asarray, (x, scale, bias)))
        return [np.asarray(array) for array in (y, *pull(jax.numpy.asarray(dy)))]

    with jax.enable_x64(True):
        fast, expected = differentiated(lambda *given: layers.fast_normalize(*given, 1e-5)[0]), differentiated(plain)
    for mine, theirs in zip(fast, expected, strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)


def trainers(lab: Any, name: str, precision: str, **changes: Any) -> list[Any]:
    """A tuned trainer and a plain one, each of a new, very small model."""
    executions = (Execution(tuned=True), Execution())
    return [lab.room.create_trainer(lab.model(name, precision), lab.recipe(**changes), execution) for execution in executions]


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
@pytest.mark.parametrize("changes", [{}, {"remat": True}, {"frozen": ("conv1", "layer1")}], ids=str)
def test_a_tuned_step_is_the_plain_step(lab: Any, name: str, changes: dict[str, Any]) -> None:
    tuned, plain = trainers(lab, name, "float64", **changes)
    images, labels = lab.batch(tuned.model.spec)
    for rate in (0.05, 0.1):
        assert tuned.step(images, labels, rate) == pytest.approx(plain.step(images, labels, rate), rel=1e-10)
    assert tuned.state().step == plain.state().step
    assert farthest(tuned, plain) <= 1e-10


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_in_half_precision_a_tuned_step_is_as_near_to_float32_as_the_plain_one(lab: Any, name: str) -> None:
    tuned, plain = trainers(lab, name, "float32", mixed_precision="bfloat16")
    _, whole = trainers(lab, name, "float32")
    images, labels = lab.batch(whole.model.spec)
    losses = [trainer.step(images, labels, 0.05) for trainer in (tuned, plain, whole)]
    assert abs(losses[0] - losses[2]) <= 2 * abs(losses[1] - losses[2]) + BFLOAT16 * losses[2]
    assert 0 < farthest(tuned, whole) <= 2 * farthest(plain, whole)


def farthest(one: Any, other: Any) -> float:
    """The largest difference of two trainers' weights, averages and slots, relative to the largest value of each tensor."""
    left, right = one.state(), other.state()
    pairs = [(left.weights, right.weights), (left.ema, right.ema), *((left.slots[slot], right.slots[slot]) for slot in right.slots)]
    return max(float(np.abs(a[name] - b[name]).max() / max(np.abs(b[name]).max(), 1e-300)) for a, b in pairs for name in b)


def test_a_tuned_step_is_another_program_and_the_model_is_not(lab: Any) -> None:
    import jax

    from triptych.in_jax.model import numerics

    tuned, plain = trainers(lab, "resnet50", "float64")
    with numerics("float64"):
        images, labels = (jax.numpy.asarray(array) for array in lab.batch(tuned.model.spec))
        programs = [str(made._gradients.trace(made.model.variables, (images,), labels).jaxpr) for made in (tuned, plain)]
    assert programs[0].count("conv_general_dilated[") < programs[1].count("conv_general_dilated[")
    assert programs[0].count("dot_general[") > programs[1].count("dot_general[")
    assert not tuned.model.module.tuned
