"""Scoped names to layers, and operators that run at the same time."""

from __future__ import annotations

import pytest

from triptych.core import catalog, trace
from triptych.core.trace import CATEGORIES, Event


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("gradient_tape/resnet50_1/layer4.0.downsample.0_1/convolution/Conv2DBackpropInput", "layer4.0.downsample.0"),
        ("jit(loss_and_gradients)/transpose(jvp(ResNet))/layer1/0/bn1/reduce_sum", "layer1.0.bn1"),
        ("jit(_predict)/ResNet/bn1/mul", "bn1"),
        ("resnet50/fc/MatMul", "fc"),
        ("jit(loss_and_gradients)/jvp(ResNet)/layer1/0/add", ""),
        ("optimizer/mul", ""),
        ("", ""),
    ],
)
def test_the_layer_of_a_scoped_name(path: str, layer: str) -> None:
    assert trace.layer_of(path, trace.layers(catalog.get_spec("resnet50"))) == layer


@pytest.mark.parametrize("model", ["mlp", "resnet20", "resnet50", "vit_tiny_patch16_224", "transformer_block"])
def test_every_layer_does_a_kind_of_work(model: str) -> None:
    kinds = trace.layers(catalog.get_spec(model))
    assert set(kinds.values()) <= set(CATEGORIES)
    assert "matrix_product" in kinds.values()
    assert ("convolution" in kinds.values()) == (model not in ("mlp", "transformer_block"))


def test_operators_at_the_same_time_get_tracks_of_their_own() -> None:
    spans = [(0.0, 4.0), (1.0, 2.0), (2.0, 3.0), (4.0, 5.0), (2.5, 6.0)]
    placed = trace.disjoint([Event(f"{start}", start, stop, "thread") for start, stop in spans], "XLA")
    assert {event.operation: event.track for event in placed} == {
        "0.0": "XLA 1",
        "1.0": "XLA 2",
        "2.0": "XLA 2",
        "4.0": "XLA 1",
        "2.5": "XLA 3",
    }
