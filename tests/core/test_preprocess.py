"""Boxes by torchvision's arithmetic, and an order of samples that can be entered at any step."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.core import catalog, contract
from triptych.core.preprocess import Geometry, geometry
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
