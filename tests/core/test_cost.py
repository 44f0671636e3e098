"""Parameters and MACs against published figures, and against a hand count."""

from __future__ import annotations

import pytest

from triptych.core import catalog
from triptych.core.cost import cost

# torchvision's `_ops` of its ResNet weights, in G multiply-accumulates at 224 pixels (fvcore's convention), to three decimals.
PUBLISHED = {"resnet18": 1.814, "resnet34": 3.664, "resnet50": 4.089, "resnet101": 7.801, "resnet152": 11.514}


@pytest.mark.parametrize(("name", "giga"), PUBLISHED.items())
def test_imagenet_resnets_match_the_published_macs(name, giga):
    assert round(cost(catalog.get_spec(name)).macs / 1e9, 3) == giga


def test_resnet50_is_4_09_gmacs_and_flops_are_twice_that():
    total = cost(catalog.get_spec("resnet50"))
    assert total.macs == 4_089_184_256
    assert total.flops == 2 * total.macs


def test_vit_base_matches_the_published_macs():
    # torchvision's `_ops` of vit_b_16, the same network: 17.564 G.
    assert round(cost(catalog.get_spec("vit_base_patch16_224")).macs / 1e9, 3) == 17.564


def test_attention_by_hand():
    layers = {layer.name: layer for layer in cost(catalog.get_spec("vit_tiny_patch16_224")).layers}
    assert layers["patch_embed.proj"].macs == 14 * 14 * 16 * 16 * 3 * 192
    assert layers["pos_drop"].output == (197, 192)
    assert layers["pos_drop"].parameters == 192 + 197 * 192
    assert layers["blocks.3.attn.qkv"].macs == 197 * 192 * 576
    assert layers["blocks.3.attn.sdpa"].macs == 3 * 2 * 197 * 197 * 64
    assert layers["blocks.3.attn.sdpa"].parameters == 0
    assert layers["head"].output == (1000,)
    assert layers["head"].macs == 192 * 1000


def test_the_bare_block_costs_what_a_block_of_a_vit_does():
    vit, block = catalog.get_spec("vit_tiny_patch16_224"), cost(catalog.get_spec("transformer_block", tokens=197))
    inside = [layer for layer in cost(vit).layers if layer.name.startswith("blocks.0.")]
    assert block.macs == sum(layer.macs for layer in inside)
    assert block.image_size is None
    assert block.layers[-1].output == (197, 192)


@pytest.mark.parametrize("name", catalog.CATALOG)
def test_parameters_are_the_catalogued_count(name):
    assert cost(catalog.get_spec(name)).parameters == catalog.CATALOG[name].parameters


def test_the_mlp_by_hand():
    layers = {layer.name: layer for layer in cost(catalog.get_spec("mlp")).layers}
    assert layers["fc1"].macs == 784 * 256
    assert layers["fc1"].parameters == 784 * 256 + 256
    assert layers["flatten"].output == (784,)
    assert layers["relu1"].output == (256,)
    assert sum(layer.macs for layer in layers.values()) == 784 * 256 + 256 * 256 + 256 * 10


def test_a_convolution_by_hand():
    layers = {layer.name: layer for layer in cost(catalog.get_spec("resnet50")).layers}
    assert layers["conv1"].macs == 7 * 7 * 3 * 64 * 112 * 112
    assert layers["conv1"].output == (112, 112, 64)
    assert layers["layer2.0.conv2"].macs == 3 * 3 * 128 * 128 * 28 * 28
    assert layers["avgpool"].output == (2048,)
    assert layers["avgpool"].macs == 0


def test_options_change_what_they_should():
    base, classes, small = (cost(catalog.get_spec("resnet50", **options)) for options in ({}, {"num_classes": 10}, {"image_size": 112}))
    assert base.parameters - classes.parameters == 990 * 2049
    assert small.parameters == base.parameters
    assert 3.5 < base.macs / small.macs < 4.1
