"""What a recipe may ask of a step: accumulation, shares, clipping, loss scaling, half precision, frozen layers, remat, `fit()`."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from triptych.core import recipe as formulas
from triptych.core.contract import Execution, TrainingState
from triptych.core.errors import UsageError
from triptych.core.recipe import SGD, AdamW, Clip, LossScaling, Recipe, Schedule
from triptych.in_tensorflow import layers
from triptych.in_tensorflow.train import TrainingModel, next_loss_scale

PLAIN = Recipe(SGD(), Schedule(0.1, 2, 10), global_batch_size=6, label_smoothing=0.1, ema_decay=0.9)
SCALED = LossScaling(initial=8.0, interval=2)


def shares(made: Any, size: int = 6) -> np.ndarray:
    """(N, classes): each image mixed of two classes."""
    first, second = (np.eye(made.spec.num_classes)[made.batch(size)[1]] for _ in range(2))
    return 0.7 * first + 0.3 * second[::-1]


def assert_close(left: TrainingState, right: TrainingState, tolerance: float) -> None:
    """Equal counts, and tensors within `tolerance` of the largest value of each."""
    assert (left.step, left.loss_scale, left.good_steps) == (right.step, right.loss_scale, right.good_steps)
    pairs = [(left.weights, right.weights), (left.ema, right.ema), *((left.slots[slot], right.slots[slot]) for slot in left.slots)]
    for x, y in pairs:
        assert list(x) == list(y)
        for name in x:
            assert np.abs(x[name] - y[name]).max() <= tolerance * max(np.abs(y[name]).max(), 1e-300), name


def run(made: Any, steps: int = 2, targets: np.ndarray | None = None) -> list[float]:
    """Losses of a few steps over six images."""
    images, labels = made.batch(6)
    return [made.trainer.step(images, labels if targets is None else targets, rate) for rate in (0.05, 0.1, 0.02)[:steps]]


@pytest.mark.parametrize("micro", [1, 2, 4, 6])
def test_micro_batches_add_up_to_the_whole(micro: int, subject: Any) -> None:
    whole, parts = subject("mlp", PLAIN), subject("mlp", dataclasses.replace(PLAIN, micro_batch_size=micro))
    images = whole.batch(6)[0]
    for targets in (whole.batch(6)[1], shares(whole)):
        one, many = whole.trainer.gradients(images, targets), parts.trainer.gradients(images, targets)
        assert many.loss == pytest.approx(one.loss, rel=1e-14)
        for name, gradient in one.gradients.items():
            assert np.abs(gradient - many.gradients[name]).max() <= 1e-14 * np.abs(gradient).max(), name
    assert run(whole) == pytest.approx(run(parts), rel=1e-14)
    assert_close(parts.trainer.state(), whole.trainer.state(), 1e-14)


def test_batch_norm_sees_the_parts_in_order(subject: Any) -> None:
    made = subject("resnet20", dataclasses.replace(PLAIN, micro_batch_size=4))
    images, labels = made.batch(6)
    start = made.model.weights()
    gradients = made.trainer.gradients(images, labels)
    assert all(np.array_equal(array, made.model.weights()[name]) for name, array in start.items())
    plain = subject("resnet20", dataclasses.replace(PLAIN, micro_batch_size=None))
    losses, total = [], dict.fromkeys(gradients.gradients, 0.0)
    for part, share in ((slice(0, 4), 4 / 6), (slice(4, 6), 2 / 6)):
        found = plain.trainer.gradients(images[part], labels[part])
        losses.append(share * found.loss)
        total = {name: total[name] + share * gradient for name, gradient in found.gradients.items()}
        plain.model.load_weights({**plain.model.weights(), **plain.model.forward(images[part], training=True).state})
    assert gradients.loss == pytest.approx(sum(losses), rel=1e-13)
    for name, gradient in gradients.gradients.items():
        np.testing.assert_allclose(gradient, total[name], rtol=1e-9, atol=1e-12)
    assert made.trainer.step(images, labels, 0.0) == pytest.approx(sum(losses), rel=1e-13)
    after = made.model.weights()
    assert after["bn1.num_batches_tracked"] == 2
    for tensor in made.spec.tensors():
        if not tensor.trainable:
            np.testing.assert_allclose(after[tensor.name], plain.model.weights()[tensor.name], rtol=1e-12, atol=1e-14)


def test_a_planted_share_is_looked_up_when_traced(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = subject("mlp", dataclasses.replace(PLAIN, micro_batch_size=4))
    images, labels = made.batch(6)
    right = formulas.micro_batches
    monkeypatch.setattr(formulas, "micro_batches", lambda recipe, samples: [(part, 0.5) for part, _ in right(recipe, samples)])
    plain = subject("mlp", PLAIN)
    halves = [plain.trainer.gradients(images[part], labels[part]).loss for part in (slice(0, 4), slice(4, 6))]
    assert made.trainer.gradients(images, labels).loss == pytest.approx(sum(halves) / 2, rel=1e-13)


def test_the_loss_of_shares_is_the_mean_over_classes(subject: Any) -> None:
    made = subject("mlp", PLAIN)
    images, targets = made.batch(6)[0], shares(made)
    logits = made.model.predict(images)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -((0.9 * targets + 0.1 / 10) * log_probabilities).sum(-1).mean()
    assert made.trainer.step(images, targets, 0.0) == pytest.approx(expected, rel=1e-13)
    for wrong in (targets[:3], targets[:, :4], targets * 2):
        with pytest.raises(UsageError, match="shares"):
            made.trainer.step(images, wrong, 0.1)


@pytest.mark.parametrize("clip", [Clip(norm=0.1), Clip(norm=1e9), Clip(value=1e-3)])
def test_gradients_are_clipped_by_torchs_formula(clip: Clip, subject: Any) -> None:
    made, plain = (subject("mlp", dataclasses.replace(PLAIN, clip=limits)) for limits in (clip, None))
    images, labels = made.batch(6)
    found = made.trainer.gradients(images, labels).gradients
    norm = np.sqrt(sum((gradient**2).sum() for gradient in found.values()))
    assert 0.1 < norm < 1e9
    if clip.norm is not None:
        clipped = {name: gradient * min(1.0, clip.norm / (norm + 1e-6)) for name, gradient in found.items()}
    else:
        clipped = {name: np.clip(gradient, -1e-3, 1e-3) for name, gradient in found.items()}
    made.trainer.step(images, labels, 0.1)
    plain.trainer.apply(clipped, 0.1)
    assert_close(made.trainer.state(), plain.trainer.state(), 1e-14)


def test_loss_scaling_changes_nothing_but_the_scale(subject: Any) -> None:
    made, plain = (subject("resnet20", dataclasses.replace(PLAIN, loss_scaling=each, clip=Clip(norm=0.5))) for each in (SCALED, None))
    assert run(made, 3) == pytest.approx(run(plain, 3), rel=1e-12)
    state = made.trainer.state()
    assert (state.step, state.loss_scale, state.good_steps) == (3, 16.0, 1)
    assert_close(dataclasses.replace(state, loss_scale=None, good_steps=0), plain.trainer.state(), 1e-9)


def test_an_overflow_skips_the_update_and_halves_the_scale(subject: Any) -> None:
    made = subject("resnet20", dataclasses.replace(PLAIN, loss_scaling=LossScaling(initial=2.0**1023)))
    weights = made.model.weights()
    made.model.load_weights({**weights, "fc.weight": 100.0 * weights["fc.weight"]})
    before = made.trainer.state()
    statistics = made.model.forward(made.batch(6)[0], training=True).state
    assert np.isfinite(made.trainer.step(*made.batch(6), 0.1))
    after = made.trainer.state()
    assert (after.step, after.loss_scale, after.good_steps) == (0, 2.0**1022, 0)
    for tensor in made.spec.tensors():
        if tensor.trainable:
            np.testing.assert_array_equal(after.weights[tensor.name], before.weights[tensor.name])
            np.testing.assert_array_equal(after.slots["momentum"][tensor.name], before.slots["momentum"][tensor.name])
        else:
            np.testing.assert_allclose(after.weights[tensor.name], statistics[tensor.name], rtol=1e-12)
        np.testing.assert_array_equal(after.ema[tensor.name], before.ema[tensor.name])


def test_applied_gradients_that_are_not_finite_are_an_overflow(subject: Any) -> None:
    made = subject("mlp", dataclasses.replace(PLAIN, loss_scaling=SCALED))
    good = {tensor.name: np.ones(tensor.shape) for tensor in made.spec.parameters()}
    made.trainer.apply(good, 0.1)
    before = made.trainer.state()
    for bad in (np.nan, np.inf):
        made.trainer.apply({**good, "fc.bias": np.full(10, bad)}, 0.1)
    after = made.trainer.state()
    assert (before.step, before.loss_scale, before.good_steps) == (1, 8.0, 1)
    assert (after.step, after.loss_scale, after.good_steps) == (1, 2.0, 0)
    assert_close(dataclasses.replace(after, loss_scale=8.0, good_steps=1), before, 0.0)
    made.trainer.load_state(before)
    assert_close(made.trainer.state(), before, 0.0)


def test_the_loss_scale_moves_as_in_core() -> None:
    scaling, scale, good = LossScaling(64.0, 2.0, 0.5, 3), 64.0, 0
    held, kept = tf.constant(scale, tf.float64), tf.constant(good, tf.int64)
    for overflow in np.random.default_rng(0).random(60) < 0.3:
        scale, good = formulas.next_loss_scale(scaling, scale, good, overflow=bool(overflow))
        held, kept = next_loss_scale(scaling, held, kept, tf.constant(overflow))
        assert (float(held), int(kept)) == (scale, good)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["resnet50", "resnet20", "mlp"])
def test_half_precision_is_near_and_keeps_everything_else_in_full(name: str, kind: Any, subject: Any) -> None:
    scaling = LossScaling() if kind == "float16" else None
    half = subject(name, dataclasses.replace(PLAIN, mixed_precision=kind, loss_scaling=scaling), "float32")
    full = subject(name, PLAIN, "float32")
    images, labels = half.batch(6)
    logits = half.model.predict(images)
    found, expected = half.trainer.gradients(images, labels), full.trainer.gradients(images, labels)
    assert found.loss == pytest.approx(expected.loss, rel=0.05)
    assert found.loss != expected.loss
    last = np.abs(found.gradients["fc.weight"] - expected.gradients["fc.weight"]).max() / np.abs(expected.gradients["fc.weight"]).max()
    assert 1e-5 < last < (0.2 if kind == "bfloat16" else 0.05)
    np.testing.assert_array_equal(half.model.predict(images), logits)
    policies = {layer.dtype_policy.name for layer in half.model.native.layers}
    assert policies == {"float32"}
    run(half)
    state = half.trainer.state()
    assert state.step == 2
    for part in (state.weights, state.ema, *state.slots.values()):
        assert {array.dtype.name for array in part.values()} <= {"float32", "int64"}
    assert keras.config.dtype_policy().name == "float32"


def test_batch_norm_computes_in_the_parameters_precision(subject: Any) -> None:
    made = subject("resnet20", dataclasses.replace(PLAIN, mixed_precision="bfloat16"), "float32")
    seen: dict[str, set[str]] = {}

    def watch(kind: str) -> Any:
        def wrapper(layer: Any, call: Any, x: Any) -> Any:
            y = call(x)
            seen.setdefault(kind, set()).update({x.dtype.name, y.dtype.name})
            return y

        return wrapper

    moments = layers.moments

    def seen_by_moments(x: Any) -> Any:
        seen.setdefault("norm", set()).add(x.dtype.name)
        return moments(x)

    with (
        pytest.MonkeyPatch.context() as patch,
        made.model.intercept("conv1", watch("conv")),
        made.model.intercept("fc", watch("fc")),
    ):
        patch.setattr(layers, "moments", seen_by_moments)
        run(made, 1)
    assert seen == {"conv": {"bfloat16"}, "norm": {"float32"}, "fc": {"bfloat16"}}


def test_batch_norms_gradient_is_that_of_its_formula_twice_over() -> None:
    generator = np.random.default_rng(0)
    x, dy = (tf.constant(generator.normal(1.0, 2.0, (4, 3, 3, 5))) for _ in range(2))
    gamma, beta = (tf.constant(generator.normal(1.0, 0.5, 5)) for _ in range(2))

    def plain(x: Any, gamma: Any, beta: Any, epsilon: float) -> Any:
        mean, variance = layers.moments(x)
        return (x - mean) / tf.sqrt(variance + epsilon) * gamma + beta, mean, variance

    def derivatives(function: Any) -> list[Any]:
        with tf.GradientTape() as outer:
            outer.watch((x, gamma, beta))
            with tf.GradientTape() as inner:
                inner.watch((x, gamma, beta))
                loss = tf.reduce_sum(function(x, gamma, beta, 1e-5)[0] * dy)
            first = inner.gradient(loss, (x, gamma, beta))
            size = tf.add_n([tf.reduce_sum(gradient**3) for gradient in first])
        return [*first, *outer.gradient(size, (x, gamma))]

    for ours, expected in zip(derivatives(layers.normalize_by_batch), derivatives(plain), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


def test_frozen_layers_stay_as_they_are(subject: Any) -> None:
    recipe = dataclasses.replace(PLAIN, frozen=("conv1", "bn1", "layer1"), clip=Clip(norm=0.5), micro_batch_size=4)
    made, whole = subject("resnet20", recipe), subject("resnet20", dataclasses.replace(PLAIN, micro_batch_size=4))
    images, labels = made.batch(6)
    frozen = {tensor.name for tensor in made.spec.tensors() if formulas.is_frozen(recipe, tensor.layer)}
    assert "layer1.0.bn2.running_var" in frozen
    assert "layer2.0.conv1.weight" not in frozen
    before = made.model.weights()
    found = made.trainer.gradients(images, labels)
    assert list(found.gradients) == [tensor.name for tensor in made.spec.parameters()]
    assert {name for name, gradient in found.gradients.items() if not gradient.any()} == frozen & set(found.gradients)
    # By running statistics: what leaves the frozen part is what it gives in evaluation.
    evaluated = made.model.forward(images).intermediates["layer1.0.relu2"]
    assert found.loss != whole.trainer.gradients(images, labels).loss
    run(made)
    made.trainer.apply({tensor.name: np.ones(tensor.shape) for tensor in made.spec.parameters()}, 0.1)
    state = made.trainer.state()
    for name, array in before.items():
        assert np.array_equal(state.weights[name], array) == (name in frozen), name
    assert list(state.slots["momentum"]) == [tensor.name for tensor in made.spec.parameters()]
    assert not any(state.slots["momentum"][name].any() for name in frozen & set(state.slots["momentum"]))
    np.testing.assert_array_equal(made.model.forward(images).intermediates["layer1.0.relu2"], evaluated)
    assert all(layer.trainable for layer in made.model.native.layers)
    moved = made.model.forward(images, training=True).state
    assert moved["bn1.num_batches_tracked"] == 1, "the model itself is not frozen"


@pytest.mark.parametrize(("name", "options"), [("resnet50", {}), ("resnet20", {}), ("mlp", {"dropout": 0.5})])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 4}, {"mixed_precision": "bfloat16"}, {"frozen": ("fc1", "layer1")}])
def test_remat_changes_memory_alone(name: str, options: dict[str, Any], changes: dict[str, Any], subject: Any) -> None:
    frozen = tuple(layer for layer in changes.get("frozen", ()) if layer.startswith("fc") == (name == "mlp"))
    recipe = dataclasses.replace(PLAIN, **{**changes, "frozen": frozen})
    made, plain = (subject(name, dataclasses.replace(recipe, remat=remat), **options) for remat in (True, False))
    images, labels = made.batch(6)
    for pass_ in (made.trainer, plain.trainer):
        pass_.gradients(images, labels)
    one, other = made.trainer.gradients(images, labels), plain.trainer.gradients(images, labels)
    tolerance = 1e-6 if recipe.mixed_precision else 1e-12
    assert one.loss == pytest.approx(other.loss, rel=tolerance)
    for key, gradient in other.gradients.items():
        assert np.abs(one.gradients[key] - gradient).max() <= tolerance * max(np.abs(gradient).max(), 1e-9), key
    assert run(made, 1) == pytest.approx(run(plain, 1), rel=tolerance)
    assert_close(made.trainer.state(), plain.trainer.state(), tolerance * 10)


def test_remat_keeps_fewer_activations(subject: Any) -> None:
    made, plain = (subject("resnet50", dataclasses.replace(PLAIN, remat=remat)) for remat in (True, False))

    def convolutions(trainer: Any) -> int:
        batch = [tf.zeros((6, *made.spec.input_shape), tf.float64), tf.zeros(6, tf.int64)]
        graph = trainer._traces(trainer._gradients).get_concrete_function(*batch).graph
        return sum(operation.type == "Conv2D" for operation in graph.get_operations())

    assert convolutions(made.trainer) == 2 * convolutions(plain.trainer)


@pytest.mark.parametrize("recipe", [
    PLAIN,
    dataclasses.replace(PLAIN, micro_batch_size=4, clip=Clip(norm=0.5), loss_scaling=SCALED),
    dataclasses.replace(PLAIN, optimizer=AdamW(), micro_batch_size=3, remat=True),
], ids=["plain", "scaled", "adamw"])  # fmt: skip
@pytest.mark.parametrize(("name", "options"), [("resnet20", {}), ("mlp", {"dropout": 0.5})])
def test_fit_takes_the_steps_of_the_trainer(name: str, options: dict[str, Any], recipe: Recipe, subject: Any) -> None:
    made, other = subject(name, recipe, **options), subject(name, recipe, **options)
    images, labels = made.batch(18)
    losses = [
        other.trainer.step(images[6 * i : 6 * i + 6], labels[6 * i : 6 * i + 6], formulas.learning_rate(recipe.schedule, i))
        for i in range(3)
    ]
    fitted = TrainingModel(made.trainer)
    dataset = tf.data.Dataset.from_tensor_slices((images.astype(np.float64), labels)).batch(6, drop_remainder=True)
    history = fitted.fit(dataset, epochs=1, verbose=0)
    assert history.history["loss"] == [pytest.approx(np.mean(losses), rel=1e-6)]
    assert_close(made.trainer.state(), other.trainer.state(), 1e-15)
    np.testing.assert_allclose(fitted.predict(images, verbose=0), made.model.predict(images), rtol=1e-12, atol=1e-12)


def test_fit_says_what_it_cannot_do(subject: Any) -> None:
    plateau = dataclasses.replace(PLAIN, schedule=dataclasses.replace(PLAIN.schedule, kind="plateau"))
    with pytest.raises(UsageError, match="plateau"):
        TrainingModel(subject("mlp", plateau).trainer)
    made = subject("mlp", dataclasses.replace(PLAIN, micro_batch_size=2))
    dataset = tf.data.Dataset.from_tensor_slices(made.batch(6)).batch(4)
    with pytest.raises(UsageError, match="drop_remainder=True"):
        TrainingModel(made.trainer).fit(dataset, verbose=0)


def test_a_recipe_that_cannot_be_executed_is_refused(room: Any, subject: Any) -> None:
    made = subject("mlp")
    for changes, message in ({"mixed_precision": "float16"}, "loss_scaling"), ({"frozen": ("layer9",)}, "layer9"):
        with pytest.raises(UsageError, match=message):
            room.create_trainer(made.model, dataclasses.replace(PLAIN, **changes))


@pytest.mark.parametrize("execution", [Execution(compile=True), Execution(tuned=True)], ids=["compile", "tuned"])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 4, "clip": Clip(norm=0.5), "loss_scaling": SCALED, "remat": True}])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_execution_changes_rounding_alone(precision: str, changes: dict[str, Any], execution: Execution, room: Any, subject: Any) -> None:
    recipe = dataclasses.replace(PLAIN, **changes)
    made, plain = subject("resnet20", recipe, precision), subject("resnet20", recipe, precision)
    trainer = room.create_trainer(made.model, recipe, execution)
    images, labels = made.batch(6)
    tolerance = 2e-4 if precision == "float32" else 1e-10
    assert trainer.step(images, labels, 0.1) == pytest.approx(plain.trainer.step(images, labels, 0.1), rel=tolerance)
    assert_close(trainer.state(), plain.trainer.state(), tolerance)
