"""Loss, optimizers, moving average and the training state, against formulas written out in numpy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from triptych.core import philox
from triptych.core import recipe as recipes
from triptych.core.contract import TrainingState
from triptych.core.difference import scaled_error
from triptych.core.errors import InputRefused, UsageError
from triptych.core.recipe import SGD, AdamW

Arrays = dict[str, np.ndarray]
RATES = (0.1, 0.03, 0.07)

each_optimizer = pytest.mark.parametrize(
    "optimizer",
    [SGD(), SGD(nesterov=False, momentum=0.8), AdamW(weight_decay=0.1)],
    ids=["nesterov", "momentum", "adamw"],
)


def by_hand(recipe: recipes.Recipe, decay: float, w: np.ndarray, slots: list[np.ndarray], g: np.ndarray, lr: float, step: int) -> Any:
    """One update of one tensor, by the docstrings of core/recipe.py: (weight, slots)."""
    kind = recipe.optimizer
    if isinstance(kind, SGD):
        g = g + decay * w
        v = kind.momentum * slots[0] + g
        return w - lr * (g + kind.momentum * v if kind.nesterov else v), [v]
    m, v = kind.beta1 * slots[0] + (1 - kind.beta1) * g, kind.beta2 * slots[1] + (1 - kind.beta2) * g**2
    w = w - lr * decay * w
    return w - lr * (m / (1 - kind.beta1**step)) / (np.sqrt(v / (1 - kind.beta2**step)) + kind.epsilon), [m, v]


@each_optimizer
@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_optimizers_follow_the_formula_at_a_moving_rate(lab: Any, optimizer: Any, decay_norm_and_bias: bool) -> None:
    trainer = lab.trainer("resnet20", optimizer, decay_norm_and_bias=decay_norm_and_bias)
    spec, recipe = trainer.model.spec, trainer.recipe
    weights = trainer.state().weights
    slots = {name: [np.zeros_like(weights[name])] * len(optimizer.slots) for name in weights}
    average = dict(weights)
    for step, rate in enumerate(RATES, start=1):
        gradients = {tensor.name: 0.01 * philox.normal(f"{step}/{tensor.name}", tensor.shape) for tensor in spec.parameters()}
        trainer.apply(gradients, rate)
        for tensor in spec.parameters():
            name, decay = tensor.name, optimizer.weight_decay if recipes.decays(recipe, tensor) else 0.0
            weights[name], slots[name] = by_hand(recipe, decay, weights[name], slots[name], gradients[name], rate, step)
        average = {name: recipes.ema(average[name], weights[name], 0.9) for name in weights}
    state = trainer.state()
    assert state.step == 3
    for name in gradients:
        np.testing.assert_allclose(state.weights[name], weights[name], rtol=1e-14, atol=1e-16)
        np.testing.assert_allclose(state.ema[name], average[name], rtol=1e-14, atol=1e-16)
        for i, slot in enumerate(optimizer.slots):
            np.testing.assert_allclose(state.slots[slot][name], slots[name][i], rtol=1e-14, atol=1e-16)
    assert np.array_equal(state.weights["bn1.running_mean"], weights["bn1.running_mean"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_of_the_head_follow_the_formula(lab: Any, smoothing: float) -> None:
    trainer = lab.trainer("mlp", label_smoothing=smoothing)
    images, labels = lab.batch(trainer.model.spec)
    out = trainer.gradients(images, labels)
    logits = trainer.model.predict(images)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = np.eye(10)[labels] * (1 - smoothing) + smoothing / 10
    np.testing.assert_allclose(out.loss, -(target * log_p).sum(1).mean(), rtol=1e-14)
    np.testing.assert_allclose(out.gradients["fc.bias"], (np.exp(log_p) - target).mean(0), rtol=0, atol=1e-15)


def test_gradients_agree_with_differences_and_update_nothing(lab: Any) -> None:
    trainer = lab.trainer("resnet20")
    model, (images, labels) = trainer.model, lab.batch(trainer.model.spec)
    before = trainer.state()
    out = trainer.gradients(images, labels)
    assert list(out.gradients) == [tensor.name for tensor in model.spec.parameters()]
    assert same(trainer.state(), before)
    for name in ("conv1.weight", "layer2.0.bn1.bias", "fc.weight"):
        direction, losses = philox.normal(name, before.weights[name].shape), []
        for sign in (1.0, -1.0):
            model.load_weights({**before.weights, name: before.weights[name] + sign * 1e-6 * direction})
            losses.append(trainer.gradients(images, labels).loss)
        np.testing.assert_allclose((losses[0] - losses[1]) / 2e-6, (out.gradients[name] * direction).sum(), rtol=1e-6)


@each_optimizer
def test_a_step_is_its_gradients_applied_with_statistics_updated(lab: Any, optimizer: Any) -> None:
    whole, parts = lab.trainer("resnet20", optimizer), lab.trainer("resnet20", optimizer)
    images, labels = lab.batch(whole.model.spec)
    passed = parts.model.forward(images, training=True)
    gradients = parts.gradients(images, labels)
    assert whole.step(images, labels, 0.1) == gradients.loss
    parts.apply(gradients.gradients, 0.1)
    state = whole.state()
    for tensor in whole.model.spec.tensors():
        expected = parts.state().weights if tensor.trainable else passed.state
        assert np.array_equal(state.weights[tensor.name], expected[tensor.name])
    assert state.ema["bn1.num_batches_tracked"] == 8
    statistics = recipes.ema(lab.weights(whole.model.spec)["bn1.running_mean"], passed.state["bn1.running_mean"], 0.9)
    np.testing.assert_allclose(state.ema["bn1.running_mean"], statistics, rtol=1e-14)


@each_optimizer
def test_a_resumed_run_goes_on_bit_for_bit(lab: Any, optimizer: Any) -> None:
    first, second = lab.trainer("resnet20", optimizer), lab.trainer("resnet20", optimizer)
    images, labels = lab.batch(first.model.spec)
    for rate in RATES[:2]:
        first.step(images, labels, rate)
    saved = first.state()
    kept = copy.deepcopy(saved)
    second.load_state(saved)
    assert same(second.state(), saved)
    assert first.step(images, labels, RATES[2]) == second.step(images, labels, RATES[2])
    assert same(first.state(), second.state())
    assert same(saved, kept)


def test_a_new_trainer_starts_at_zero_slots_and_its_own_weights(lab: Any) -> None:
    trainer = lab.trainer("mlp", AdamW())
    state = trainer.state()
    assert state.step == 0
    assert same_arrays(state.ema, state.weights)
    assert not any(value.any() for slot in state.slots.values() for value in slot.values())
    assert lab.trainer("mlp", ema_decay=None).state().ema == {}


def test_a_state_that_does_not_fit_is_refused_whole(lab: Any) -> None:
    trainer = lab.trainer("mlp")
    before = trainer.state()
    moved = {name: value + 1 for name, value in before.weights.items()}
    for wrong, message in [
        (TrainingState(moved, {"exp_avg": {}}, before.ema, 1), "another optimizer"),
        (TrainingState(moved, before.slots, {}, 1), "EMA weights do not fit"),
        (TrainingState(moved, {"momentum": {}}, before.ema, 1), "slots momentum do not fit"),
    ]:
        with pytest.raises(InputRefused, match=message):
            trainer.load_state(wrong)
        assert same(trainer.state(), before)
    with pytest.raises(InputRefused, match=r"missing: fc1\.weight"):
        trainer.apply({}, 0.1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(np.arange(6) + 5, "5 to 10"), (np.arange(5), r"\(5,\)"), (np.zeros(6), "float64"), (np.full(6, -1), "-1 to -1")],
)
def test_labels_that_do_not_fit_are_refused(lab: Any, labels: np.ndarray, message: str) -> None:
    trainer = lab.trainer("mlp")
    with pytest.raises(UsageError, match=message):
        trainer.gradients(lab.batch(trainer.model.spec)[0], labels)


def test_without_momentum_the_two_formulas_are_plain_descent(lab: Any) -> None:
    trainer = lab.trainer("mlp", SGD(momentum=0.0, nesterov=True, weight_decay=0.0))
    before, gradient = trainer.state().weights, trainer.gradients(*lab.batch(trainer.model.spec)).gradients
    trainer.apply(gradient, 0.1)
    expected = before["fc.weight"] - 0.1 * gradient["fc.weight"]
    # Relative to the tensor's scale: a weight that its step nearly cancels keeps the rounding of both, fused or not as the processor likes.
    assert scaled_error(trainer.state().weights["fc.weight"], expected) <= 1e-15


def test_dropout_acts_in_steps_only_and_depends_on_seed_and_step_alone(lab: Any) -> None:
    def trainer(seed: int = 0) -> Any:
        return lab.room.create_trainer(lab.model("mlp", dropout=0.5), lab.recipe(seed=seed))

    images, labels = lab.batch(trainer().model.spec)
    plain = lab.trainer("mlp").gradients(images, labels).loss
    first, again, other = trainer(), trainer(), trainer(seed=1)
    assert first.gradients(images, labels).loss == plain
    assert np.array_equal(first.model.forward(images, training=True).intermediates["fc"], first.model.predict(images))
    losses = [each.step(images, labels, 0.0) for each in (first, again, other)]
    assert losses[0] == losses[1] != plain
    assert len({losses[0], losses[2], first.step(images, labels, 0.0)}) == 3


def test_training_lowers_the_loss(lab: Any) -> None:
    trainer = lab.trainer("resnet20")
    images, labels = lab.batch(trainer.model.spec)
    losses = [trainer.step(images, labels, 0.1) for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


def same_arrays(a: Arrays, b: Arrays) -> bool:
    """Equal names and bits."""
    return a.keys() == b.keys() and all(value.tobytes() == b[name].tobytes() for name, value in a.items())


def same(a: TrainingState, b: TrainingState) -> bool:
    """Equal in every bit."""
    slots = a.slots.keys() == b.slots.keys() and all(same_arrays(slot, b.slots[name]) for name, slot in a.slots.items())
    return slots and a.step == b.step and same_arrays(a.weights, b.weights) and same_arrays(a.ema, b.ema)
