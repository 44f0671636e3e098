"""What a recipe may ask of a step: accumulation, shares, clipping, loss scaling, half precision, frozen layers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from triptych.core import recipe as formulas
from triptych.core.errors import UsageError
from triptych.core.recipe import SGD, AdamW, Clip, LossScaling
from triptych.in_pytorch import train

SCALED = LossScaling(initial=8.0, interval=2)


def shares(spec: Any, size: int = 6) -> np.ndarray:
    """(N, classes): each image mixed of two classes."""
    labels = np.arange(size) % spec.num_classes
    one_hot = np.eye(spec.num_classes)[labels]
    return 0.7 * one_hot + 0.3 * one_hot[::-1]


# --- Accumulation and targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 4, 6])
def test_micro_batches_add_up_to_the_whole(lab: Any, micro: int) -> None:
    whole, parts = lab.trainer("mlp"), lab.trainer("mlp", micro_batch_size=micro)
    images, labels = lab.batch(whole.model.spec)
    for targets in (labels, shares(whole.model.spec)):
        one, many = whole.gradients(images, targets), parts.gradients(images, targets)
        assert many.loss == pytest.approx(one.loss, rel=1e-14)
        for name, gradient in one.gradients.items():
            assert np.abs(gradient - many.gradients[name]).max() <= 1e-14 * np.abs(gradient).max(), name
        assert lab.run(whole, targets=targets) == pytest.approx(lab.run(parts, targets=targets), rel=1e-14)
    lab.assert_close(parts.state(), whole.state(), 1e-14)


def test_batch_norm_sees_the_parts_in_order(lab: Any) -> None:
    made, plain = lab.trainer("resnet20", micro_batch_size=4), lab.trainer("resnet20")
    images, labels = lab.batch(made.model.spec)
    start = made.model.weights()
    gradients = made.gradients(images, labels)
    assert all(np.array_equal(array, start[name]) for name, array in made.model.weights().items())
    losses, total = [], dict.fromkeys(gradients.gradients, 0.0)
    for part, share in ((slice(0, 4), 4 / 6), (slice(4, 6), 2 / 6)):
        found = plain.gradients(images[part], labels[part])
        losses.append(share * found.loss)
        total = {name: total[name] + share * gradient for name, gradient in found.gradients.items()}
        plain.model.load_weights({**plain.model.weights(), **plain.model.forward(images[part], training=True).state})
    assert gradients.loss == pytest.approx(sum(losses), rel=1e-14)
    for name, gradient in gradients.gradients.items():
        np.testing.assert_allclose(gradient, total[name], rtol=1e-12, atol=1e-14)
    assert made.step(images, labels, 0.0) == pytest.approx(sum(losses), rel=1e-14)
    after = made.model.weights()
    assert after["bn1.num_batches_tracked"] == start["bn1.num_batches_tracked"] + 2
    for tensor in made.model.spec.tensors():
        if not tensor.trainable:
            np.testing.assert_array_equal(after[tensor.name], plain.model.weights()[tensor.name])


def test_how_a_batch_is_split_is_looked_up_at_every_call(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = lab.trainer("mlp", micro_batch_size=4), lab.trainer("mlp")
    images, labels = lab.batch(made.model.spec)
    halves = [plain.gradients(images[part], labels[part]).loss for part in (slice(0, 4), slice(4, 6))]
    right = formulas.micro_batches
    monkeypatch.setattr(formulas, "micro_batches", lambda recipe, samples: [(part, 0.5) for part, _ in right(recipe, samples)])
    assert made.gradients(images, labels).loss == pytest.approx(sum(halves) / 2, rel=1e-14)
    assert made.step(images, labels, 0.1) == pytest.approx(sum(halves) / 2, rel=1e-14)


def test_the_loss_of_shares_is_their_cross_entropy(lab: Any) -> None:
    made = lab.trainer("mlp")
    images, targets = lab.batch(made.model.spec)[0], shares(made.model.spec)
    logits = made.model.predict(images)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -((0.9 * targets + 0.1 / 10) * log_p).sum(1).mean()
    assert made.step(images, targets, 0.0) == pytest.approx(expected, rel=1e-14)
    for wrong in (targets[:3], targets[:, :4], targets * 2):
        with pytest.raises(UsageError, match="shares"):
            made.step(images, wrong, 0.1)


# --- Clipping and loss scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD(), AdamW(weight_decay=0.1)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("limits", [Clip(norm=0.1), Clip(norm=1e9), Clip(value=1e-3)])
def test_gradients_are_clipped_by_the_formula_before_weight_decay(lab: Any, limits: Clip, optimizer: Any) -> None:
    stepped, applied, plain = (lab.trainer("mlp", optimizer, clip=clip) for clip in (limits, limits, None))
    images, labels = lab.batch(plain.model.spec)
    found = plain.gradients(images, labels).gradients
    norm = np.sqrt(sum((gradient**2).sum() for gradient in found.values()))
    assert 0.1 < norm < 1e9
    if limits.norm is not None:
        clipped = {name: gradient * formulas.clip_coefficient(norm, limits.norm) for name, gradient in found.items()}
    else:
        clipped = {name: np.clip(gradient, -1e-3, 1e-3) for name, gradient in found.items()}
    for name, gradient in stepped.gradients(images, labels).gradients.items():
        np.testing.assert_array_equal(gradient, found[name])
    stepped.step(images, labels, 0.1)
    applied.apply(found, 0.1)
    plain.apply(clipped, 0.1)
    for made in (stepped, applied):
        for tensor in made.model.spec.parameters():
            np.testing.assert_allclose(made.state().weights[tensor.name], plain.state().weights[tensor.name], rtol=1e-13, atol=1e-15)


def test_loss_scaling_changes_nothing_but_the_scale(lab: Any) -> None:
    made, plain = (lab.trainer("resnet20", loss_scaling=scaling, clip=Clip(norm=0.5)) for scaling in (SCALED, None))
    assert lab.run(made, 3) == lab.run(plain, 3)
    state = made.state()
    assert (state.step, state.loss_scale, state.good_steps) == (3, 16.0, 1)
    state.loss_scale, state.good_steps = None, 0
    lab.assert_close(state, plain.state(), 0.0)  # powers of two


def test_an_overflow_skips_the_update_and_halves_the_scale(lab: Any) -> None:
    made = lab.trainer_in_float32("resnet20", loss_scaling=LossScaling(initial=2.0**127))
    images, labels = lab.batch(made.model.spec)
    weights = made.model.weights()
    made.model.load_weights({**weights, "fc.weight": 100.0 * weights["fc.weight"]})
    before = made.state()
    statistics = made.model.forward(images, training=True).state
    assert np.isfinite(made.step(images, labels, 0.1))
    after = made.state()
    assert (after.step, after.loss_scale, after.good_steps) == (0, 2.0**126, 0)
    for tensor in made.model.spec.tensors():
        expected = before.weights if tensor.trainable else statistics
        np.testing.assert_array_equal(after.weights[tensor.name], expected[tensor.name])
        np.testing.assert_array_equal(after.ema[tensor.name], before.ema[tensor.name])
    assert not any(slot.any() for slot in after.slots["momentum"].values())
    losses = [made.step(images, labels, 1e-4) for _ in range(24)]
    assert 3 <= made.state().step < 24
    assert np.isfinite(losses).all()


def test_applied_gradients_that_are_not_finite_are_an_overflow(lab: Any) -> None:
    made = lab.trainer("mlp", loss_scaling=SCALED)
    good = {tensor.name: np.ones(tensor.shape) for tensor in made.model.spec.parameters()}
    made.apply(good, 0.1)
    before = made.state()
    for bad in (np.nan, np.inf):
        made.apply({**good, "fc.bias": np.full(10, bad)}, 0.1)
    after = made.state()
    assert (before.step, before.loss_scale, before.good_steps) == (1, 8.0, 1)
    assert (after.step, after.loss_scale, after.good_steps) == (1, 2.0, 0)
    after.loss_scale, after.good_steps = 8.0, 1
    lab.assert_close(after, before, 0.0)
    made.load_state(before)
    lab.assert_close(made.state(), before, 0.0)
    fresh = lab.trainer("mlp", loss_scaling=SCALED)
    fresh.load_state(before)
    lab.assert_close(fresh.state(), before, 0.0)
    assert fresh.step(*lab.batch(made.model.spec), 0.1) == made.step(*lab.batch(made.model.spec), 0.1)
    assert (fresh.state().loss_scale, fresh.state().good_steps) == (16.0, 0)


def test_the_loss_scale_moves_as_in_core(lab: Any) -> None:
    scaling = LossScaling(64.0, 2.0, 0.5, 3)
    made = lab.trainer("mlp", loss_scaling=scaling)
    gradients = {tensor.name: np.zeros(tensor.shape) for tensor in made.model.spec.parameters()}
    scale, good = scaling.initial, 0
    for overflow in np.random.default_rng(0).random(60) < 0.3:
        scale, good = formulas.next_loss_scale(scaling, scale, good, overflow=bool(overflow))
        gradients["fc.bias"][0] = np.inf if overflow else 0.0
        made.apply(gradients, 0.1)
        assert (made.view().loss_scale, made.view().good_steps) == (scale, good)


@pytest.mark.parametrize("scale", [0.0, 2.0**-140])
def test_a_scale_that_was_backed_off_to_nothing_never_updates(lab: Any, scale: float) -> None:
    made = lab.trainer("mlp", loss_scaling=SCALED)
    state = made.state()
    state.loss_scale = scale
    made.load_state(state)
    made.step(*lab.batch(made.model.spec), 0.1)
    after = made.state()
    after.good_steps = 0
    lab.assert_close(after, state, 0.0)


@pytest.mark.parametrize("scaling", [LossScaling(initial=2.0**128), LossScaling(backoff=1.0), LossScaling(growth=1.0), LossScaling(0.0)])
def test_a_loss_scaling_that_pytorch_cannot_execute_is_refused(lab: Any, scaling: LossScaling) -> None:
    with pytest.raises(UsageError, match="initial must be"):
        lab.trainer("mlp", loss_scaling=scaling)


# --- Half precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["resnet50", "resnet20", "mlp"])
def test_half_precision_is_near_and_keeps_weights_and_state_in_full(lab: Any, name: str, kind: Any) -> None:
    half = lab.trainer_in_float32(name, mixed_precision=kind, loss_scaling=LossScaling() if kind == "float16" else None)
    full = lab.trainer_in_float32(name)
    images, labels = lab.batch(half.model.spec)
    logits = half.model.predict(images)
    found, expected = half.gradients(images, labels), full.gradients(images, labels)
    assert found.loss == pytest.approx(expected.loss, rel=0.05)
    assert found.loss != expected.loss
    last = np.abs(found.gradients["fc.weight"] - expected.gradients["fc.weight"]).max() / np.abs(expected.gradients["fc.weight"]).max()
    assert 1e-5 < last < (0.2 if kind == "bfloat16" else 0.05)
    np.testing.assert_array_equal(half.model.predict(images), logits)
    assert half.model.precision == "float32"
    lab.run(half)
    state = half.state()
    assert state.step == 2
    for part in (state.weights, state.ema, *state.slots.values()):
        assert {array.dtype.name for array in part.values()} <= {"float32", "int64"}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_products_are_in_half_precision_and_batch_norm_computes_in_full(lab: Any, kind: Any) -> None:
    made = lab.trainer_in_float32("resnet20", mixed_precision=kind, loss_scaling=LossScaling())
    seen: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def wrapper(module: Any, call: Any, x: Any) -> Any:
            before, y = copy.deepcopy(module), call(x)
            seen[name] = (before, module.weight.dtype, x.detach(), y.detach())
            return y

        return wrapper

    with made.model.intercept("conv1", watch("conv")), made.model.intercept("bn1", watch("norm")), made.model.intercept("fc", watch("fc")):
        lab.run(made, 1)
    for name in ("conv", "fc"):
        assert (seen[name][1], seen[name][3].dtype) == (torch.float32, train.HALF[kind])
    norm, _, x, y = seen["norm"]
    expected = norm(x.float())
    torch.testing.assert_close(y.float(), expected.to(y.dtype).float(), rtol=2 * torch.finfo(y.dtype).eps, atol=1e-6)
    torch.testing.assert_close(made.model.layer("bn1").running_var, norm.running_var, rtol=1e-6, atol=0)


def test_the_loss_is_computed_in_full_precision(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right, seen = train.cross_entropy, []

    def cross_entropy(logits: Any, targets: Any, label_smoothing: float) -> Any:
        seen.append((logits.dtype, torch.is_autocast_enabled("cpu")))
        return right(logits, targets, label_smoothing)

    monkeypatch.setattr(train, "cross_entropy", cross_entropy)
    lab.run(lab.trainer_in_float32("mlp", mixed_precision="bfloat16"), 1)
    assert seen == [(torch.float32, False)]


def test_what_cannot_be_executed_is_refused(lab: Any) -> None:
    for changes, message in (
        ({"mixed_precision": "float16"}, "loss_scaling"),
        ({"frozen": ("layer9",)}, "layer9"),
        ({"mixed_precision": "bfloat16"}, "autocast takes float32"),
    ):
        with pytest.raises(UsageError, match=message):
            lab.trainer("mlp", **changes)


# --- Frozen layers ------------------------------------------------------------------------------------------------------------


def test_frozen_layers_stay_as_they_are(lab: Any) -> None:
    options: dict[str, Any] = {"clip": Clip(norm=0.5), "micro_batch_size": 4}
    made = lab.trainer("resnet20", frozen=("conv1", "bn1", "layer1"), **options)
    whole = lab.trainer("resnet20", **options)
    images, labels = lab.batch(made.model.spec)
    frozen = {tensor.name for tensor in made.model.spec.tensors() if formulas.is_frozen(made.recipe, tensor.layer)}
    assert {"layer1.0.bn2.running_var", "bn1.num_batches_tracked"} < frozen
    assert "layer2.0.conv1.weight" not in frozen
    before, evaluated = made.model.weights(), made.model.forward(images).intermediates["layer1.0.relu2"]
    found = made.gradients(images, labels)
    assert list(found.gradients) == [tensor.name for tensor in made.model.spec.parameters()]
    assert {name for name, gradient in found.gradients.items() if not gradient.any()} == frozen & set(found.gradients)
    assert found.loss != whole.gradients(images, labels).loss, "running statistics normalize otherwise than those of the batch"
    lab.run(made)
    made.apply({tensor.name: np.ones(tensor.shape) for tensor in made.model.spec.parameters()}, 0.1)
    state = made.state()
    for name, array in before.items():
        assert np.array_equal(state.weights[name], array) == (name in frozen), name
    assert list(state.slots["momentum"]) == list(found.gradients)
    assert not any(state.slots["momentum"][name].any() for name in frozen & set(found.gradients))
    np.testing.assert_array_equal(made.model.forward(images).intermediates["layer1.0.relu2"], evaluated)
    assert made.model.forward(images, training=True).state["bn1.num_batches_tracked"] == 8, "the model itself is not frozen"


def test_whether_parameters_want_gradients_is_the_users_to_say(lab: Any) -> None:
    made = lab.trainer("mlp", frozen=("fc1",))
    made.model.native.fc.bias.requires_grad_(False)
    lab.run(made, 1)
    assert [name for name, p in made.model.native.named_parameters() if not p.requires_grad] == ["fc.bias"]
    assert not np.array_equal(made.model.weights()["fc.bias"], lab.weights(made.model.spec)["fc.bias"])
