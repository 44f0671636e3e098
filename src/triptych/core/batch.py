"""A batch as it crosses the boundary: one array for a model of one input, a mapping from the inputs' names to arrays for several.

Inside, the rooms and the ladder hold every batch by name, in the order of `spec.inputs()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from triptych.core.errors import UsageError
from triptych.core.spec import Input, Spec

Inputs = np.ndarray | Mapping[str, np.ndarray]
Named = dict[str, np.ndarray]

SHARES_ADD_UP_TO = 1e-4
MASKED = 0.25
"""How many of the ids that are drawn for a proof or a benchmark are 0, the mask, besides those that chance draws."""


def checked(spec: Spec, inputs: Inputs) -> Named:
    """The batch by name. UsageError unless it has the inputs of `spec`, each of its kind and shape, of as many samples."""
    wanted = spec.inputs()
    if isinstance(inputs, Mapping):
        if set(inputs) != {each.name for each in wanted}:
            takes = "; ".join(map(str, wanted))
            raise UsageError(f"{spec.name} takes {takes}; given {', '.join(map(str, inputs)) or 'nothing'}: name them as these are")
        named = {each.name: np.asarray(inputs[each.name]) for each in wanted}
    elif len(wanted) > 1:
        raise UsageError(
            f"{spec.name} takes several inputs, as a mapping from name to array: {'; '.join(map(str, wanted))}; given one array"
        )
    else:
        named = {wanted[0].name: np.asarray(inputs)}
    for each in wanted:
        _check(spec, each, named[each.name])
    sizes = {name: len(array) for name, array in named.items()}
    if len(set(sizes.values())) > 1:
        raise UsageError(f"{spec.name} takes as many samples of each input; given {sizes}")
    return named


def _check(spec: Spec, wanted: Input, array: np.ndarray) -> None:
    if array.ndim == 0 or array.shape[1:] != wanted.shape:
        changes = ", ".join(_SHAPED_BY[wanted.kind])
        raise UsageError(f"{spec.name} takes {wanted}; given {array.shape}. What a model takes is changed by its options {changes}")
    if wanted.kind == "tokens":
        if not np.issubdtype(array.dtype, np.integer):
            raise UsageError(f"{spec.name} takes {wanted}; given {array.dtype}: look the ids up first")
        if array.size and not 0 <= array.min() <= array.max() < wanted.vocabulary:
            raise UsageError(f"{spec.name} takes {wanted}; given ids from {array.min()} to {array.max()}")
    elif not np.issubdtype(array.dtype, np.floating):
        remedy = "preprocessed floating-point images; call `preprocess` first" if wanted.kind == "image" else "floating-point numbers"
        raise UsageError(f"{spec.name} takes {wanted}, {remedy}; given {array.dtype}")


_SHAPED_BY = {"image": ("image_size", "in_channels"), "features": ("tokens", "width"), "tokens": ("tokens",)}


def samples(named: Mapping[str, np.ndarray]) -> int:
    """How many samples a named batch has."""
    return len(next(iter(named.values())))


def part(named: Mapping[str, np.ndarray], which: slice) -> Named:
    """Some samples of a named batch."""
    return {name: array[which] for name, array in named.items()}


def cast(inputs: Inputs, *precisions: str) -> Inputs:
    """Floating-point inputs rounded to each precision in turn; ids stay as they are."""
    if isinstance(inputs, Mapping):
        return {name: _cast(array, precisions) for name, array in inputs.items()}
    return _cast(inputs, precisions)


def _cast(array: np.ndarray, precisions: tuple[str, ...]) -> np.ndarray:
    for precision in precisions if np.issubdtype(array.dtype, np.floating) else ():
        array = array.astype(precision, copy=False)
    return array


def drawn(
    spec: Spec, count: int, normal: Callable[[str, tuple[int, ...]], np.ndarray], uniform: Callable[[str, tuple[int, ...]], np.ndarray]
) -> Inputs:
    """`count` samples of noise: standard normal floats; ids evenly over the vocabulary, and a share of `MASKED` of them 0.

    `normal` and `uniform` (on [0, 1)) draw an array of a shape from the stream of an input's name, which is "" for an only input.
    """
    wanted = spec.inputs()
    found = {each.name: _drawn(each, (count, *each.shape), each.name if len(wanted) > 1 else "", normal, uniform) for each in wanted}
    return found if len(found) > 1 else found[wanted[0].name]


def _drawn(
    wanted: Input, shape: tuple[int, ...], name: str, normal: Callable[..., np.ndarray], uniform: Callable[..., np.ndarray]
) -> np.ndarray:
    if wanted.kind != "tokens":
        return normal(name, shape)
    ids = np.floor(uniform(name, shape) * wanted.vocabulary).astype(np.int64)
    return np.where(uniform(f"{name} masked", shape) < MASKED, 0, ids)


def random(spec: Spec, count: int, generator: np.random.Generator) -> Inputs:
    """`drawn` in float32 from a generator, which it moves on."""
    return drawn(
        spec, count,
        lambda name, shape: generator.standard_normal(shape, dtype=np.float32), lambda name, shape: generator.random(shape),
    )  # fmt: skip


def checked_targets(spec: Spec, targets: np.ndarray, count: int) -> np.ndarray:
    """The targets of `count` samples: integer classes, one for each row of logits, or float64 shares (count, classes).

    Where every position is classified, (count, tokens) classes, or (count,), which then hold for each position of their sample.
    UsageError for anything else: a label out of range would be an error on a CPU, a crash on a GPU and NaN elsewhere.
    """
    targets, classes, positions = np.asarray(targets), spec.num_classes, spec.output_shape[:-1]
    takes = f"({count},) integers in [0, {classes})"
    takes += f", or one a position, {(count, *positions)}" if positions else f" or ({count}, {classes}) shares that add up to one"
    if not positions and targets.ndim == 2:
        if targets.shape != (count, classes) or not np.allclose(targets.sum(axis=1), 1.0, atol=SHARES_ADD_UP_TO):
            raise UsageError(f"{spec.name}: targets of shape {targets.shape} given; expected {takes}")
        return np.asarray(targets, np.float64)
    if targets.shape not in ((count,), (count, *positions)) or not np.issubdtype(targets.dtype, np.integer):
        raise UsageError(f"{spec.name}: targets of shape {targets.shape} and type {targets.dtype} given; expected {takes}")
    if targets.size and not 0 <= targets.min() <= targets.max() < classes:
        raise UsageError(f"{spec.name}: targets from {targets.min()} to {targets.max()} given; expected {takes}")
    each = targets if targets.ndim > 1 else targets.reshape(count, *(1 for _ in positions))
    return np.broadcast_to(each, (count, *positions)).astype(np.int64)
