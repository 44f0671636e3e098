"""Loss, gradients, steps, and the training state."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from triptych.core.contract import TrainingState
from triptych.core.errors import InputRefused, UsageError
from triptych.core.recipe import AdamW, Recipe, Schedule

ADAMW = Recipe(AdamW(), Schedule(0.01, 0, 10), global_batch_size=4, label_smoothing=0.0)


def test_loss_is_the_smoothed_cross_entropy(subject: Any) -> None:
    made = subject("resnet20")
    images, labels = made.batch(6)
    logits = made.model.forward(images, training=True).intermediates["fc"]
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = 0.9 * np.eye(10)[labels] + 0.1 / 10
    expected = -(targets * log_probabilities).sum(-1).mean()
    assert made.trainer.gradients(images, labels).loss == pytest.approx(expected, rel=1e-13)
    assert made.trainer.step(images, labels, 0.1) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("name", ["resnet50", "resnet20", "mlp"])
def test_gradients_are_the_slopes_of_the_loss(name: str, subject: Any) -> None:
    made = subject(name)
    images, labels = made.batch()
    before = made.model.weights()
    found = made.trainer.gradients(images, labels).gradients
    assert all(np.array_equal(array, made.model.weights()[key]) for key, array in before.items())
    assert list(found) == [tensor.name for tensor in made.spec.parameters()]
    generator = np.random.default_rng(4)
    direction = {tensor.name: generator.normal(size=tensor.shape) for tensor in made.spec.parameters()}

    def loss(distance: float) -> float:
        made.model.load_weights({key: array + distance * direction[key] if key in direction else array for key, array in before.items()})
        return made.trainer.gradients(images, labels).loss

    slope = (loss(1e-8) - loss(-1e-8)) / 2e-8
    assert slope == pytest.approx(sum(float((found[key] * direction[key]).sum()) for key in direction), rel=1e-5)


@pytest.mark.parametrize("recipe", ["sgd", "adamw"])
def test_a_step_is_gradients_then_apply(recipe: str, subject: Any) -> None:
    options = (ADAMW,) if recipe == "adamw" else ()
    made, other = subject("resnet20", *options), subject("resnet20", *options)
    images, labels = made.batch()
    statistics = made.model.forward(images, training=True).state
    gradients = other.trainer.gradients(images, labels)
    assert made.trainer.step(images, labels, 0.1) == pytest.approx(gradients.loss, rel=1e-13)
    other.trainer.apply(gradients.gradients, 0.1)
    after, expected = made.trainer.state(), other.trainer.state()
    for tensor in made.spec.tensors():
        reference = expected.weights[tensor.name] if tensor.trainable else statistics[tensor.name]
        np.testing.assert_allclose(after.weights[tensor.name], reference, rtol=1e-9, atol=1e-10)
    assert after.step == 1
    assert list(after.slots) == list(made.recipe.optimizer.slots)
    assert (after.ema == {}) == (recipe == "adamw")


def test_the_average_covers_statistics_and_copies_counters(subject: Any) -> None:
    made = subject("resnet20")
    images, labels = made.batch()
    before = made.trainer.state()
    assert all(np.array_equal(array, before.ema[key]) for key, array in before.weights.items())
    made.trainer.step(images, labels, 0.1)
    after = made.trainer.state()
    for key in ("conv1.weight", "bn1.running_var"):
        np.testing.assert_allclose(after.ema[key], 0.9 * before.weights[key] + 0.1 * after.weights[key], rtol=1e-14, atol=1e-16)
    assert after.ema["bn1.num_batches_tracked"] == after.weights["bn1.num_batches_tracked"] == 1


@pytest.mark.parametrize(("name", "options"), [("resnet20", {}), ("mlp", {"dropout": 0.5})])
def test_a_state_resumes_bit_for_bit(name: str, options: dict[str, Any], subject: Any) -> None:
    made = subject(name, precision="float32", **options)
    images, labels = made.batch()
    made.trainer.step(images, labels, 0.1)
    kept = made.trainer.state()
    losses = [made.trainer.step(images, labels, rate) for rate in (0.05, 0.2)]
    resumed = subject(name, precision="float32", **options)
    resumed.trainer.load_state(kept)
    assert same(resumed.trainer.state(), kept)
    assert [resumed.trainer.step(images, labels, rate) for rate in (0.05, 0.2)] == losses
    assert same(resumed.trainer.state(), made.trainer.state())


def same(left: TrainingState, right: TrainingState) -> bool:
    """Equal bit for bit."""
    pairs = [(left.weights, right.weights), (left.ema, right.ema), *((left.slots[slot], right.slots[slot]) for slot in left.slots)]
    return left.step == right.step and all(
        list(x) == list(y) and all(x[key].tobytes() == y[key].tobytes() and x[key].dtype == y[key].dtype for key in x) for x, y in pairs
    )


def test_states_that_do_not_fit_are_refused_and_change_nothing(subject: Any) -> None:
    made = subject("mlp")
    state = made.trainer.state()
    other = {key: array + 1.0 for key, array in state.weights.items()}
    wrong = {key: array for key, array in state.ema.items() if key != "fc.bias"}
    with pytest.raises(InputRefused, match="averaged weights do not fit"):
        made.trainer.load_state(dataclasses.replace(state, weights=other, ema=wrong))
    with pytest.raises(InputRefused, match="exp_avg"):
        made.trainer.load_state(dataclasses.replace(state, weights=other, slots={"exp_avg": {}, "exp_avg_sq": {}}))
    with pytest.raises(InputRefused, match=r"missing fc\.bias"):
        made.trainer.apply({}, 0.1)
    assert same(made.trainer.state(), state)


def test_wrong_labels_are_refused(subject: Any) -> None:
    made = subject("mlp")
    images, labels = made.batch()
    for wrong, message in (
        (labels[:2], r"\(2,\) and type int64 given; expected \(4,\) integers in \[0, 10\) or \(4, 10\) shares"),
        (labels * 0.5, "float64"),
        (labels + 10, r"given; expected \(4,\) integers in \[0, 10\)"),
    ):
        with pytest.raises(UsageError, match=message):
            made.trainer.step(images, wrong, 0.1)
    with pytest.raises(UsageError, match="learning_rate=nan"):
        made.trainer.step(images, labels, float("nan"))


def test_dropout_is_active_in_steps_alone(subject: Any) -> None:
    made, plain = subject("mlp", dropout=0.5), subject("mlp")
    images, labels = made.batch()
    forward = made.model.forward(images, training=True).intermediates
    expected = plain.model.forward(images).intermediates
    assert list(forward) == list(expected)
    assert all(np.array_equal(forward[key], expected[key]) for key in expected)
    loss = plain.trainer.gradients(images, labels).loss
    assert made.trainer.gradients(images, labels).loss == loss
    steps = [made.trainer.step(images, labels, 0.0) for _ in range(3)]
    assert len({loss, *steps}) == 4
