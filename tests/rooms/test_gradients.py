"""Gradients of our own in every room: equal to automatic differentiation, to finite differences, and across the frameworks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract, initialize
from triptych.core.difference import scaled_error
from triptych.core.errors import UsageError
from triptych.core.recipe import SGD, Recipe, Schedule
from triptych.core.tolerance import FORWARD, GRADIENT

Pull = tuple[np.ndarray, np.ndarray]
N, TOKENS, HEADS, SIZE = 2, 5, 2, 3
# Central differences of step h are off by h² times the third derivative, and by rounding over h: about 1e-10 at 1e-5.
STEP, FINITE_DIFFERENCE = 1e-5, 1e-8


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape)


PACKED, LINE = numbers(N, TOKENS, 3 * HEADS * SIZE), 3.0 * numbers(37)


class JAX:
    """`jax.vjp` and `jax.vmap`."""

    def __init__(self) -> None:
        self.room = contract.load("jax")
        self.functions = importlib.import_module("triptych.in_jax.gradients")
        self.layers = importlib.import_module("triptych.in_jax.layers")

    def pull(self, function: Callable[[Any], Any], x: np.ndarray, dy: np.ndarray) -> Pull:
        import jax

        with self.room.model.numerics("float64"):
            y, backward = jax.vjp(function, jax.numpy.asarray(x))
            return np.asarray(y), np.asarray(backward(jax.numpy.asarray(dy))[0])

    def mapped(self, function: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
        import jax

        with self.room.model.numerics("float64"):
            return np.asarray(jax.jit(jax.vmap(jax.grad(lambda each: (function(each) ** 2).sum())))(jax.numpy.asarray(x)))

    def kept(self, function: Callable[[Any], Any], x: np.ndarray) -> int:
        import jax

        with self.room.model.numerics("float64"):
            _, backward = jax.vjp(function, jax.numpy.asarray(x))
            return sum(leaf.nbytes for leaf in jax.tree.leaves(backward))

    def layer(self, qkv: Any) -> Any:
        return self.layers.ScaledDotProductAttention(HEADS).apply({}, qkv)

    def gelu(self, x: Any) -> Any:
        return self.layers.GELU().apply({}, x)

    def rounded(self, x: Any) -> Any:
        import jax.numpy as jnp

        return jnp.round(x)


class PyTorch:
    """`torch.autograd` and `torch.func`."""

    def __init__(self) -> None:
        self.room = contract.load("pytorch")
        self.functions = importlib.import_module("triptych.in_pytorch.gradients")
        self.layers = importlib.import_module("triptych.in_pytorch.layers")

    def pull(self, function: Callable[[Any], Any], x: np.ndarray, dy: np.ndarray) -> Pull:
        import torch

        given = torch.tensor(x, requires_grad=True)
        y = function(given)
        y.backward(torch.tensor(dy))
        return y.detach().numpy(), np.zeros_like(x) if given.grad is None else given.grad.numpy()

    def mapped(self, function: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
        import torch

        made = torch.func.vmap(torch.func.grad(lambda each: (function(each) ** 2).sum()))(torch.tensor(x))
        return np.asarray(made.numpy())

    def kept(self, function: Callable[[Any], Any], x: np.ndarray) -> int:
        import torch

        sizes: dict[int, int] = {}

        def pack(tensor: Any) -> Any:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(torch.tensor(x, requires_grad=True))
        return sum(sizes.values())

    def layer(self, qkv: Any) -> Any:
        return self.layers.ScaledDotProductAttention(HEADS)(qkv)

    def gelu(self, x: Any) -> Any:
        import torch

        return torch.nn.functional.gelu(x, approximate="none")

    def rounded(self, x: Any) -> Any:
        return x.round()


class TensorFlow:
    """`tf.GradientTape` and `tf.vectorized_map`."""

    def __init__(self) -> None:
        self.room = contract.load("tensorflow")
        self.functions = importlib.import_module("triptych.in_tensorflow.gradients")
        self.layers = importlib.import_module("triptych.in_tensorflow.layers")

    def pull(self, function: Callable[[Any], Any], x: np.ndarray, dy: np.ndarray) -> Pull:
        import tensorflow as tf

        given = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(given)
            y = function(given)
        dx = tape.gradient(y, given, output_gradients=tf.constant(dy), unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return y.numpy(), dx.numpy()

    def mapped(self, function: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
        import tensorflow as tf

        def gradient(each: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(each)
                y = tf.reduce_sum(function(each) ** 2)
            return tape.gradient(y, each)

        mapped = tf.function(lambda given: tf.vectorized_map(gradient, given), autograph=False)
        return np.asarray(mapped(tf.constant(x)).numpy())

    def layer(self, qkv: Any) -> Any:
        return self.layers.ScaledDotProductAttention(HEADS, dtype="float64")(qkv)

    def gelu(self, x: Any) -> Any:
        return self.layers.ExactGELU(dtype="float64")(x)

    def rounded(self, x: Any) -> Any:
        import tensorflow as tf

        return tf.round(x)


ADAPTERS: dict[str, type[JAX | PyTorch | TensorFlow]] = {"pytorch": PyTorch, "tensorflow": TensorFlow, "jax": JAX}


@pytest.fixture(scope="module")
def frameworks() -> dict[str, Any]:
    return {name: ADAPTERS[name]() for name in contract.installed()}


@pytest.fixture(params=contract.installed())
def framework(request: pytest.FixtureRequest, frameworks: dict[str, Any]) -> Any:
    return frameworks[request.param]


def ours(framework: Any, stopped: Collection[str] = ()) -> Callable[[Any], Any]:
    return lambda qkv: framework.functions.attention(qkv, HEADS, stopped)


def check_equal(found: Pull, expected: Pull, tolerance: float = FORWARD) -> None:
    assert [scaled_error(a, b) <= tolerance for a, b in zip(found, expected, strict=True)] == [True, True]


def test_gelu_is_what_autodiff_makes_of_it(framework: Any) -> None:
    dy = numbers(37)
    check_equal(framework.pull(framework.functions.gelu, LINE, dy), framework.pull(framework.gelu, LINE, dy))


def test_attention_is_what_autodiff_makes_of_the_layer(framework: Any) -> None:
    dy = numbers(N, TOKENS, HEADS * SIZE)
    check_equal(framework.pull(ours(framework), PACKED, dy), framework.pull(framework.layer, PACKED, dy))


@pytest.mark.parametrize("what", ["gelu", "attention"])
def test_finite_differences_agree(framework: Any, what: str) -> None:
    function, x = (framework.functions.gelu, LINE) if what == "gelu" else (ours(framework), PACKED)
    dy = numbers(*x.shape) if what == "gelu" else numbers(N, TOKENS, HEADS * SIZE)
    direction = np.random.default_rng(7).normal(size=x.shape)
    _, dx = framework.pull(function, x, dy)
    above, below = (framework.pull(function, x + sign * STEP * direction, dy)[0] for sign in (1.0, -1.0))
    assert float((dx * direction).sum()) == pytest.approx(float((dy * (above - below)).sum()) / (2 * STEP), rel=FINITE_DIFFERENCE)


def test_frameworks_agree(frameworks: dict[str, Any]) -> None:
    dy = numbers(N, TOKENS, HEADS * SIZE)
    found = [each.pull(ours(each, ("key",)), PACKED, dy) for each in frameworks.values()]
    lines = [each.pull(each.functions.gelu, LINE, numbers(37)) for each in frameworks.values()]
    for a, b in zip(found[1:] + lines[1:], found[:-1] + lines[:-1], strict=True):
        check_equal(a, b)


@pytest.mark.parametrize("path", ["query", "key", "value"])
def test_a_stopped_path_has_no_gradient_and_the_others_keep_theirs(framework: Any, path: str) -> None:
    dy = numbers(N, TOKENS, HEADS * SIZE)
    value, gradient = framework.pull(ours(framework, (path,)), PACKED, dy)
    whole_value, whole = framework.pull(ours(framework), PACKED, dy)
    parts = dict(zip(framework.functions.PATHS, np.split(gradient, 3, axis=-1), strict=True))
    expected = dict(zip(framework.functions.PATHS, np.split(whole, 3, axis=-1), strict=True))
    assert np.array_equal(value, whole_value)
    assert not parts[path].any()
    assert expected[path].any()
    assert all(scaled_error(parts[name], expected[name]) <= FORWARD for name in parts if name != path)


def test_an_unknown_path_is_refused(framework: Any) -> None:
    with pytest.raises(UsageError, match="keys cannot be stopped; choose from query, key, value"):
        framework.functions.attention(PACKED, HEADS, ("keys",))


def test_straight_through_rounds_exactly_and_lets_the_gradient_pass(framework: Any) -> None:
    value, gradient = framework.pull(lambda x: framework.functions.straight_through(framework.rounded, x), LINE, numbers(37))
    assert np.array_equal(value, np.round(LINE))
    assert np.array_equal(gradient, numbers(37))


def test_examples_can_be_mapped(framework: Any) -> None:
    mapped = framework.mapped(lambda each: framework.functions.gelu(ours(framework)(each[None])[0]), PACKED)
    whole, dy = lambda x: framework.functions.gelu(ours(framework)(x)), np.ones((N, TOKENS, HEADS * SIZE))
    expected = framework.pull(lambda x: whole(x) ** 2, PACKED, dy)[1]
    assert scaled_error(mapped, expected) <= FORWARD


@pytest.mark.parametrize("name", [name for name in contract.installed() if name != "tensorflow"])  # whose tape does not tell
def test_nothing_of_the_size_of_the_weights_is_kept(frameworks: dict[str, Any], name: str) -> None:
    each, x = frameworks[name], numbers(1, 64, 3 * HEADS * SIZE)
    assert each.kept(ours(each), x) <= 2 * x.nbytes < HEADS * 64 * 64 * 8


def test_a_network_with_these_gradients_trains_the_same(framework: Any) -> None:
    spec = catalog.tiny(catalog.get_spec("vit_tiny_patch16_224"))
    model = framework.room.create_model(spec, initialize.parity_weights(spec, 0), precision="float64", device="cpu")
    recipe = Recipe(SGD(), Schedule(0.1, 0, 1, kind="constant"), global_batch_size=2)
    trainer = framework.room.create_trainer(model, recipe)
    batch = numbers(2, *spec.input_shape), np.array([1, 2])
    plain = trainer.gradients(*batch)
    calls: list[str] = []

    def noted(name: str, function: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda _layer, _call, x: calls.append(name) or function(x)

    with (
        model.intercept("blocks.0.attn.sdpa", noted("sdpa", ours(framework))),
        model.intercept("blocks.1.mlp.act", noted("act", framework.functions.gelu)),
    ):
        replaced = trainer.gradients(*batch)
    assert set(calls) == {"sdpa", "act"}
    assert abs(replaced.loss - plain.loss) <= FORWARD * abs(plain.loss)
    assert [name for name, g in plain.gradients.items() if scaled_error(replaced.gradients[name], g) > GRADIENT] == []
