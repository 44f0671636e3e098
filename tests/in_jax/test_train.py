"""Loss, gradients, optimizers, EMA and state, against formulas in numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from triptych.core import philox
from triptych.core import recipe as recipes
from triptych.core.contract import TrainingState
from triptych.core.errors import InputRefused, UsageError
from triptych.core.recipe import SGD, AdamW

Arrays = dict[str, np.ndarray]
RATES = (0.1, 0.03, 0.07)


def by_hand(recipe: recipes.Recipe, decay: float, w: np.ndarray, slots: list[np.ndarray], g: np.ndarray, lr: float, step: int) -> Any:
    """PyTorch's update of one tensor, written out: (weight, slots)."""
    o = recipe.optimizer
    if isinstance(o, SGD):
        g = g + decay * w
        v = o.momentum * slots[0] + g
        return w - lr * (g + o.momentum * v if o.nesterov else v), [v]
    m, v = o.beta1 * slots[0] + (1 - o.beta1) * g, o.beta2 * slots[1] + (1 - o.beta2) * g * g
    denominator = np.sqrt(v) / np.sqrt(1 - o.beta2 ** (step + 1)) + o.epsilon
    return w * (1 - lr * decay) - lr * (m / (1 - o.beta1 ** (step + 1))) / denominator, [m, v]


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
@pytest.mark.parametrize("optimizer", [SGD(), SGD(nesterov=False, weight_decay=0.1), SGD(momentum=0.0), AdamW(weight_decay=0.1)])
def test_optimizers_follow_the_formula_at_a_moving_rate(lab: Any, optimizer: Any, decay_norm_and_bias: bool) -> None:
    trainer = lab.trainer("mlp", optimizer, decay_norm_and_bias=decay_norm_and_bias)
    start = trainer.state()
    w, ema = dict(start.weights), dict(start.ema)
    slots = {t.name: [np.zeros(t.shape) for _ in optimizer.slots] for t in trainer.model.spec.parameters()}
    for step, rate in enumerate(RATES):
        gradients = {name: philox.normal(f"{step}/{name}", value.shape) for name, value in w.items()}
        trainer.apply(gradients, rate)
        for tensor in trainer.model.spec.parameters():
            name, decay = tensor.name, optimizer.weight_decay if recipes.decays(trainer.recipe, tensor) else 0.0
            w[name], slots[name] = by_hand(trainer.recipe, decay, w[name], slots[name], gradients[name], rate, step)
            ema[name] = 0.9 * ema[name] + 0.1 * w[name]
    state = trainer.state()
    assert state.step == len(RATES)
    for name, value in w.items():
        np.testing.assert_allclose(state.weights[name], value, rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(state.ema[name], ema[name], rtol=1e-14, atol=1e-15)
        for i, slot in enumerate(optimizer.slots):
            np.testing.assert_allclose(state.slots[slot][name], slots[name][i], rtol=1e-14, atol=1e-15)


def test_bias_corrections_in_float32_do_not_cancel(lab: Any) -> None:
    model = lab.model("mlp", "float32")
    trainer = lab.room.create_trainer(model, lab.recipe(AdamW(weight_decay=0.0)))
    before = model.weights()
    trainer.apply({t.name: np.full(t.shape, 0.5) for t in model.spec.parameters()}, 1.0)
    for name, value in model.weights().items():
        np.testing.assert_allclose(before[name] - value, 1.0, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_of_the_head_follow_the_formula(lab: Any, smoothing: float) -> None:
    trainer = lab.trainer("mlp", label_smoothing=smoothing)
    images, labels = lab.batch(trainer.model.spec)
    before = trainer.model.weights()
    found = trainer.gradients(images, labels)
    seen = trainer.model.forward(images, training=True).intermediates
    shifted = seen["fc"] - seen["fc"].max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    targets = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10
    assert found.loss == pytest.approx(-(targets * log_p).sum(1).mean(), rel=1e-14)
    residual = (np.exp(log_p) - targets) / len(labels)
    np.testing.assert_allclose(found.gradients["fc.weight"], residual.T @ seen["relu2"], rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(found.gradients["fc.bias"], residual.sum(0), rtol=1e-11, atol=1e-15)
    assert all(np.array_equal(before[name], value) for name, value in trainer.model.weights().items())


def test_a_step_is_its_gradients_applied_with_statistics_updated(lab: Any) -> None:
    trainer = lab.trainer("resnet20")
    images, labels = lab.batch(trainer.model.spec)
    start = trainer.state()
    found, forward = trainer.gradients(images, labels), trainer.model.forward(images, training=True)
    # Differences confirm the gradient through BatchNorm and both shortcuts, in one random direction.
    direction = {name: philox.normal(f"direction/{name}", value.shape) for name, value in found.gradients.items()}
    losses = []
    for sign in (1e-6, -1e-6):
        trainer.model.load_weights({**start.weights, **{n: start.weights[n] + sign * d for n, d in direction.items()}})
        losses.append(trainer.gradients(images, labels).loss)
    slope = sum(float((found.gradients[name] * d).sum()) for name, d in direction.items())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)

    trainer.load_state(start)
    trainer.apply(found.gradients, 0.1)
    applied = trainer.state()
    trainer.load_state(start)
    assert trainer.step(images, labels, 0.1) == found.loss
    stepped = trainer.state()
    assert same_arrays({**applied.weights, **forward.state}, stepped.weights)
    assert same_arrays(applied.slots["momentum"], stepped.slots["momentum"])
    assert all(np.array_equal(applied.weights[n], start.weights[n]) for n in forward.state), "apply leaves statistics alone"
    for name, value in stepped.weights.items():
        averaged = value if value.dtype == np.int64 else 0.9 * start.ema[name] + 0.1 * value
        np.testing.assert_allclose(stepped.ema[name], averaged, rtol=1e-14, atol=1e-15)
    assert trainer._advance._cache_size() == trainer._gradients._cache_size() == 1, "nothing is compiled twice"


@pytest.mark.parametrize("optimizer", [SGD(), AdamW()])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_resumed_run_goes_on_bit_for_bit(lab: Any, optimizer: Any, ema_decay: float | None) -> None:
    first, second = (lab.trainer("mlp", optimizer, ema_decay=ema_decay) for _ in range(2))
    images, labels = lab.batch(first.model.spec)
    first.step(images, labels, RATES[0])
    state = first.state()
    assert bool(state.ema) == (ema_decay is not None)
    second.load_state(state)
    assert same(second.state(), state)
    for rate in RATES:
        assert first.step(images, labels, rate) == second.step(images, labels, rate)
    assert same(first.state(), second.state())
    assert first.state().step == 4


def test_a_new_trainer_starts_at_zero_slots_and_its_own_weights(lab: Any) -> None:
    trainer = lab.trainer("mlp", AdamW())
    state = trainer.state()
    assert same_arrays(state.ema, state.weights)
    assert set(state.slots) == {"exp_avg", "exp_avg_sq"}
    assert not any(value.any() for slot in state.slots.values() for value in slot.values())
    assert state.step == 0


def test_a_state_that_does_not_fit_is_refused_whole(lab: Any) -> None:
    trainer = lab.trainer("mlp")
    state = trainer.state()
    other = {name: value + 1.0 for name, value in state.weights.items()}
    for wrong, message in (
        (dataclasses.replace(state, weights=other, slots={}), "optimizer slots"),
        (dataclasses.replace(state, weights=other, ema={}), "missing fc1.weight"),
        (dataclasses.replace(state, weights={}), "missing fc1.weight"),
    ):
        with pytest.raises(InputRefused, match=message):
            trainer.load_state(wrong)
        assert same(trainer.state(), state)
    with pytest.raises(InputRefused, match="the recipe has none"):
        lab.trainer("mlp", ema_decay=None).load_state(state)


@pytest.mark.parametrize("labels", [np.zeros(5, int), np.full(6, 10), np.full(6, -1), np.zeros((6, 1), int)])
def test_labels_that_do_not_fit_are_refused(lab: Any, labels: np.ndarray) -> None:
    trainer = lab.trainer("mlp")
    with pytest.raises(UsageError, match=r"given; expected \(6,\) integers in \[0, 10\) or \(6, 10\) shares"):
        trainer.step(lab.batch(trainer.model.spec)[0], labels, 0.1)


def test_dropout_acts_in_steps_only_and_depends_on_seed_and_step_alone(lab: Any) -> None:
    def trainer(seed: int = 0) -> Any:
        return lab.room.create_trainer(lab.model("mlp", dropout=0.5), lab.recipe(seed=seed))

    first, images, labels = trainer(), *lab.batch(lab.spec("mlp"))
    whole = first.gradients(images, labels).loss
    assert whole == first.gradients(images, labels).loss
    losses = [first.step(images, labels, 0.0) for _ in range(2)]
    assert len({whole, *losses}) == 3
    assert trainer().step(images, labels, 0.0) == losses[0]
    assert trainer(seed=1).step(images, labels, 0.0) != losses[0]
    resumed = trainer()
    resumed.load_state(dataclasses.replace(resumed.state(), step=1))
    assert resumed.step(images, labels, 0.0) == losses[1]


def test_training_lowers_the_loss_and_the_model_moves_along(lab: Any) -> None:
    trainer = lab.trainer("mlp", label_smoothing=0.0)
    images, labels = lab.batch(trainer.model.spec)
    losses = [trainer.step(images, labels, 0.05) for _ in range(20)]
    assert losses[-1] < 0.1 * losses[0]
    assert np.array_equal(trainer.model.predict(images).argmax(1), labels)


def same_arrays(a: Arrays, b: Arrays) -> bool:
    """Whether two sets of arrays are equal, bit for bit."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def same(a: TrainingState, b: TrainingState) -> bool:
    """Whether two states are equal, bit for bit."""
    slots = a.slots.keys() == b.slots.keys() and all(same_arrays(a.slots[slot], b.slots[slot]) for slot in a.slots)
    return slots and same_arrays(a.weights, b.weights) and same_arrays(a.ema, b.ema) and a.step == b.step
