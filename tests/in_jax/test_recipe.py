"""What a recipe may ask of a step: accumulation, shares, clipping, loss scaling, half precision, frozen layers, remat, tuned layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from triptych.core import recipe as formulas
from triptych.core.contract import Execution, TrainingState
from triptych.core.errors import UsageError
from triptych.core.recipe import SGD, AdamW, Clip, LossScaling

SCALED = LossScaling(initial=8.0, interval=2)
RATES = (0.05, 0.1, 0.02)


def made(lab: Any, name: str, precision: str = "float64", execution: Execution | None = None, **changes: Any) -> Any:
    """A trainer of a new, very small model."""
    model = lab.model(name, precision, **({"dropout": changes.pop("dropout")} if "dropout" in changes else {}))
    return lab.room.create_trainer(model, lab.recipe(**changes), execution or Execution())


def batch(lab: Any, trainer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Six images and their classes."""
    return lab.batch(trainer.model.spec)


def shares(trainer: Any, labels: np.ndarray) -> np.ndarray:
    """(N, classes): each image mixed of two classes."""
    one_hot = np.eye(trainer.model.spec.num_classes)[labels]
    return 0.7 * one_hot + 0.3 * one_hot[::-1]


def run(lab: Any, trainer: Any, steps: int = 2) -> list[float]:
    """Losses of a few steps over six images."""
    return [trainer.step(*batch(lab, trainer), rate) for rate in RATES[:steps]]


def assert_close(left: TrainingState, right: TrainingState, tolerance: float) -> None:
    """Equal counts, and tensors within `tolerance` of the largest value of each."""
    assert (left.step, left.loss_scale, left.good_steps) == (right.step, right.loss_scale, right.good_steps)
    pairs = [(left.weights, right.weights), (left.ema, right.ema), *((left.slots[slot], right.slots[slot]) for slot in left.slots)]
    for x, y in pairs:
        assert list(x) == list(y)
        for name in x:
            assert np.abs(x[name] - y[name]).max() <= tolerance * max(np.abs(y[name]).max(), 1e-300), name


def assert_close_gradients(left: Any, right: Any, tolerance: float) -> None:
    """Losses and gradients within `tolerance` of the largest value of each."""
    assert left.loss == pytest.approx(right.loss, rel=tolerance)
    assert list(left.gradients) == list(right.gradients)
    for name, gradient in right.gradients.items():
        assert np.abs(left.gradients[name] - gradient).max() <= tolerance * max(np.abs(gradient).max(), 1e-6), name


@pytest.mark.parametrize("micro", [1, 2, 4, 6])
def test_micro_batches_add_up_to_the_whole(lab: Any, micro: int) -> None:
    whole, parts = made(lab, "mlp"), made(lab, "mlp", micro_batch_size=micro)
    images, labels = batch(lab, whole)
    for targets in (labels, shares(whole, labels)):
        assert_close_gradients(parts.gradients(images, targets), whole.gradients(images, targets), 1e-14)
    assert run(lab, parts) == pytest.approx(run(lab, whole), rel=1e-14)
    assert_close(parts.state(), whole.state(), 1e-14)


def test_batch_norm_sees_the_parts_in_order(lab: Any) -> None:
    trainer, plain = made(lab, "resnet20", micro_batch_size=4), made(lab, "resnet20")
    images, labels = batch(lab, trainer)
    start = trainer.model.weights()
    gradients = trainer.gradients(images, labels)
    assert all(np.array_equal(array, trainer.model.weights()[name]) for name, array in start.items())
    loss, total = 0.0, dict.fromkeys(gradients.gradients, 0.0)
    for part, share in ((slice(0, 4), 4 / 6), (slice(4, 6), 2 / 6)):
        found = plain.gradients(images[part], labels[part])
        loss += share * found.loss
        total = {name: total[name] + share * gradient for name, gradient in found.gradients.items()}
        plain.model.load_weights({**plain.model.weights(), **plain.model.forward(images[part], training=True).state})
    assert_close_gradients(gradients, dataclasses.replace(gradients, loss=loss, gradients=total), 1e-12)
    assert trainer.step(images, labels, 0.0) == pytest.approx(loss, rel=1e-13)
    after = trainer.model.weights()
    assert after["bn1.num_batches_tracked"] == start["bn1.num_batches_tracked"] + 2
    for tensor in trainer.model.spec.tensors():
        if not tensor.trainable:
            np.testing.assert_allclose(after[tensor.name], plain.model.weights()[tensor.name], rtol=1e-12, atol=1e-14)


def test_a_planted_share_is_looked_up_at_every_call(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, plain = made(lab, "mlp", micro_batch_size=4), made(lab, "mlp")
    images, labels = batch(lab, trainer)
    right, clean = formulas.micro_batches, trainer.gradients(images, labels).loss
    parts = [plain.gradients(images[part], labels[part]).loss for part in (slice(0, 4), slice(4, 6))]
    for share in (0.5, 1.0):
        monkeypatch.setattr(formulas, "micro_batches", lambda recipe, samples, s=share: [(part, s) for part, _ in right(recipe, samples)])
        planted = trainer.gradients(images, labels).loss
        assert planted == pytest.approx(share * sum(parts), rel=1e-13)
        assert planted != pytest.approx(clean, rel=1e-6)


def test_the_loss_of_shares_is_the_mean_over_classes(lab: Any) -> None:
    trainer = made(lab, "mlp")
    images, labels = batch(lab, trainer)
    targets, logits = shares(trainer, labels), trainer.model.predict(images)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -((0.9 * targets + 0.1 / 10) * log_probabilities).sum(-1).mean()
    assert trainer.step(images, targets, 0.0) == pytest.approx(expected, rel=1e-13)
    for wrong in (targets[:3], targets[:, :4], targets * 2, labels.astype(np.float64)):
        with pytest.raises(UsageError, match="shares"):
            trainer.step(images, wrong, 0.1)


@pytest.mark.parametrize("clip", [Clip(norm=0.1), Clip(norm=1e9), Clip(value=1e-3)])
def test_gradients_are_clipped_by_torchs_formula(lab: Any, clip: Clip) -> None:
    trainer, applied, plain = made(lab, "mlp", clip=clip), made(lab, "mlp", clip=clip), made(lab, "mlp")
    images, labels = batch(lab, trainer)
    found = trainer.gradients(images, labels).gradients
    norm = np.sqrt(sum((gradient**2).sum() for gradient in found.values()))
    assert 0.1 < norm < 1e9
    if clip.norm is not None:
        clipped = {name: gradient * min(1.0, clip.norm / (norm + 1e-6)) for name, gradient in found.items()}
    else:
        clipped = {name: np.clip(gradient, -1e-3, 1e-3) for name, gradient in found.items()}
    trainer.step(images, labels, 0.1)
    applied.apply(found, 0.1)
    plain.apply(clipped, 0.1)
    assert_close(trainer.state(), plain.state(), 1e-14)
    assert_close(applied.state(), plain.state(), 1e-14)


def test_loss_scaling_changes_nothing_but_the_scale(lab: Any) -> None:
    scaled, plain = (made(lab, "resnet20", loss_scaling=scaling, clip=Clip(norm=0.5), micro_batch_size=4) for scaling in (SCALED, None))
    assert run(lab, scaled, 3) == pytest.approx(run(lab, plain, 3), rel=1e-12)
    state = scaled.state()
    assert (state.step, state.loss_scale, state.good_steps) == (3, 16.0, 1)
    assert_close(dataclasses.replace(state, loss_scale=None, good_steps=0), plain.state(), 1e-9)


@pytest.mark.parametrize("optimizer", [SGD(), AdamW()])
def test_an_overflow_skips_the_update_and_halves_the_scale(lab: Any, optimizer: SGD | AdamW) -> None:
    trainer = made(lab, "resnet20", optimizer=optimizer, loss_scaling=LossScaling(initial=2.0**1023))
    weights = trainer.model.weights()
    trainer.model.load_weights({**weights, "fc.weight": 100.0 * weights["fc.weight"]})
    before, (images, labels) = trainer.state(), batch(lab, trainer)
    statistics = trainer.model.forward(images, training=True).state
    assert np.isfinite(trainer.step(images, labels, 0.1))
    after = trainer.state()
    assert (after.step, after.loss_scale, after.good_steps) == (0, 2.0**1022, 0)
    for tensor in trainer.model.spec.tensors():
        if tensor.trainable:
            np.testing.assert_array_equal(after.weights[tensor.name], before.weights[tensor.name])
            for slot in optimizer.slots:
                np.testing.assert_array_equal(after.slots[slot][tensor.name], before.slots[slot][tensor.name])
        else:
            np.testing.assert_allclose(after.weights[tensor.name], statistics[tensor.name], rtol=1e-12)
        np.testing.assert_array_equal(after.ema[tensor.name], before.ema[tensor.name])


def test_applied_gradients_that_are_not_finite_are_an_overflow(lab: Any) -> None:
    trainer = made(lab, "mlp", loss_scaling=SCALED, clip=Clip(value=1.0))
    good = {tensor.name: np.ones(tensor.shape) for tensor in trainer.model.spec.parameters()}
    trainer.apply(good, 0.1)
    before = trainer.state()
    for bad in (np.nan, np.inf):
        trainer.apply({**good, "fc.bias": np.full(10, bad)}, 0.1)
    after = trainer.state()
    assert (before.step, before.loss_scale, before.good_steps) == (1, 8.0, 1)
    assert (after.step, after.loss_scale, after.good_steps) == (1, 2.0, 0)
    assert_close(dataclasses.replace(after, loss_scale=8.0, good_steps=1), before, 0.0)
    trainer.load_state(before)
    assert_close(trainer.state(), before, 0.0)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["resnet50", "resnet20", "mlp"])
def test_half_precision_is_near_and_keeps_everything_else_in_full(lab: Any, name: str, kind: str) -> None:
    half = made(lab, name, "float32", mixed_precision=kind, loss_scaling=LossScaling() if kind == "float16" else None)
    full = made(lab, name, "float32")
    images, labels = batch(lab, half)
    logits = half.model.predict(images)
    found, expected = half.gradients(images, labels), full.gradients(images, labels)
    assert found.loss == pytest.approx(expected.loss, rel=0.05)
    assert found.loss != expected.loss
    last = np.abs(found.gradients["fc.weight"] - expected.gradients["fc.weight"]).max() / np.abs(expected.gradients["fc.weight"]).max()
    assert 1e-5 < last < (0.2 if kind == "bfloat16" else 0.05)
    np.testing.assert_array_equal(half.model.predict(images), logits, "the model itself computes in full")
    run(lab, half)
    state = half.state()
    assert state.step == 2
    for part in (found.gradients, state.weights, state.ema, *state.slots.values()):
        assert {array.dtype.name for array in part.values()} <= {"float32", "int64"}


def test_products_are_in_half_and_batch_norm_and_loss_in_full_precision(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triptych.in_jax import layers, train

    trainer = made(lab, "resnet20", "float32", mixed_precision="bfloat16")
    seen: dict[str, set[str]] = {"conv1": set(), "fc": set(), "norm": set(), "loss": set()}
    statistics, loss = layers.batch_statistics, train.cross_entropy

    def watched(layer: str) -> Any:
        def wrapper(module: Any, call: Any, x: Any) -> Any:
            y = call(x)
            seen[layer].add(y.dtype.name)
            return y

        return trainer.model.intercept(layer, wrapper)

    def seen_by_norm(x: Any) -> Any:
        seen["norm"].add(x.dtype.name)
        return statistics(x)

    def seen_by_loss(logits: Any, *given: Any) -> Any:
        seen["loss"].add(logits.dtype.name)
        return loss(logits, *given)

    monkeypatch.setattr(layers, "batch_statistics", seen_by_norm)
    monkeypatch.setattr(train, "cross_entropy", seen_by_loss)
    with watched("conv1"), watched("fc"):
        run(lab, trainer, 1)
    assert seen == {"conv1": {"bfloat16"}, "fc": {"bfloat16"}, "norm": {"float32"}, "loss": {"float32"}}


@pytest.mark.parametrize("optimizer", [SGD(), AdamW(weight_decay=0.1)])
def test_frozen_layers_stay_as_they_are(lab: Any, optimizer: SGD | AdamW) -> None:
    changes = {"optimizer": optimizer, "clip": Clip(norm=0.5), "micro_batch_size": 4, "ema_decay": None}
    trainer, whole = made(lab, "resnet20", frozen=("conv1", "bn1", "layer1"), **changes), made(lab, "resnet20", **changes)
    images, labels = batch(lab, trainer)
    spec, recipe = trainer.model.spec, trainer.recipe
    frozen = {tensor.name for tensor in spec.tensors() if formulas.is_frozen(recipe, tensor.layer)}
    assert "layer1.0.bn2.running_var" in frozen
    assert "layer2.0.conv1.weight" not in frozen
    before, found = trainer.model.weights(), trainer.gradients(images, labels)
    assert list(found.gradients) == [tensor.name for tensor in spec.parameters()]
    assert {name for name, gradient in found.gradients.items() if not gradient.any()} == frozen & set(found.gradients)
    assert found.loss != whole.gradients(images, labels).loss, "by running statistics, not by the batch's"
    evaluated = trainer.model.forward(images).intermediates["layer1.0.relu2"]
    run(lab, trainer)
    trainer.apply({tensor.name: np.ones(tensor.shape) for tensor in spec.parameters()}, 0.1)
    state = trainer.state()
    for name, array in before.items():
        assert np.array_equal(state.weights[name], array) == (name in frozen), name
    for slot in state.slots.values():
        assert list(slot) == [tensor.name for tensor in spec.parameters()]
        assert {name for name, value in slot.items() if not value.any()} == frozen & set(slot)
    np.testing.assert_array_equal(trainer.model.forward(images).intermediates["layer1.0.relu2"], evaluated)
    moved = trainer.model.forward(images, training=True).state["bn1.num_batches_tracked"]
    assert moved == before["bn1.num_batches_tracked"] + 1, "the model itself is not frozen"


def test_frozen_gradients_do_not_count_for_the_norm(lab: Any) -> None:
    trainer = made(lab, "mlp", frozen=("fc1",), clip=Clip(norm=0.1), optimizer=SGD(0.0, False, 0.0), ema_decay=None)
    before = trainer.model.weights()["fc.bias"]
    gradients = {tensor.name: np.zeros(tensor.shape) for tensor in trainer.model.spec.parameters()}
    gradients |= {"fc1.weight": np.full_like(gradients["fc1.weight"], np.inf), "fc.bias": np.full(10, 1.0)}
    trainer.apply(gradients, 1.0)
    np.testing.assert_allclose(before - trainer.model.weights()["fc.bias"], 0.1 / (np.sqrt(10) + 1e-6), rtol=1e-12)


@pytest.mark.parametrize("name", ["resnet50", "resnet20", "mlp"])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 4}, {"mixed_precision": "bfloat16"}, {"frozen": ("layer1", "fc1")}], ids=str)
def test_remat_changes_memory_alone(lab: Any, name: str, changes: dict[str, Any]) -> None:
    frozen = tuple(layer for layer in changes.get("frozen", ()) if layer.startswith("fc") == (name == "mlp"))
    options = {**changes, "frozen": frozen, **({"dropout": 0.5} if name == "mlp" else {})}
    trainer, plain = (made(lab, name, remat=remat, **options) for remat in (True, False))
    tolerance = 1e-2 if "mixed_precision" in changes else 1e-12
    images, labels = batch(lab, trainer)
    assert_close_gradients(trainer.gradients(images, labels), plain.gradients(images, labels), tolerance)
    assert run(lab, trainer, 1) == pytest.approx(run(lab, plain, 1), rel=tolerance)
    assert_close(trainer.state(), plain.state(), tolerance)


@pytest.mark.parametrize("name", ["resnet50", "mlp"])
def test_remat_computes_activations_twice(lab: Any, name: str) -> None:
    import jax

    from triptych.in_jax.model import numerics

    def products(trainer: Any) -> int:
        with numerics("float64"):
            images, labels = batch(lab, trainer)
            jaxpr = str(trainer._gradients.trace(trainer.model.variables, (jax.numpy.asarray(images),), jax.numpy.asarray(labels)).jaxpr)
        return jaxpr.count("conv_general_dilated[") + jaxpr.count("dot_general[")

    trainer, plain = (made(lab, name, remat=remat) for remat in (True, False))
    layers = [layer for layer in trainer.model.spec.layers() if layer.op in ("conv", "linear")]
    inside = [layer for layer in layers if name == "mlp" or layer.name.startswith("layer")]
    # The last product of all, the logits of an mlp, is not needed by its own backward pass; BatchNorm behind a convolution needs it.
    assert products(trainer) == products(plain) + len(inside) - (name == "mlp")


def test_remat_keeps_every_name(lab: Any) -> None:
    trainer, spec = made(lab, "resnet50", remat=True), lab.spec("resnet50")
    seen: list[str] = []

    def note(module: Any, call: Any, x: Any) -> Any:
        seen.append(".".join(module.path))
        return call(x)

    names = [layer.name for layer in spec.layers()] + [block.name for block in spec.blocks()]
    images, labels = batch(lab, trainer)
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            trainer.model.interceptions = (*trainer.model.interceptions, interception(name, note))
        trainer.gradients(images, labels)
        patch.undo()
    assert set(seen) == set(names)


def interception(layer: str, wrapper: Any) -> Any:
    """As `Model.intercept` makes it."""
    from triptych.in_jax.model import Interception

    return Interception(layer, wrapper)


def test_a_recipe_that_cannot_be_executed_is_refused(lab: Any) -> None:
    for changes, message in ({"mixed_precision": "float16"}, "loss_scaling"), ({"frozen": ("layer9",)}, "layer9"):
        with pytest.raises(UsageError, match=message):
            made(lab, "mlp", **changes)
    trainer = made(lab, "mlp")
    images, labels = batch(lab, trainer)
    with pytest.raises(UsageError, match="learning_rate=nan"):
        trainer.step(images, labels, float("nan"))
