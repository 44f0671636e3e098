"""The bare block in every room: the block of a ViT, a loss over positions, and what a recipe may ask of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract, initialize, philox
from triptych.core.contender import LANES
from triptych.core.contract import DEFAULT_EXECUTION, Execution
from triptych.core.difference import scaled_error
from triptych.core.errors import UsageError
from triptych.core.recipe import SGD, Recipe, Schedule
from triptych.core.spec import Spec, ViTSpec
from triptych.core.tolerance import FORWARD, GRADIENT, LOGITS_FLOAT32

SPEC = catalog.tiny(catalog.get_spec("transformer_block"))
WEIGHTS = initialize.parity_weights(SPEC, 0)
FEATURES = philox.normal("features", (5, *SPEC.output_shape))
LABELS = np.arange(5) * 3 % SPEC.num_classes
RECIPE = Recipe(SGD(), Schedule(0.1, 0, 10), 5, label_smoothing=0.1)

every_room = pytest.mark.parametrize("framework", contract.installed())


def model(framework: str, spec: Spec = SPEC, weights: Any = None) -> Any:
    return contract.load(framework).create_model(spec, WEIGHTS if weights is None else weights, precision="float64", device="cpu")


def trainer(framework: str, execution: Execution = DEFAULT_EXECUTION, **changes: Any) -> Any:
    return contract.load(framework).create_trainer(model(framework), dataclasses.replace(RECIPE, **changes), execution)


@every_room
def test_it_computes_what_the_block_of_a_vit_computes(framework: str) -> None:
    vit = dataclasses.replace(catalog.tiny(catalog.get_spec("vit_tiny_patch16_224")), depth=1)
    assert isinstance(vit, ViTSpec)
    weights = initialize.parity_weights(vit, 0)
    block = catalog.with_options(SPEC, tokens=vit.tokens, width=vit.width, heads=vit.heads, mlp_width=vit.mlp_width)
    own = {name.removeprefix("blocks.0."): value for name, value in weights.items() if name.startswith("blocks.0.")}
    seen = model(framework, vit, weights).forward(philox.normal("images", (2, *vit.input_shape))).intermediates
    output = model(framework, block, own).predict(seen["pos_drop"])
    centred = output - output.mean(-1, keepdims=True)
    normalized = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + vit.layer_norm_epsilon)
    assert scaled_error(normalized * weights["norm.weight"] + weights["norm.bias"], seen["norm"]) <= FORWARD


@every_room
def test_the_loss_is_the_mean_over_all_positions(framework: str) -> None:
    made = trainer(framework)
    logits = made.model.predict(FEATURES)
    shares = 0.9 * np.eye(SPEC.num_classes)[LABELS] + 0.1 / SPEC.num_classes
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(shares[:, None] * log_softmax).sum(-1).mean()
    assert made.gradients(FEATURES, LABELS).loss == pytest.approx(expected, rel=1e-13)
    every = np.repeat(LABELS[:, None], SPEC.output_shape[0], axis=1)
    assert made.gradients(FEATURES, every).loss == pytest.approx(expected, rel=1e-13)
    assert made.step(FEATURES, np.roll(every, 1, axis=1), 0.0) == pytest.approx(expected, rel=1e-13), "the same class everywhere"
    assert made.step(FEATURES, (every + np.arange(SPEC.output_shape[0])) % SPEC.num_classes, 0.0) != pytest.approx(expected, rel=1e-3)


@every_room
def test_micro_batches_recomputation_and_frozen_layers(framework: str) -> None:
    whole = trainer(framework).gradients(FEATURES, LABELS)
    for changes in ({"micro_batch_size": 2}, {"remat": True}):
        parts = trainer(framework, **changes).gradients(FEATURES, LABELS)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-13)
        assert all(scaled_error(parts.gradients[name], value) <= GRADIENT for name, value in whole.gradients.items())
    frozen = trainer(framework, frozen=("attn",)).gradients(FEATURES, LABELS).gradients
    assert all(np.any(value) != name.startswith("attn.") for name, value in frozen.items())


@every_room
def test_images_and_other_shapes_are_refused(framework: str) -> None:
    made = trainer(framework)
    for wrong in (np.zeros((5, 8, 8, 3)), FEATURES[0], FEATURES.astype(int)):
        for call in (made.model.predict, made.model.forward, lambda x: made.step(x, LABELS, 0.1)):
            with pytest.raises(UsageError, match=r"takes features \(N, tokens, width\) = \(N, 10, 16\)"):
                call(wrong)


@every_room
def test_predict_in_parts(framework: str) -> None:
    made = model(framework)
    whole = made.predict(FEATURES)
    assert whole.shape == FEATURES.shape
    assert scaled_error(made.predict({"features": FEATURES}, batch_size=2), whole) <= FORWARD
    assert made.predict(FEATURES[:0]).shape == (0, *SPEC.output_shape)


@every_room
@pytest.mark.parametrize("mode", ["inference", "training_step"])
def test_the_lanes_of_a_benchmark(framework: str, mode: str) -> None:
    narrow = {name: value.astype(np.float32) for name, value in WEIGHTS.items()}
    batch, room = (FEATURES.astype(np.float32), LABELS), contract.load(framework)
    lanes = [lane for lane in ("default", "compiled") if framework != "jax" or not LANES[lane].compile]
    found = []
    for lane in lanes:
        contender = room.contender(SPEC, narrow, lane, mode)
        found.append(contender.run(contender.stage(*batch)))
    expected = model(framework).predict(FEATURES) if mode == "inference" else trainer(framework, label_smoothing=0.0).gradients(*batch).loss
    assert all(scaled_error(np.atleast_1d(each), np.atleast_1d(expected)) <= LOGITS_FLOAT32 for each in found)
