"""Specs: frozen, complete, and read back from JSON as they were written; layer tables against hand-written ones."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from triptych.core import catalog
from triptych.core.spec import (
    BatchNormSpec,
    BlockSpec,
    Input,
    Layer,
    MLPSpec,
    PoolSpec,
    Preprocessing,
    ResNetSpec,
    StageSpec,
    StemSpec,
    TransformerBlockSpec,
    ViTSpec,
    from_dict,
    to_dict,
)

each_model = pytest.mark.parametrize("name", catalog.CATALOG)
SPECS = (
    MLPSpec,
    ResNetSpec,
    ViTSpec,
    TransformerBlockSpec,
    StemSpec,
    StageSpec,
    PoolSpec,
    BatchNormSpec,
    Preprocessing,
    Layer,
    BlockSpec,
)


@each_model
def test_a_spec_survives_json(name: str) -> None:
    spec = catalog.get_spec(name)
    assert from_dict(json.loads(json.dumps(to_dict(spec)))) == spec


@pytest.mark.parametrize("options", [{"hidden": (3, 5), "dropout": 0.5}, {"num_classes": 7, "in_channels": 3, "image_size": 9}])
def test_a_spec_with_options_survives_json(options: dict[str, Any]) -> None:
    spec = catalog.get_spec("mlp", **options)
    assert from_dict(json.loads(json.dumps(to_dict(spec)))) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "vgg"}, "unknown model family 'vgg'; known: resnet, mlp, vit"),
        ({"family": None}, "unknown model family None"),
        ({"depth": 3}, "malformed mlp spec: .*'depth'"),
        ({"preprocessing": {"crop": 8}}, "malformed mlp spec"),
    ],
)
def test_a_malformed_description_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict({**to_dict(catalog.get_spec("mlp")), **change})


def test_a_missing_field_is_refused() -> None:
    data = to_dict(catalog.get_spec("resnet20"))
    del data["batch_norm"]
    with pytest.raises(ValueError, match="batch_norm"):
        from_dict(data)


@each_model
def test_a_spec_is_frozen_and_hashable(name: str) -> None:
    spec = catalog.get_spec(name)
    for field in ("name", dataclasses.fields(spec)[-1].name):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(spec, field, None)
    assert hash(spec) == hash(catalog.get_spec(name))


@pytest.mark.parametrize("kind", SPECS)
def test_constants_have_no_defaults(kind: type) -> None:
    """Rule 5: no constant of a model is left to a default; the layer table's geometry alone has neutral ones."""
    defaults = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    assert defaults == ({"kernel", "stride", "padding", "bias", "tokens"} if kind is Layer else set())


@each_model
def test_names_are_unique_and_every_tensor_has_its_layer(name: str) -> None:
    spec = catalog.get_spec(name)
    layers, tensors = [layer.name for layer in spec.layers()], [tensor.name for tensor in spec.tensors()]
    assert len(set(layers)) == len(layers)
    assert len(set(tensors)) == len(tensors)
    assert all(tensor.layer == layer.name for layer in spec.layers() for tensor in layer.tensors())


@each_model
def test_the_last_intermediate_is_the_logits(name: str) -> None:
    spec = catalog.get_spec(name)
    head = spec.layer(spec.intermediates()[-1])
    assert spec.output_shape == ((head.tokens, head.out_channels) if head.tokens else (head.out_channels,))
    if spec.head is not None:
        head = catalog.get_spec(name, num_classes=13).layer(spec.head)
        assert (head.op, head.out_channels, head.size) == ("linear", 13, 1)


@each_model
def test_channels_fit_from_layer_to_layer(name: str) -> None:
    """Every layer takes what the layer before it gives; a shortcut takes what its block was given."""
    spec = catalog.get_spec(name)
    assert spec.layers()[0].in_channels == spec.inputs()[0].shape[-1]
    before, block_input = spec.layers()[0], None
    for layer in spec.layers()[1:]:
        if layer.name.endswith(".conv1"):
            block_input = before.out_channels
        shortcut = layer.name.endswith(("downsample.0", "downsample"))
        assert layer.in_channels == (block_input if shortcut else before.out_channels), layer.name
        before = layer


def test_the_first_block_of_vit_tiny_and_what_surrounds_the_blocks() -> None:
    spec = catalog.get_spec("vit_tiny_patch16_224")
    assert spec.layers()[:10] == (
        Layer("patch_embed.proj", "conv", 3, 192, 14, kernel=16, stride=16, bias=True),
        Layer("pos_drop", "embedding", 192, 192, 1, tokens=197),
        Layer("blocks.0.norm1", "layer_norm", 192, 192, 1, tokens=197),
        Layer("blocks.0.attn.qkv", "linear", 192, 576, 1, bias=True, tokens=197),
        Layer("blocks.0.attn.sdpa", "attention", 576, 192, 1, tokens=197),
        Layer("blocks.0.attn.proj", "linear", 192, 192, 1, bias=True, tokens=197),
        Layer("blocks.0.norm2", "layer_norm", 192, 192, 1, tokens=197),
        Layer("blocks.0.mlp.fc1", "linear", 192, 768, 1, bias=True, tokens=197),
        Layer("blocks.0.mlp.act", "gelu", 768, 768, 1, tokens=197),
        Layer("blocks.0.mlp.fc2", "linear", 768, 192, 1, bias=True, tokens=197),
    )
    assert len(spec.layers()) == 2 + 12 * 8 + 2
    assert spec.layers()[-2:] == (
        Layer("norm", "layer_norm", 192, 192, 1, tokens=197),
        Layer("head", "linear", 192, 1000, 1, bias=True),
    )
    assert spec.layer_norm_epsilon == 1e-6


def test_a_vit_s_own_tensors_come_first_in_its_state_and_belong_to_the_embedding() -> None:
    tensors = catalog.get_spec("vit_tiny_patch16_224", image_size=32).tensors()
    assert [(tensor.name, tensor.shape) for tensor in tensors[:4]] == [
        ("cls_token", (1, 1, 192)),
        ("pos_embed", (1, 5, 192)),
        ("patch_embed.proj.weight", (192, 3, 16, 16)),
        ("patch_embed.proj.bias", (192,)),
    ]
    assert [tensor.layer for tensor in tensors[:3]] == ["pos_drop", "pos_drop", "patch_embed.proj"]


def test_a_layer_that_is_not_there_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="conv9"):
        catalog.get_spec("resnet20").layer("conv9")


def test_the_mlp_layer_table() -> None:
    spec = catalog.get_spec("mlp", hidden=(5,), dropout=0.25)
    assert spec.layers() == (
        Layer("flatten", "flatten", 1, 784, 1),
        Layer("fc1", "linear", 784, 5, 1, bias=True),
        Layer("relu1", "relu", 5, 5, 1),
        Layer("dropout1", "dropout", 5, 5, 1),
        Layer("fc", "linear", 5, 10, 1, bias=True),
    )
    assert spec.intermediates() == ("flatten", "fc1", "relu1", "fc")
    assert [(tensor.name, tensor.shape, tensor.kind) for tensor in spec.tensors()][:2] == [
        ("fc1.weight", (5, 784), "linear_weight"),
        ("fc1.bias", (5,), "bias"),
    ]


def test_the_stem_and_first_bottleneck_of_resnet50() -> None:
    table = catalog.get_spec("resnet50").layers()
    rows = [(layer.name, layer.in_channels, layer.out_channels, layer.size, layer.stride) for layer in table]
    assert rows[:4] == [("conv1", 3, 64, 112, 2), ("bn1", 64, 64, 112, 1), ("relu", 64, 64, 112, 1), ("maxpool", 64, 64, 56, 2)]
    assert rows[4] == ("layer1.0.conv1", 64, 64, 56, 1)
    assert ("layer1.0.downsample.0", 64, 256, 56, 1) in rows


def test_v1_5_puts_the_stride_on_the_3x3() -> None:
    spec = catalog.get_spec("resnet50")
    kernels = {i: (spec.layer(f"layer2.0.conv{i}").kernel, spec.layer(f"layer2.0.conv{i}").stride) for i in (1, 2, 3)}
    assert kernels == {1: (1, 1), 2: (3, 2), 3: (1, 1)}


def test_option_a_shortcuts_have_no_parameters() -> None:
    spec = catalog.get_spec("resnet20")
    shortcuts = [layer for layer in spec.layers() if "downsample" in layer.name]
    assert [(layer.name, layer.op, layer.in_channels, layer.out_channels) for layer in shortcuts] == [
        ("layer2.0.downsample", "pad_shortcut", 16, 32),
        ("layer3.0.downsample", "pad_shortcut", 32, 64),
    ]
    assert not any(list(layer.tensors()) for layer in shortcuts)


def test_batch_norm_state_in_state_dict_order() -> None:
    tensors = list(catalog.get_spec("resnet20").layer("bn1").tensors())
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert [tensor.name for tensor in tensors] == [f"bn1.{name}" for name in names]
    assert [tensor.trainable for tensor in tensors] == [True, True, False, False, False]
    assert [tensor.shape for tensor in tensors] == [(16,)] * 4 + [()]


def test_the_bare_block_is_the_block_of_a_vit() -> None:
    vit = catalog.get_spec("vit_tiny_patch16_224")
    block = catalog.get_spec("transformer_block", tokens=vit.tokens)
    assert isinstance(vit, ViTSpec)
    assert isinstance(block, TransformerBlockSpec)
    constants = ("width", "heads", "mlp_width", "layer_norm_epsilon")
    assert all(getattr(block, constant) == getattr(vit, constant) for constant in constants)
    first = [layer for layer in vit.layers() if layer.name.startswith("blocks.0.")]
    assert [dataclasses.replace(layer, name=layer.name.removeprefix("blocks.0.")) for layer in first] == list(block.layers()[:-1])
    assert block.layers()[-1] == Layer("output", "residual", 192, 192, 1, tokens=197)
    assert block.inputs() == (Input("features", "features", (197, 192)),)


def test_proof_image_size() -> None:
    assert [catalog.get_spec(name).proof_image_size for name in ("resnet50", "resnet20", "mlp", "vit_tiny_patch16_224")] == [
        64,
        32,
        28,
        224,
    ]
