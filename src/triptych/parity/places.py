"""Where a fault is planted: functions that find the layer of a fitting kind in any spec, or None."""

from __future__ import annotations

from collections.abc import Callable

from triptych.core.spec import BlockSpec, Layer, ResNetSpec, Spec

Select = Callable[[Spec], str | None]


def first(match: Callable[[Layer], bool]) -> Select:
    """The first layer that matches."""
    return lambda spec: next((layer.name for layer in spec.layers() if match(layer)), None)


def anywhere(spec: Spec) -> str | None:
    """No layer in particular: the fault sits beside the model."""
    return ""


def middle(*ops: str) -> Select:
    """The middle layer of a kind, or of several: neither the first, which much feeds, nor the last, which feeds nothing."""

    def select(spec: Spec) -> str | None:
        names = [layer.name for layer in spec.layers() if layer.op in ops]
        return names[len(names) // 2] if names else None

    return select


def block(match: Callable[[BlockSpec], bool]) -> Select:
    """The first residual block that matches."""

    def select(spec: Spec) -> str | None:
        return next((block.name for block in spec.blocks() if match(block)), None) if isinstance(spec, ResNetSpec) else None

    return select


def flattened_channels(spec: Spec) -> str | None:
    """A flatten of several channels, whose order matters."""
    return next((layer.name for layer in spec.layers() if layer.op == "flatten" and (spec.in_channels or 0) > 1), None)


def shortcut(spec: Spec) -> str | None:
    """The first shortcut that changes the shape."""
    names = (layer.name for layer in spec.layers() if layer.op == "pad_shortcut" or layer.name.endswith("downsample.0"))
    return next(names, None)


def before_shortcut(spec: Spec) -> str | None:
    """The last layer with parameters before the shortcut's block: what a gradient that stops in the shortcut misses first."""
    names = [layer.name for layer in spec.layers() if any(tensor.trainable for tensor in layer.tensors())]
    block = (shortcut(spec) or "").partition(".downsample")[0]
    start = next((i for i, name in enumerate(names) if name.startswith(f"{block}.")), 0)
    return names[start - 1] if block and start else None


def images(spec: Spec) -> str | None:
    """No layer in particular, of a model that images go into."""
    return None if spec.preprocessing is None else ""


def image_files(spec: Spec) -> str | None:
    """No layer in particular, of a model whose images come from files: of one channel or of three."""
    return "" if spec.in_channels in (1, 3) else None


def colour(spec: Spec) -> str | None:
    """No layer in particular, of a model that sees colour."""
    return "" if spec.in_channels == 3 else None
