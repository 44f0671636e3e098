"""Batches of any inputs: by name, checked, cut, cast and drawn; and targets, one for each row of logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from triptych.core import batch, catalog, philox
from triptych.core.errors import UsageError
from triptych.core.spec import Input, Spec, TransformerBlockSpec

IMAGES = catalog.get_spec("mlp", image_size=4)
BLOCK = catalog.get_spec("transformer_block", tokens=5, width=6, heads=2, mlp_width=8)


class _Several(TransformerBlockSpec):
    """A spec of two inputs; nothing else about it matters here."""

    def inputs(self) -> tuple[Input, ...]:
        return (Input("text", "tokens", (7,), vocabulary=9), Input("image", "image", (4, 4, 3)))


SEVERAL: Spec = _Several(**{field.name: getattr(BLOCK, field.name) for field in dataclasses.fields(BLOCK)})


def noise(spec: Spec, count: int = 3) -> Any:
    return batch.drawn(spec, count, philox.normal, philox.uniform)


def test_one_input_is_an_array_with_or_without_its_name() -> None:
    for spec, name in ((IMAGES, "images"), (BLOCK, "features")):
        given = noise(spec)
        assert isinstance(given, np.ndarray)
        for named in (batch.checked(spec, given), batch.checked(spec, {name: given})):
            assert list(named) == [name]
            assert named[name] is given
        assert batch.samples(named) == 3


def test_several_inputs_come_by_name_in_the_order_of_the_spec() -> None:
    given = noise(SEVERAL)
    named = batch.checked(SEVERAL, dict(reversed(given.items())))
    assert list(named) == ["text", "image"]
    assert {name: array.shape for name, array in batch.part(named, slice(1, 3)).items()} == {"text": (2, 7), "image": (2, 4, 4, 3)}


@pytest.mark.parametrize(
    ("spec", "given", "message"),
    [
        (
            IMAGES,
            np.zeros((2, 4, 4, 3)),
            r"mlp takes images \(N, H, W, C\) = \(N, 4, 4, 1\); given \(2, 4, 4, 3\).*image_size, in_channels",
        ),
        (IMAGES, np.zeros((2, 4, 4, 1), np.uint8), "given uint8"),
        (IMAGES, np.float32(1), r"given \(\)"),
        (BLOCK, np.zeros((2, 6, 5)), r"takes features \(N, tokens, width\) = \(N, 5, 6\); given \(2, 6, 5\).*tokens, width"),
        (BLOCK, {"images": np.zeros((2, 5, 6))}, "takes features.*given images: name them"),
        (BLOCK, {}, "given nothing"),
        (SEVERAL, np.zeros((2, 7), int), "takes several inputs, as a mapping.*text.*image.*given one array"),
        (SEVERAL, {"text": np.zeros((2, 7)), "image": np.zeros((2, 4, 4, 3))}, r"ids \(N, tokens\) = \(N, 7\) in \[0, 9\); given float64"),
        (SEVERAL, {"text": np.full((2, 7), 9), "image": np.zeros((2, 4, 4, 3))}, "given ids from 9 to 9"),
        (SEVERAL, {"text": np.full((2, 7), -1), "image": np.zeros((2, 4, 4, 3))}, "given ids from -1 to -1"),
        (SEVERAL, {"text": np.zeros((2, 7), int), "image": np.zeros((3, 4, 4, 3))}, "as many samples of each input; given .*'text': 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_taken(spec: Spec, given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        batch.checked(spec, given)


def test_noise_has_the_kinds_of_its_inputs_and_masks_some_ids() -> None:
    drawn = noise(SEVERAL, 200)
    text = drawn["text"]
    assert text.dtype == np.int64
    assert set(np.unique(text)) == set(range(9))
    assert abs((text == 0).mean() - (0.25 + 0.75 / 9)) < 0.05
    assert abs(drawn["image"].std() - 1.0) < 0.05
    assert np.array_equal(noise(SEVERAL, 200)["text"], text)


def test_rounding_leaves_ids_alone() -> None:
    drawn = noise(SEVERAL)
    rounded = batch.cast(drawn, "float32", "float64")
    assert rounded["text"] is drawn["text"]
    assert np.array_equal(rounded["image"], drawn["image"].astype(np.float32).astype(np.float64))
    assert batch.cast(drawn["image"], "float32").dtype == np.float32


def test_targets_of_a_vector_are_classes_or_shares() -> None:
    classes = batch.checked_targets(IMAGES, np.array([0, 9, 3], np.int8), 3)
    assert (classes.dtype, classes.tolist()) == (np.int64, [0, 9, 3])
    shares = batch.checked_targets(IMAGES, np.full((3, 10), 0.1, np.float32), 3)
    assert (shares.dtype, shares.shape) == (np.float64, (3, 10))


def test_a_class_of_a_sample_holds_for_each_of_its_positions() -> None:
    assert batch.checked_targets(BLOCK, np.array([2, 5]), 2).tolist() == [[2] * 5, [5] * 5]
    each = np.arange(10).reshape(2, 5) % 6
    assert np.array_equal(batch.checked_targets(BLOCK, each, 2), each)


@pytest.mark.parametrize(
    ("spec", "targets", "message"),
    [
        (IMAGES, np.zeros(2, int), r"targets of shape \(2,\).*expected \(3,\) integers in \[0, 10\) or \(3, 10\) shares"),
        (IMAGES, np.zeros(3), "type float64"),
        (IMAGES, np.full(3, 10), "targets from 10 to 10 given"),
        (IMAGES, np.full((3, 10), 0.2), "shares that add up to one"),
        (BLOCK, np.full((3, 6), 1 / 6), r"expected \(3,\) integers in \[0, 6\), or one a position, \(3, 5\)"),
        (BLOCK, np.full((3, 5), 6), "targets from 6 to 6"),
    ],
)
def test_targets_that_do_not_fit_are_refused(spec: Spec, targets: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        batch.checked_targets(spec, targets, 3)
