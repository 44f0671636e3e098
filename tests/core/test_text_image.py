"""The two-input model as data: layer table, names, cost, options, first weights, and the import of foreign state dicts."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from triptych.core import batch, catalog, importers
from triptych.core.cost import cost
from triptych.core.errors import UsageError
from triptych.core.initialize import initial_weights, parity_weights
from triptych.core.recipe import SGD, Recipe, Schedule, decays
from triptych.core.spec import Input, Layer, TextImageSpec, from_dict, to_dict

SPEC = catalog.get_spec("text_image")
TINY = catalog.tiny(SPEC)


def test_the_layer_table() -> None:
    assert SPEC.inputs() == (Input("text", "tokens", (32,), 10_000), Input("image", "image", (224, 224, 3)))
    assert SPEC.layers() == (
        Layer("embedding", "lookup", 10_000, 128, 1, tokens=32),
        Layer("lstm", "lstm", 128, 64, 1, kernel=32),
        Layer("conv", "conv", 3, 32, 222, 3, bias=True),
        Layer("relu", "relu", 32, 32, 222),
        Layer("maxpool", "global_max_pool", 32, 32, 1, kernel=222),
        Layer("concat", "concatenate", 96, 96, 1),
        Layer("fc", "linear", 96, 1, 1, bias=True),
    )


def test_names_and_shapes_are_those_of_a_state_dict_of_pytorch() -> None:
    assert {tensor.name: tensor.shape for tensor in SPEC.tensors()} == {
        "embedding.weight": (10_000, 128), "lstm.weight_ih_l0": (256, 128), "lstm.weight_hh_l0": (256, 64), "lstm.bias_ih_l0": (256,),
        "lstm.bias_hh_l0": (256,), "conv.weight": (32, 3, 3, 3), "conv.bias": (32,), "fc.weight": (1, 96), "fc.bias": (1,),
    }  # fmt: skip
    assert {tensor.layer for tensor in SPEC.tensors()} == {"embedding", "lstm", "conv", "fc"}


def test_the_cost_by_hand() -> None:
    layers = {layer.name: layer for layer in cost(SPEC).layers}
    assert layers["lstm"].macs == 32 * 256 * (128 + 64)
    assert layers["conv"].macs == 222 * 222 * 32 * 27
    assert [layer.output for layer in layers.values()] == [(32, 128), (64,), (222, 222, 32), (222, 222, 32), (32,), (96,), (1,)]
    assert layers["embedding"].macs == 0
    assert cost(SPEC).parameters == catalog.CATALOG["text_image"].parameters == 1_280_000 + 256 * (128 + 64 + 2) + 32 * 28 + 97
    assert cost(catalog.get_spec("text_image", length=64)).macs - cost(SPEC).macs == 32 * 256 * (128 + 64)


def test_options_change_text_and_image() -> None:
    options: dict[str, Any] = {"vocabulary": 30, "length": 5, "width": 4, "features": 3, "filters": 2, "kernel": 5, "image_size": 9}
    spec = catalog.get_spec("text_image", **options)
    assert isinstance(spec, TextImageSpec)
    assert {name: getattr(spec, name) for name in options} == options
    assert (spec.preprocessing.crop, spec.layer("conv").size, spec.proof_image_size) == (9, 5, 9)
    assert from_dict(to_dict(spec)) == spec
    assert SPEC.proof_image_size == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 0}, "vocabulary=0 must be a positive integer"),
        ({"kernel": 9, "image_size": 8}, "image_size=8 is smaller than the convolution's kernel=9"),
        ({"hidden": 3}, "it takes vocabulary, length, width, features, filters, kernel, num_classes, in_channels, image_size"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        catalog.get_spec("text_image", **options)


def test_images_alone_cannot_feed_it() -> None:
    with pytest.raises(UsageError, match=r"text: integer ids .* in \[0, 10000\); image"):
        catalog.fed_by_images(SPEC)


def test_one_logit_tells_two_classes_apart() -> None:
    assert [batch.num_labels(spec) for spec in (SPEC, catalog.get_spec("text_image", num_classes=3))] == [2, 3]
    assert batch.checked_targets(SPEC, np.array([0, 1, 1]), 3).tolist() == [0, 1, 1]
    assert batch.checked_targets(SPEC, np.array([[0.25, 0.75]]), 1).tolist() == [[0.25, 0.75]]
    for targets in (np.array([0, 2, 1]), np.array([0.0, 1.0, 1.0]), np.array([[0.2], [0.8], [1.0]])):
        with pytest.raises(UsageError, match=r"expected \(3,\) integers in \[0, 2\) or \(3, 2\) shares"):
            batch.checked_targets(SPEC, targets, 3)


def test_first_weights_are_those_of_pytorch_s_layers() -> None:
    weights = initial_weights(SPEC, 0, "float64")
    assert abs(weights["embedding.weight"].std() - 1.0) < 0.01
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        drawn = weights[f"lstm.{name}_l0"]
        assert 0.9 * 64**-0.5 < np.abs(drawn).max() <= 64**-0.5, name
    assert not np.array_equal(weights["lstm.bias_ih_l0"], weights["lstm.bias_hh_l0"])
    assert np.abs(weights["conv.bias"]).max() <= 27**-0.5


def test_a_proof_has_biases_of_their_own_size() -> None:
    weights = parity_weights(SPEC, 0)
    for name in ("lstm.bias_ih_l0", "lstm.bias_hh_l0", "conv.bias", "fc.bias"):
        assert np.abs(weights[name]).max() > 0.1 or weights[name].size == 1, name


def test_weights_that_are_multiplied_or_looked_up_decay() -> None:
    recipe = Recipe(SGD(), Schedule(0.1, 0, 1), 4)
    decaying = [tensor.name for tensor in SPEC.tensors() if decays(recipe, tensor)]
    assert decaying == ["embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "conv.weight", "fc.weight"]


@pytest.mark.parametrize("head", ["fc", "classifier", "linear"])
def test_a_foreign_state_dict_tells_all_sizes_but_the_length(head: str) -> None:
    spec = catalog.get_spec(
        "text_image", vocabulary=30, width=4, features=3, filters=2, kernel=5, num_classes=2, in_channels=1, length=9, image_size=16
    )
    expected = initial_weights(spec, 1)
    state = {"state_dict": {re.sub(r"^fc\.", f"{head}.", f"module.{name}"[7:]): value for name, value in expected.items()}}
    found = importers.to_canonical(state, "text_image", length=9, image_size=16)
    assert found.spec == spec
    assert all(np.array_equal(found.weights[name], value) for name, value in expected.items())
    assert "length=9 is not visible in the tensors" in found.report.notes
