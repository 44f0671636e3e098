"""The optimizers against a few lines of numpy, with a moving learning rate and weight-decay groups."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from triptych.core.recipe import SGD, AdamW, Recipe, Schedule, decays

Arrays = dict[str, np.ndarray]
LEARNING_RATES = (0.1, 0.03, 0.2)


def sgd_reference(rule: SGD, w: np.ndarray, g: np.ndarray, slots: list[np.ndarray], rate: float, decay: float, t: int) -> np.ndarray:
    """`torch.optim.SGD`."""
    g = g + decay * w
    slots[0] = rule.momentum * slots[0] + g
    return w - rate * (g + rule.momentum * slots[0] if rule.nesterov else slots[0])


def adamw_reference(rule: AdamW, w: np.ndarray, g: np.ndarray, slots: list[np.ndarray], rate: float, decay: float, t: int) -> np.ndarray:
    """`torch.optim.AdamW`."""
    w = w - rate * decay * w
    slots[0] = rule.beta1 * slots[0] + (1 - rule.beta1) * g
    slots[1] = rule.beta2 * slots[1] + (1 - rule.beta2) * g**2
    mean, square = slots[0] / (1 - rule.beta1**t), slots[1] / (1 - rule.beta2**t)
    return w - rate * mean / (np.sqrt(square) + rule.epsilon)


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize(
    ("rule", "reference"),
    [(SGD(), sgd_reference), (SGD(nesterov=False, weight_decay=1e-2), sgd_reference), (AdamW(weight_decay=0.1), adamw_reference)],
)
def test_apply_follows_the_formula(rule: Any, reference: Any, decay_all: bool, subject: Any) -> None:
    recipe = Recipe(rule, Schedule(0.1, 0, 3), 4, ema_decay=0.75, decay_norm_and_bias=decay_all)
    made = subject("resnet20", recipe)
    generator = np.random.default_rng(2)
    parameters = made.spec.parameters()
    assert {decays(recipe, tensor) for tensor in parameters} == ({True} if decay_all else {True, False})
    weights, averages = made.model.weights(), made.model.weights()
    slots = {tensor.name: [np.zeros(tensor.shape) for _ in rule.slots] for tensor in parameters}
    for t, rate in enumerate(LEARNING_RATES, start=1):
        gradients = {tensor.name: generator.normal(size=tensor.shape) * 10.0 ** generator.integers(-6, 2) for tensor in parameters}
        for tensor in parameters:
            decay = rule.weight_decay if decays(recipe, tensor) else 0.0
            weights[tensor.name] = reference(rule, weights[tensor.name], gradients[tensor.name], slots[tensor.name], rate, decay, t)
        averages = {name: 0.75 * averages[name] + 0.25 * weights[name] for name in averages}
        made.trainer.apply(gradients, rate)
        state = made.trainer.state()
        assert state.step == t
        assert_close(state.weights, weights)
        assert_close(state.ema, {name: array for name, array in averages.items() if "num_batches" not in name})
        for i, slot in enumerate(rule.slots):
            assert_close(state.slots[slot], {name: held[i] for name, held in slots.items()})


def assert_close(given: Arrays, expected: Arrays) -> None:
    """Within 1e-14 of each tensor's scale."""
    for name, array in expected.items():
        assert np.abs(given[name] - array).max() <= 1e-14 * max(np.abs(array).max(), 1e-300), name


def test_statistics_stay_when_gradients_are_applied(subject: Any) -> None:
    made = subject("resnet20")
    before = made.model.weights()
    made.trainer.apply({tensor.name: np.ones(tensor.shape) for tensor in made.spec.parameters()}, 0.1)
    after = made.model.weights()
    for tensor in made.spec.tensors():
        assert np.array_equal(before[tensor.name], after[tensor.name]) != tensor.trainable, tensor.name


def test_the_learning_rate_is_not_rounded_to_float32(subject: Any) -> None:
    recipe = Recipe(SGD(momentum=0.0, nesterov=False, weight_decay=0.0), Schedule(0.1, 0, 3), 4)
    made = subject("mlp", recipe)
    weights = {tensor.name: np.zeros(tensor.shape) for tensor in made.spec.tensors()}
    made.model.load_weights(weights)
    made.trainer.apply({name: np.ones_like(array) for name, array in weights.items()}, 0.1)
    assert all((array == -0.1).all() for array in made.model.weights().values())


def test_float32_bias_corrections_are_exact(subject: Any) -> None:
    recipe = Recipe(AdamW(weight_decay=0.0, epsilon=1e-12), Schedule(0.1, 0, 3), 4)
    made = subject("mlp", recipe, "float32")
    state = made.trainer.state()
    made.trainer.load_state(dataclasses.replace(state, weights={name: np.zeros_like(array) for name, array in state.weights.items()}))
    made.trainer.apply({name: np.ones_like(array) for name, array in state.weights.items()}, 0.1)
    # With the first gradient, m̂ / sqrt(v̂) is exactly its sign.
    assert all(np.abs(array + 0.1).max() < 3e-8 for array in made.model.weights().values())
