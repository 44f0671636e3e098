"""The catalogue: exact parameter counts, options that carry over, and errors that say what to do."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from triptych.core import catalog
from triptych.core.architecture import ImageArchitecture
from triptych.core.errors import UsageError
from triptych.core.spec import ResNetSpec

# Written out once more: the catalogue's own table must not vouch for itself. The first five are torchvision's counts.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet18_cifar": 11_173_962,
    "mlp": 784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10,
    "vit_tiny_patch16_224": 5_717_416,  # timm's counts
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "transformer_block": 2 * 2 * 192 + 192 * 576 + 576 + 192 * 192 + 192 + 2 * 192 * 768 + 768 + 192,
    "text_image": 10_000 * 128 + 4 * 64 * (128 + 64 + 2) + 32 * (27 + 1) + 96 + 1,
}


def test_the_catalogue_holds_these_models_in_this_order() -> None:
    assert catalog.list_models() == list(PARAMETERS)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts_are_exact(name: str, count: int) -> None:
    assert sum(prod(tensor.shape) for tensor in catalog.get_spec(name).parameters()) == count
    assert catalog.CATALOG[name].parameters == count


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("resnet1*", ["resnet18", "resnet101", "resnet152", "resnet110", "resnet18_cifar"]),
        ("mlp", ["mlp"]),
        ("*_cifar", ["resnet18_cifar"]),
        ("RESNET*", []),
        ("resnet?4", ["resnet34", "resnet44"]),
    ],
)
def test_list_models_matches_a_pattern(pattern: str, names: list[str]) -> None:
    assert catalog.list_models(pattern) == names


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("resnet5", "resnet50"),
        ("resnet2O", "resnet20"),
        ("resnet-50", "resnet50"),
        ("Resnet50", "resnet50"),
        ("resnet18_cifr", "resnet18_cifar"),
        ("mpl", "mlp"),
        ("vit_tiny_patch16", "vit_tiny_patch16_224"),
    ],
)
def test_a_mistyped_name_gets_a_suggestion(given: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown model '{given}'; did you mean '{meant}'\? `triptych list` shows all 17"):
        catalog.get_spec(given)


@pytest.mark.parametrize("given", ["vgg", ""])
def test_a_name_like_no_other_gets_none(given: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown model '{given}'; `triptych list`"):
        catalog.get_spec(given)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {"hidden": (3,)}, "resnet20 has no option 'hidden'; it takes num_classes, in_channels, image_size"),
        ("mlp", {"classes": 3}, "mlp has no option 'classes'; it takes num_classes, in_channels, image_size, hidden, dropout"),
        ("resnet50", {"num_classes": 0}, "num_classes=0 must be a positive integer"),
        ("resnet50", {"num_classes": True}, "num_classes=True must be a positive integer"),
        ("resnet50", {"image_size": 224.0}, "image_size=224.0 must be a positive integer"),
        ("resnet50", {"in_channels": "3"}, "in_channels='3' must be a positive integer"),
        ("mlp", {"hidden": ()}, r"hidden=\(\) must be one positive integer or several"),
        ("mlp", {"hidden": (8, 0)}, r"hidden=\(8, 0\) must be one positive integer or several"),
        ("mlp", {"hidden": 8}, "hidden=8 must be one positive integer or several, as a tuple"),
        ("mlp", {"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ("mlp", {"dropout": -0.1}, r"dropout=-0.1 is not in \[0, 1\)"),
        ("vit_tiny_patch16_224", {"image_size": 100}, "image_size=100 must be a multiple of its patches of 16 pixels"),
        ("transformer_block", {"image_size": 32}, "transformer_block has no option 'image_size'; it takes tokens, width, heads, mlp_width"),
        ("transformer_block", {"heads": 5}, "width=192 must be a multiple of heads=5"),
        ("transformer_block", {"tokens": 0}, "tokens=0 must be a positive integer"),
        ("mlp", {"dropout": "half"}, r"dropout='half' is not in \[0, 1\)"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        catalog.get_spec(name, **options)


def test_options_change_the_spec_and_its_preprocessing_together() -> None:
    spec = catalog.get_spec("resnet50", num_classes=7, in_channels=1, image_size=112)
    assert (spec.num_classes, spec.input_shape) == (7, (112, 112, 1))
    assert (spec.preprocessing.resize_short_side, spec.preprocessing.crop, spec.preprocessing.channels) == (128, 112, 1)
    assert spec.preprocessing.mean == (0.449,)
    assert spec.layer("fc").out_channels == 7
    assert spec.layer("conv1").in_channels == 1


def test_no_options_change_nothing() -> None:
    for name in catalog.CATALOG:
        spec = catalog.get_spec(name)
        assert catalog.with_options(spec) == spec
        if not isinstance(spec, ImageArchitecture):
            continue
        assert spec.preprocessing.crop == spec.image_size
        assert spec.preprocessing.channels == spec.in_channels


def test_widths_of_the_mlp() -> None:
    spec = catalog.get_spec("mlp", hidden=[3], dropout=0.5)
    assert spec == catalog.get_spec("mlp", hidden=(3,), dropout=0.5)
    assert [layer.op for layer in spec.layers()] == ["flatten", "linear", "relu", "dropout", "linear"]


def test_constants_of_the_papers() -> None:
    imagenet, cifar = catalog.get_spec("resnet50"), catalog.get_spec("resnet20")
    assert isinstance(imagenet, ResNetSpec)
    assert isinstance(cifar, ResNetSpec)
    assert (imagenet.batch_norm.epsilon, imagenet.batch_norm.momentum) == (1e-5, 0.1)
    assert [stage.blocks for stage in imagenet.stages] == [3, 4, 6, 3]
    assert [stage.width for stage in cifar.stages] == [16, 32, 64]
    assert (imagenet.shortcut, cifar.shortcut) == ("projection", "pad")
    assert cifar.stem.max_pool is None
    # 6n + 2 layers with weights: convolutions and the classifier.
    depths = {name: sum(layer.op in ("conv", "linear") for layer in catalog.get_spec(name).layers()) for name in catalog.CATALOG}
    assert all(depths[f"resnet{depth}"] == depth for depth in catalog.CIFAR_DEPTHS)


@pytest.mark.parametrize("name", catalog.CATALOG)
def test_the_tiny_twin_has_the_same_kinds_of_layers(name: str) -> None:
    spec = catalog.get_spec(name)
    tiny = catalog.tiny(spec)
    assert tiny.name == f"tiny_{name}"
    assert {(layer.op, layer.kernel if layer.op == "conv" else 0, layer.stride) for layer in tiny.layers()} == {
        (layer.op, layer.kernel if layer.op == "conv" else 0, layer.stride) for layer in spec.layers()
    }
    assert sum(prod(tensor.shape) for tensor in tiny.parameters()) < 250_000
    if isinstance(tiny, ImageArchitecture):
        assert tiny.preprocessing.crop == tiny.image_size <= 64


def test_what_images_cannot_feed_is_refused_and_proven_at_its_own_size() -> None:
    block, resnet = catalog.get_spec("transformer_block"), catalog.get_spec("resnet50")
    takes = r"transformer_block cannot be fed with images alone: it takes features \(N, tokens, width\) = \(N, 64, 192\)"
    with pytest.raises(UsageError, match=takes):
        catalog.fed_by_images(block)
    assert catalog.fed_by_images(resnet) is resnet
    assert (catalog.at_proof_size(block), catalog.at_proof_size(resnet).image_size) == (block, 64)
