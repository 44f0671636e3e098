"""Decoding, resizing and batches, against Pillow and against arithmetic."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.core import catalog
from triptych.core.errors import InputRefused, UsageError
from triptych.core.preprocess import Geometry, geometry


def picture(height: int = 97, width: int = 131, channels: int = 3) -> np.ndarray:
    """Smooth waves with noise on top, (H, W, C) uint8."""
    y, x, c = np.mgrid[:height, :width, :channels]
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 40, y.shape)
    return (100 + 60 * np.sin(x / 7 + c) * np.cos(y / 11) + noise).astype(np.uint8)


def encoded(image: np.ndarray, kind: str, **options: Any) -> bytes:
    """The picture as a JPEG or PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{"quality": 75}, {"quality": 95, "subsampling": 0}, {"quality": 60, "progressive": True}])
def test_jpeg_pixels_are_pillow_s(lab: Any, options: dict[str, Any]) -> None:
    data = encoded(picture(), "JPEG", **options)
    assert np.array_equal(lab.room.decode(data, 3), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(lab: Any, channels: int) -> None:
    image = picture(channels=channels)
    decoded = lab.room.decode(encoded(image, "PNG"), channels)
    assert decoded.flags.c_contiguous
    assert np.array_equal(decoded, image)


def test_real_jpegs_decode_to_pillow_s_pixels(lab: Any, real_data: Path) -> None:
    files = sorted((real_data / "imagenet-samples").rglob("*.JPEG"))[::20]
    assert files
    for file in files:
        data = file.read_bytes()
        with Image.open(file) as image:
            if image.mode != "CMYK":
                assert np.array_equal(lab.room.decode(data, 3), np.asarray(image.convert("RGB"))), file.name


def test_what_does_not_decode_is_refused(lab: Any) -> None:
    with pytest.raises(InputRefused, match="cannot decode these 9 bytes"):
        lab.room.decode(b"not image", 3)
    with pytest.raises(UsageError, match="channels=4"):
        lab.room.decode(encoded(picture(), "PNG"), 4)
    with pytest.raises(InputRefused, match="uint16"):
        lab.room.decode(encoded(np.full((4, 4), 40_000, np.uint16), "PNG"), 1)


def antialiased(length: int, out: int) -> np.ndarray:
    """(out, length) weights of bilinear resampling whose triangle widens with the scale."""
    scale = length / out
    centres, width = (np.arange(out) + 0.5) * scale, max(scale, 1.0)
    weights = np.maximum(0.0, 1.0 - np.abs((np.arange(length) + 0.5)[None] - centres[:, None]) / width)
    return weights / weights.sum(1, keepdims=True)


def test_resize_follows_the_antialiased_formula_and_is_not_rounded(lab: Any) -> None:
    image = picture()
    resized = lab.room.resize(image, Geometry(40, 54, 4, 11, 32))
    expected = np.einsum("ih,jw,hwc->ijc", antialiased(97, 40), antialiased(131, 54), image.astype(np.float64))
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected[4:36, 11:43], atol=1e-3)
    assert np.abs(resized - resized.round()).max() > 0.4


def test_an_image_of_the_right_size_is_not_resampled(lab: Any) -> None:
    image = picture(32, 40)
    preprocessing = catalog.get_spec("resnet20").preprocessing
    resized = lab.room.resize(image, geometry(preprocessing, 32, 40))
    assert np.array_equal(resized, image[:, 4:36].astype(np.float32))


@pytest.mark.parametrize("name", ["resnet50", "resnet20", "mlp"])
def test_preprocess_is_resize_and_normalize_in_float32(lab: Any, name: str) -> None:
    preprocessing = catalog.get_spec(name).preprocessing
    preprocessing = catalog.get_spec(name, image_size=32).preprocessing if name == "mlp" else preprocessing
    image = picture(channels=preprocessing.channels)
    mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
    expected = (lab.room.resize(image, geometry(preprocessing, 97, 131)) / np.float32(255) - mean) / std
    out = lab.room.preprocess(image, preprocessing)
    assert out.shape == (preprocessing.crop, preprocessing.crop, preprocessing.channels)
    assert np.array_equal(out, expected)
