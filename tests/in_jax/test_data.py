"""Decoding, resizing and normalizing, against Pillow and against the formula."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.core import catalog, philox, preprocess
from triptych.core.errors import UsageError
from triptych.core.preprocess import Geometry


def picture(height: int = 97, width: int = 131, channels: int = 3) -> np.ndarray:
    """(H, W, C) uint8: noise over a gradient."""
    noise = philox.uniform("picture", (height, width, channels))
    return (155 * noise + 100 * np.linspace(0, 1, width)[:, None]).astype(np.uint8)


def encoded(image: np.ndarray, kind: str) -> bytes:
    """The image as a file of this kind."""
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(lab: Any, channels: int) -> None:
    image = picture(channels=channels)
    assert np.array_equal(lab.room.decode(encoded(image, "PNG"), channels), image)


def test_jpeg_is_pillow_s_and_grey_is_its_luma(lab: Any) -> None:
    file = encoded(picture() // 2 + 60, "JPEG")  # far from black and white, where RGB is cut off and luma is not
    with Image.open(io.BytesIO(file)) as opened:
        assert np.array_equal(lab.room.decode(file, 3), np.array(opened.convert("RGB")))
        luma = np.array(opened.convert("YCbCr"))[..., :1]
    assert np.abs(lab.room.decode(file, 1).astype(int) - luma).max() <= 1


def test_real_photographs_decode_as_in_pillow(lab: Any, real_data: Path) -> None:
    for file in sorted((real_data / "imagenet-samples").rglob("*.JPEG"))[::40]:
        with Image.open(file) as opened:
            assert np.array_equal(lab.room.decode(file.read_bytes(), 3), np.array(opened.convert("RGB"))), file.name


def test_other_channel_counts_are_refused(lab: Any) -> None:
    with pytest.raises(UsageError, match="channels=4"):
        lab.room.decode(b"", 4)
    with pytest.raises(UsageError, match="have 1 channels; the preprocessing takes 3"):
        lab.room.preprocess(picture(channels=1), catalog.CIFAR)


def antialiased(length: int, out: int) -> np.ndarray:
    """(out, length) weights of the triangle kernel, widened when shrinking, that PIL and torch use; float64."""
    ratio = length / out
    centres, width = (np.arange(out) + 0.5) * ratio, max(1.0, ratio)
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(length) + 0.5 - centres[:, None]) / width)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("height", "width"), [(97, 131), (256, 300), (20, 24)])
def test_resize_follows_the_antialiased_formula_and_is_not_rounded(lab: Any, height: int, width: int) -> None:
    image, box = picture(height, width), Geometry(40, 54, 4, 11, 32)
    found = lab.room.resize(image, box)
    wanted = np.einsum("oh,hwc,pw->opc", antialiased(height, 40), image, antialiased(width, 54))[4:36, 11:43]
    assert (found.shape, found.dtype) == ((32, 32, 3), np.float32)
    assert np.abs(found - wanted).max() < 0.01
    assert np.any(found != np.round(found))


def test_an_image_of_the_right_size_is_not_resampled(lab: Any) -> None:
    image = picture(40, 54)
    assert np.array_equal(lab.room.resize(image, Geometry(40, 54, 4, 11, 32)), image[4:36, 11:43])


def test_sizes_share_a_compiled_program(lab: Any) -> None:
    from triptych.in_jax import data

    data.resample.clear_cache()
    for height, width in ((97, 131), (250, 131), (256, 200)):
        lab.room.resize(picture(height, width), Geometry(40, 54, 4, 11, 32))
    assert data.resample._cache_size() == 1


@pytest.mark.parametrize("preprocessing", [catalog.IMAGENET, catalog.CIFAR])
def test_preprocess_is_resize_and_normalize_in_float32(lab: Any, preprocessing: Any) -> None:
    image = picture(300, 270)
    resized = lab.room.resize(image, preprocess.geometry(preprocessing, 300, 270))
    wanted = (resized / 255.0 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    found = lab.room.preprocess(image, preprocessing)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
