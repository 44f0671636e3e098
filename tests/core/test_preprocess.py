"""Boxes by torchvision's arithmetic, and an order of samples that can be entered at any step."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.core import catalog, contract
from triptych.core.preprocess import Geometry, batch_indices, epoch_order, geometry
from triptych.core.spec import Preprocessing

sizes = st.integers(1, 5000)


def recipe(short: int | None, crop: int) -> Preprocessing:
    """A preprocessing of this geometry."""
    return dataclasses.replace(catalog.IMAGENET, resize_short_side=short, crop=crop)


def torchvision_resized(height: int, width: int, size: int) -> tuple[int, int]:
    """`_compute_resized_output_size` of torchvision.transforms.functional (0.29), for an integer `size`."""
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    new_width, new_height = (new_short, new_long) if width <= height else (new_long, new_short)
    return new_height, new_width


def torchvision_centre(height: int, width: int, crop: int) -> tuple[int, int]:
    """Top and left of torchvision's `center_crop`, for an image at least as large as the crop."""
    return round((height - crop) / 2.0), round((width - crop) / 2.0)


@given(sizes, sizes, st.integers(1, 600), st.integers(0, 100))
def test_geometry_is_torchvisions(height: int, width: int, crop: int, margin: int) -> None:
    box = geometry(recipe(crop + margin, crop), height, width)
    assert (box.resized_height, box.resized_width) == torchvision_resized(height, width, crop + margin)
    assert (box.top, box.left) == torchvision_centre(box.resized_height, box.resized_width, crop)


@given(sizes, sizes, st.integers(1, 600), st.integers(0, 100))
def test_the_crop_lies_inside_the_resized_image(height: int, width: int, crop: int, margin: int) -> None:
    box = geometry(recipe(crop + margin, crop), height, width)
    assert 0 <= box.top <= box.resized_height - crop
    assert 0 <= box.left <= box.resized_width - crop
    assert min(box.resized_height, box.resized_width) == crop + margin


@given(sizes, sizes)
def test_turning_the_image_turns_the_box(height: int, width: int) -> None:
    box, turned = geometry(catalog.IMAGENET, height, width), geometry(catalog.IMAGENET, width, height)
    assert box == Geometry(turned.resized_width, turned.resized_height, turned.left, turned.top, 224)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (256, 256, Geometry(256, 256, 16, 16, 224)),
        (375, 500, Geometry(256, 341, 16, 58, 224)),  # 341.33 truncated; 58.5 rounds to the even 58
        (500, 375, Geometry(341, 256, 58, 16, 224)),
        (333, 500, Geometry(256, 384, 16, 80, 224)),
        (1, 1, Geometry(256, 256, 16, 16, 224)),
    ],
)
def test_geometry_by_hand(height: int, width: int, expected: Geometry) -> None:
    assert geometry(catalog.IMAGENET, height, width) == expected


def test_geometry_is_what_torchvision_does() -> None:
    """Against the library itself, where it is installed: sizes after its own Resize and the pixels its CenterCrop keeps."""
    if "pytorch" not in contract.installed():
        pytest.skip("torchvision is not installed")
    contract.load("pytorch")  # before torchvision, in an order that is safe
    import torch
    from torchvision.transforms import functional

    for height, width in [(375, 500), (500, 333), (257, 301), (64, 48), (31, 97)]:
        box = geometry(recipe(36, 32), height, width)
        resized = functional.resize(torch.zeros(1, height, width), [36], antialias=True)
        assert tuple(resized.shape[1:]) == (box.resized_height, box.resized_width)
        rows, columns = torch.meshgrid(*map(torch.arange, resized.shape[1:]), indexing="ij")
        kept = functional.center_crop(torch.stack([rows, columns]), [32])
        assert kept[:, 0, 0].tolist() == [box.top, box.left]


@given(st.integers(1, 64), st.integers(1, 300))
def test_without_a_short_side_the_crop_is_the_short_side(crop: int, longer: int) -> None:
    box = geometry(recipe(None, crop), crop, crop + longer)
    assert (box.resized_height, box.resized_width) == (crop, crop + longer)
    assert box.top == 0
    assert geometry(recipe(None, crop), 2 * crop, 2 * crop) == Geometry(crop, crop, 0, 0, crop)


def drawn(**arguments: Any) -> list[list[int]]:
    """The batches of a plan, as lists."""
    return [batch.tolist() for batch in batch_indices(**arguments)]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_every_sample_comes_at_most_once_an_epoch(size: int, batch_size: int, seed: int) -> None:
    batch_size = min(batch_size, size)
    per_epoch = size // batch_size
    batches = drawn(seed=seed, size=size, batch_size=batch_size, steps=3 * per_epoch)
    assert {len(batch) for batch in batches} == {batch_size}
    for epoch in range(3):
        seen = sorted(itertools.chain(*batches[epoch * per_epoch : (epoch + 1) * per_epoch]))
        assert seen == sorted(set(seen))
        assert set(seen) <= set(range(size))
        assert len(seen) == per_epoch * batch_size  # all of them when the batches come out even


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 40), st.integers(0, 40))
def test_a_run_can_resume_at_any_step(size: int, batch_size: int, first: int, more: int) -> None:
    batch_size = min(batch_size, size)
    whole = drawn(seed=1, size=size, batch_size=batch_size, steps=first + more)
    assert drawn(seed=1, size=size, batch_size=batch_size, steps=first + more, first_step=first) == whole[first:]


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = [epoch_order(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(0, 0, 50).tolist() == orders[0]
    # Golden: a run of today must be resumed by tomorrow's version.
    assert epoch_order(0, 0, 8).tolist() == [1, 0, 5, 3, 6, 2, 4, 7]


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 9 needs at least as many samples; there are 8"):
        next(batch_indices(0, 8, 9, 1))


def test_indices_are_int64() -> None:
    assert next(batch_indices(0, 8, 4, 1)).dtype == np.int64
