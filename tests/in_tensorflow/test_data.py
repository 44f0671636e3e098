"""Decoding, resizing, normalizing and the input pipeline."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from triptych.core.errors import InputRefused, UsageError
from triptych.core.preprocess import Transforms, geometry
from triptych.core.sampling import SamplingPlan
from triptych.core.spec import Preprocessing
from triptych.data import Source


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """`pixels` as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """(45, 70, 3) uint8: waves and noise, which a careless decoder gets wrong."""
    y, x = np.mgrid[:45, :70]
    waves = np.stack([np.sin(x / 5 + y / 9), np.cos(x / 3), np.sin(y / 2)], -1) * 90 + 128
    return np.clip(waves + np.random.default_rng(0).normal(0, 25, waves.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 75}), ("JPEG", {"quality": 95, "subsampling": 0}), ("PNG", {})])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("color", [True, False])
def test_decoded_pixels_are_pillows(
    kind: str, options: dict[str, Any], channels: int, color: bool, room: Any, photograph: np.ndarray
) -> None:
    data = encoded(photograph if color else photograph[..., 0], kind, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"))
    decoded = room.decode(data, channels)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, expected.reshape(45, 70, channels))


def test_what_cannot_be_decoded_is_refused(room: Any, photograph: np.ndarray) -> None:
    with pytest.raises(InputRefused, match="not a JPEG or PNG"):
        room.decode(b"no image at all", 3)
    with pytest.raises(InputRefused, match="not a JPEG or PNG"):
        room.decode(encoded(photograph, "PNG")[:200], 3)
    with pytest.raises(UsageError, match="channels=4"):
        room.decode(encoded(photograph, "PNG"), 4)


def test_resize_agrees_with_pillow_before_rounding(room: Any, photograph: np.ndarray) -> None:
    box = geometry(Preprocessing(24, 16, (0.0,) * 3, (1.0,) * 3), *photograph.shape[:2])
    resized = room.resize(photograph, box)
    assert resized.shape == (16, 16, 3)
    assert resized.dtype == np.float32
    planes = [Image.fromarray(photograph[..., c].astype(np.float32)) for c in range(3)]
    pillow = np.stack([np.asarray(p.resize((box.resized_width, box.resized_height), Image.Resampling.BILINEAR)) for p in planes], -1)
    assert np.abs(resized - pillow[box.top : box.top + 16, box.left : box.left + 16]).max() < 0.05
    assert np.abs(resized - resized.round()).max() > 0.1


def test_an_image_of_the_right_size_is_only_normalized(room: Any, photograph: np.ndarray) -> None:
    preprocessing = Preprocessing(None, 45, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    square = photograph[:, :45]
    expected = (square / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    out = room.preprocess(square, preprocessing)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(room.resize(square, geometry(preprocessing, 45, 45)), square)


def test_real_photographs_decode_as_in_pillow(room: Any, real_data: Path) -> None:
    files = sorted(real_data.glob("imagenet-samples/images/*/*.JPEG"))[::20]
    assert files
    for file in files:
        expected = np.asarray(Image.open(file).convert("RGB"))
        np.testing.assert_array_equal(room.decode(file.read_bytes(), 3), expected, err_msg=file.name)


def test_the_pipeline_leaves_the_callers_random_stream_alone(room: Any) -> None:
    tf.random.set_seed(3)
    drawn = [tf.random.uniform((2,)).numpy() for _ in range(2)]
    tf.random.set_seed(3)
    np.testing.assert_array_equal(tf.random.uniform((2,)).numpy(), drawn[0])
    transforms = Transforms(pad_crop=2, flip=0.5, mixup=0.2)
    source = Source("grey", "train", ("0", "1"), np.arange(4) % 2, np.zeros((4, 8, 8, 1), np.uint8), ["a", "b", "c", "d"])
    plan = SamplingPlan(source.labels, 2, 2, 0, transforms, 8)
    assert len(list(room.batches(source, plan.batches(0, 2), Preprocessing(None, 8, (0.5,), (0.5,)), transforms))) == 2
    np.testing.assert_array_equal(tf.random.uniform((2,)).numpy(), drawn[1])
