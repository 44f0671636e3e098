"""A network with its BatchNorm folded into the convolutions is the same function in every room, and no lane of inference strays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract, initialize, spec
from triptych.core.contender import LANES
from triptych.core.difference import scaled_error
from triptych.core.folding import fold
from triptych.core.tolerance import FORWARD, LOGITS_FLOAT32

MODELS = {name: catalog.tiny(catalog.get_spec(name)) for name in ("resnet50", "resnet18", "resnet20")}
COMPILED = ("compiled", "tuned_compiled")  # inductor and XLA take too long for a test


def images(of: spec.Spec, count: int = 3) -> np.ndarray:
    """Preprocessed images."""
    return np.random.default_rng(1).standard_normal((count, *of.input_shape))


@pytest.mark.parametrize("framework", contract.installed())
@pytest.mark.parametrize("name", MODELS)
def test_a_folded_network_is_the_same_function(framework: str, name: str) -> None:
    whole, weights = MODELS[name], initialize.parity_weights(MODELS[name], 0, "float64")
    room, x = contract.load(framework), images(whole)
    before, after = (room.create_model(*given, precision="float64", device="cpu") for given in ((whole, weights), fold(whole, weights)))
    kept = [layer for layer in after.spec.intermediates() if layer.rpartition(".")[2].startswith("relu")]
    seen, expected = after.forward(x).intermediates, before.forward(x).intermediates
    assert kept
    assert not [layer for layer in seen if ".bn" in layer or layer == "bn1"]
    for layer in (*kept, "fc"):
        assert scaled_error(seen[layer], expected[layer]) <= FORWARD, layer
    assert {tensor: array.shape for tensor, array in after.weights().items()} == {t.name: t.shape for t in after.spec.tensors()}


@pytest.mark.parametrize("framework", contract.installed())
@pytest.mark.parametrize("lane", [name for name in LANES if name not in COMPILED])
@pytest.mark.parametrize("name", ["resnet50", "resnet20"])
def test_a_lane_of_inference_gives_the_models_logits(framework: str, lane: str, name: str) -> None:
    whole, weights = MODELS[name], initialize.parity_weights(MODELS[name], 0, "float32")
    room, x = contract.load(framework), images(whole).astype(np.float32)
    expected = room.create_model(whole, weights, precision="float64", device="cpu").predict(x.astype(np.float64))
    contender = room.contender(whole, weights, lane, "inference")
    for size in (len(x), 1):
        labels = np.zeros(size, np.int64)
        assert scaled_error(contender.run(contender.stage(x[:size], labels)), expected[:size]) <= LOGITS_FLOAT32
    assert ("folded BatchNorm" in contender.levers) == LANES[lane].tuned


def test_what_has_no_batch_norm_stays_as_it_is() -> None:
    perceptron = catalog.tiny(catalog.get_spec("mlp"))
    weights = initialize.parity_weights(perceptron, 0, "float32")
    same, kept = fold(perceptron, weights)
    assert same == perceptron
    assert kept == weights
    without, folded = fold(MODELS["resnet20"], initialize.parity_weights(MODELS["resnet20"], 0, "float32"))
    assert fold(without, folded)[0] == without
    assert spec.from_dict(spec.to_dict(without)) == without


def test_a_wrong_epsilon_would_be_seen() -> None:
    whole = MODELS["resnet20"]
    weights = initialize.parity_weights(whole, 0, "float64")
    assert isinstance(whole, spec.ResNetSpec)
    assert whole.batch_norm is not None
    other = dataclasses.replace(whole, batch_norm=dataclasses.replace(whole.batch_norm, epsilon=1e-3))
    framework = contract.installed()[0]
    logits = [_logits(framework, *fold(each, weights)) for each in (whole, other)]
    assert scaled_error(*logits) > 1e3 * FORWARD


def _logits(framework: str, of: spec.Spec, weights: Any) -> np.ndarray:
    model = contract.load(framework).create_model(of, weights, precision="float64", device="cpu")
    return np.asarray(model.predict(images(of)))
