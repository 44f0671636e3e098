"""Names -> specs. The size tables cite the paper's table; every constant that frameworks disagree on is set here, once."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from triptych.core.architecture import ImageArchitecture
from triptych.core.errors import UsageError
from triptych.core.spec import (
    BatchNormSpec,
    ImageSpec,
    MLPSpec,
    PoolSpec,
    Preprocessing,
    ResNetSpec,
    Spec,
    StageSpec,
    StemSpec,
    TextImageSpec,
    TransformerBlockSpec,
    ViTSpec,
)  # fmt: skip

# torchvision's statistics of the ImageNet training set, RGB, on [0, 1].
IMAGENET = Preprocessing(resize_short_side=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# Per-channel statistics of the CIFAR-10 training set (`triptych data statistics` is planned; these are the field's usual figures).
CIFAR = Preprocessing(resize_short_side=None, crop=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
# Of the ViTs of Steiner et al. 2021, as timm has them; timm resizes bicubically.
VIT = Preprocessing(resize_short_side=248, crop=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
# Mean and standard deviation of the embedded digits' training split on [0, 1] (`data/digits.py`; a test computes them).
DIGITS = Preprocessing(resize_short_side=None, crop=32, mean=(0.3057,), std=(0.376,))

# PyTorch's and torchvision's constants, not Keras' (epsilon 1e-3) nor anybody's default (numerics 4, 5).
BATCH_NORM = BatchNormSpec(epsilon=1e-5, momentum=0.1)

IMAGENET_STEM = StemSpec(width=64, kernel=7, stride=2, padding=3, max_pool=PoolSpec(kernel=3, stride=2, padding=1))
CIFAR_STEM = StemSpec(width=16, kernel=3, stride=1, padding=1, max_pool=None)

# He et al. 2015 (arXiv:1512.03385), Table 1: block and blocks a stage.
IMAGENET_SIZES: dict[str, tuple[Literal["basic", "bottleneck"], tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
# He et al. 2015, §4.2 and Table 6: depth 6n + 2, three stages of n basic blocks of width 16, 32, 64, option-A shortcuts.
CIFAR_DEPTHS = (20, 32, 44, 56, 110)
# Steiner et al. 2021 (arXiv:2106.10270), Table 2: width and heads of the twelve blocks; patches of 16 pixels.
VIT_SIZES = {"vit_tiny_patch16_224": (192, 3), "vit_small_patch16_224": (384, 6), "vit_base_patch16_224": (768, 12)}
# The paper's and timm's, neither PyTorch's 1e-5 nor Keras' 1e-3 (numerics 8).
LAYER_NORM_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Entry:
    """A catalogued model: what it is, where it comes from, and its exact parameter count at default options."""

    build: Callable[[str], Spec]
    summary: str
    source: str
    parameters: int


def _imagenet_resnet(name: str) -> ResNetSpec:
    block, depths = IMAGENET_SIZES[name]
    stages = tuple(StageSpec(blocks, 64 * 2**i, 1 if i == 0 else 2) for i, blocks in enumerate(depths))
    return ResNetSpec(name, block, IMAGENET_STEM, stages, "projection", BATCH_NORM, 1000, 3, 224, IMAGENET)


def _cifar_resnet(name: str) -> ResNetSpec:
    blocks = (int(name.removeprefix("resnet")) - 2) // 6
    stages = tuple(StageSpec(blocks, 16 * 2**i, 1 if i == 0 else 2) for i in range(3))
    return ResNetSpec(name, "basic", CIFAR_STEM, stages, "pad", BATCH_NORM, 10, 3, 32, CIFAR)


def _resnet18_cifar(name: str) -> ResNetSpec:
    stem = StemSpec(width=64, kernel=3, stride=1, padding=1, max_pool=None)
    stages = tuple(StageSpec(2, 64 * 2**i, 1 if i == 0 else 2) for i in range(4))
    return ResNetSpec(name, "basic", stem, stages, "projection", BATCH_NORM, 10, 3, 32, CIFAR)


def _mlp(name: str) -> MLPSpec:
    return MLPSpec(name, hidden=(256, 256), dropout=0.0, num_classes=10, in_channels=1, image_size=28, preprocessing=DIGITS)


def _text_image(name: str) -> TextImageSpec:
    return TextImageSpec(
        name, vocabulary=10_000, length=32, padding_token=0, width=128, features=64, filters=32, kernel=3, num_classes=1,
        in_channels=3, image_size=224, preprocessing=IMAGENET,
    )  # fmt: skip


def _vit(name: str) -> ViTSpec:
    width, heads = VIT_SIZES[name]
    return ViTSpec(name, 16, width, 12, heads, 4 * width, LAYER_NORM_EPSILON, 1000, 3, 224, VIT)


def _transformer_block(name: str) -> TransformerBlockSpec:
    width, heads = VIT_SIZES["vit_tiny_patch16_224"]
    return TransformerBlockSpec(name, tokens=64, width=width, heads=heads, mlp_width=4 * width, layer_norm_epsilon=LAYER_NORM_EPSILON)


_IMAGENET_COUNTS = (11_689_512, 21_797_672, 25_557_032, 44_549_160, 60_192_808)
_CIFAR_COUNTS = (269_722, 464_154, 658_586, 853_018, 1_727_962)
_VIT_COUNTS = (5_717_416, 22_050_664, 86_567_656)

CATALOG: dict[str, Entry] = {
    **{
        name: Entry(_imagenet_resnet, f"ResNet-{name[6:]} v1.5 for ImageNet", "He et al. 2015, Table 1; stride on the 3x3 (v1.5)", count)
        for name, count in zip(IMAGENET_SIZES, _IMAGENET_COUNTS, strict=True)
    },
    **{
        f"resnet{depth}": Entry(_cifar_resnet, f"ResNet-{depth} for CIFAR, option-A shortcuts", "He et al. 2015, §4.2", count)
        for depth, count in zip(CIFAR_DEPTHS, _CIFAR_COUNTS, strict=True)
    },
    "resnet18_cifar": Entry(
        _resnet18_cifar, "ResNet-18 with a 3x3 stem for 32x32 images", "the usual CIFAR variant of ResNet-18", 11_173_962
    ),
    "mlp": Entry(_mlp, "Multilayer perceptron 784-256-256-10, ReLU", "Goodfellow et al. 2016, ch. 6", 269_322),
    **{
        name: Entry(
            _vit, f"ViT-{name.split('_')[1].title()}/16 for ImageNet at 224 pixels", "Dosovitskiy et al. 2021; Steiner et al. 2021", count
        )
        for name, count in zip(VIT_SIZES, _VIT_COUNTS, strict=True)
    },
    "transformer_block": Entry(
        _transformer_block, "Pre-norm transformer block of ViT-Tiny's width over 64 tokens, by itself", "Dosovitskiy et al. 2021", 444_864
    ),
    "text_image": Entry(
        _text_image,
        "Two inputs: embedding and LSTM of a text, convolution and global max-pool of an image, one logit",
        "the multi-input example of Keras' functional API; LSTM: Hochreiter & Schmidhuber 1997",
        1_330_657,
    ),
}


def list_models(pattern: str = "*") -> list[str]:
    """Catalogued names that match a shell-style pattern, in catalogue order."""
    return [name for name in CATALOG if fnmatch.fnmatchcase(name, pattern)]


def get_spec(name: str, **options: Any) -> Spec:
    """The spec called `name`, with options (`num_classes`, `in_channels`, `image_size`; for `mlp` also `hidden`, `dropout`; for
    `transformer_block` only `tokens`, `width`, `heads`, `mlp_width`; for `text_image` also `vocabulary`, `length`, `width`, `features`,
    `filters`, `kernel`).

    A changed `image_size` or `in_channels` carries over to the preprocessing, so that the two never disagree.
    Raises UsageError for an unknown name or option, or a value out of range.
    """
    if name not in CATALOG:
        close = _closest(name)
        hint = f"did you mean {close!r}? " if close else ""
        raise UsageError(f"unknown model {name!r}; {hint}`triptych list` shows all {len(CATALOG)}")
    return with_options(CATALOG[name].build(name), **options)


def _closest(name: str) -> str | None:
    """The catalogued name most similar to `name`, the first of equals; None when none is close."""
    import difflib

    likeness = {known: difflib.SequenceMatcher(None, name, known).ratio() for known in CATALOG}
    best = max(likeness, key=likeness.__getitem__)
    return best if likeness[best] >= 0.6 else None


def with_options(spec: Spec, **options: Any) -> Spec:
    """`spec` with options replaced and its preprocessing kept in step."""
    allowed = allowed_options(spec)
    for option, value in options.items():
        if option not in allowed:
            raise UsageError(f"{spec.name} has no option {option!r}; it takes {', '.join(allowed)}")
        _check(spec.name, option, value)
    if "hidden" in options:
        options["hidden"] = tuple(options["hidden"])
    changed = dataclasses.replace(spec, **options)
    if isinstance(changed, TransformerBlockSpec):
        return _whole_heads(changed)
    if isinstance(changed, ViTSpec) and changed.image_size % changed.patch_size:
        raise UsageError(f"{spec.name}: image_size={changed.image_size} must be a multiple of its patches of {changed.patch_size} pixels")
    if isinstance(changed, TextImageSpec) and changed.image_size < changed.kernel:
        raise UsageError(f"{spec.name}: image_size={changed.image_size} is smaller than the convolution's kernel={changed.kernel}")
    return dataclasses.replace(changed, preprocessing=_fitted(changed))


def _whole_heads(spec: TransformerBlockSpec) -> TransformerBlockSpec:
    if spec.width % spec.heads:
        raise UsageError(f"{spec.name}: width={spec.width} must be a multiple of heads={spec.heads}")
    return spec


def at_proof_size(spec: Spec) -> Spec:
    """`spec` at the image size of a proof's training rungs; without images, as it is."""
    return spec if isinstance(spec, TransformerBlockSpec) else with_options(spec, image_size=spec.proof_image_size)


def fed_by_images(spec: Spec) -> ImageSpec:
    """The same spec. UsageError unless images alone go into it, which is what sets and files of images can feed."""
    if isinstance(spec, ImageArchitecture):
        return spec
    takes = "; ".join(map(str, spec.inputs()))
    raise UsageError(
        f"{spec.name} cannot be fed with images alone: it takes {takes}. Choose another model of `triptych list`, or use Python"
    )


def allowed_options(spec: Spec) -> tuple[str, ...]:
    """The options that `get_spec` takes for this family."""
    if isinstance(spec, TransformerBlockSpec):
        return ("tokens", "width", "heads", "mlp_width")
    common = ("num_classes", "in_channels", "image_size")
    if isinstance(spec, TextImageSpec):
        return ("vocabulary", "length", "width", "features", "filters", "kernel", *common)
    return (*common, "hidden", "dropout") if isinstance(spec, MLPSpec) else common


def _check(name: str, option: str, value: Any) -> None:
    if option == "dropout":
        if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
            raise UsageError(f"{name}: dropout={value!r} is not in [0, 1)")
    elif option == "hidden":
        if not isinstance(value, (list, tuple)) or not value or not all(map(_positive, value)):
            raise UsageError(f"{name}: hidden={value!r} must be one positive integer or several, as a tuple")
    elif not _positive(value):
        raise UsageError(f"{name}: {option}={value!r} must be a positive integer")


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _fitted(spec: ImageSpec | TextImageSpec) -> Preprocessing:
    """The preprocessing whose crop and channels fit the spec; another channel count gets the mean statistics in every channel."""
    old = spec.preprocessing
    resize = None if old.resize_short_side is None else round(old.resize_short_side * spec.image_size / old.crop)
    mean, std = old.mean, old.std
    if len(mean) != spec.in_channels:
        mean = (round(sum(mean) / len(mean), 4),) * spec.in_channels
        std = (round(sum(std) / len(std), 4),) * spec.in_channels
    return Preprocessing(resize, spec.image_size, mean, std)


def tiny(spec: Spec) -> Spec:
    """The same kinds of layers, small enough to climb the ladder in seconds: for planted faults and tests."""
    if isinstance(spec, MLPSpec):
        return with_options(dataclasses.replace(spec, name=f"tiny_{spec.name}", hidden=(24, 24)), in_channels=3, image_size=8)
    if isinstance(spec, TransformerBlockSpec):
        return dataclasses.replace(spec, name=f"tiny_{spec.name}", tokens=10, width=16, heads=2, mlp_width=32)
    if isinstance(spec, TextImageSpec):
        small_pair = dataclasses.replace(spec, name=f"tiny_{spec.name}", vocabulary=11, length=7, width=6, features=5, filters=8)
        return with_options(small_pair, image_size=12)
    if isinstance(spec, ViTSpec):
        small_vit = dataclasses.replace(spec, name=f"tiny_{spec.name}", width=16, depth=2, heads=2, mlp_width=32)
        return with_options(small_vit, num_classes=10, image_size=48)
    stages = tuple(StageSpec(min(stage.blocks, 2), 8 * 2**i, stage.stride) for i, stage in enumerate(spec.stages))
    small = dataclasses.replace(spec, name=f"tiny_{spec.name}", stem=dataclasses.replace(spec.stem, width=8), stages=stages)
    return with_options(small, num_classes=10, image_size=64 if spec.stem.max_pool else 16)
