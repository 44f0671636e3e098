"""From encoded images to normalized batches: `tf.io`, `tf.image`, `tf.data`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow as tf

from triptych.core.errors import InputRefused, UsageError
from triptych.core.preprocess import Geometry, geometry
from triptych.core.spec import Preprocessing

PNG = b"\x89PNG\r\n\x1a\n"


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """JPEG or PNG bytes -> (H, W, channels) uint8, the very pixels that Pillow and torchvision give (numerics 19).

    One channel is ITU-601 grey of the decoded colors. Raises UsageError for channels other than 1 or 3, InputRefused for bytes that
    are neither format or damaged.
    """
    if channels not in (1, 3):
        raise UsageError(f"channels={channels!r} given; an image has 1 (grey) or 3 (RGB)")
    try:
        with tf.device("CPU"):
            rgb = (decode_png if encoded.startswith(PNG) else decode_jpeg)(encoded).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise InputRefused(f"not a JPEG or PNG that TensorFlow can decode: {error.message}") from None
    return rgb if channels == 3 else grey(rgb)


def decode_jpeg(encoded: bytes) -> tf.Tensor:
    """(H, W, 3) uint8. The default DCT method is a fast one that is off by up to 21 levels."""
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def decode_png(encoded: bytes) -> tf.Tensor:
    """(H, W, 3) uint8; an alpha channel is dropped."""
    return tf.io.decode_png(encoded, channels=3)


def grey(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W, 1) uint8: 0.299 R + 0.587 G + 0.114 B in Pillow's 16-bit fixed point."""
    weighted = rgb.astype(np.uint32) @ np.array([19595, 38470, 7471], dtype=np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., np.newaxis]


def resize(image: np.ndarray, box: Geometry) -> np.ndarray:
    """(H, W, C) uint8 -> (crop, crop, C) float32 in [0, 255]: bilinear, antialiased, never rounded (numerics 20), then cropped."""
    with tf.device("CPU"):
        return resize_and_crop(tf.constant(image), box).numpy()


def preprocess(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(H, W, C) uint8 -> (crop, crop, C) float32: resized, cropped and normalized."""
    with tf.device("CPU"):
        return normalize(resize_and_crop(tf.constant(image), geometry(preprocessing, *image.shape[:2])), preprocessing).numpy()


def batches(
    images: np.ndarray, labels: np.ndarray, indices: Iterable[np.ndarray], preprocessing: Preprocessing
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The input pipeline of training: for each array of indices, the preprocessed float32 images (N, crop, crop, C) and their labels.

    `images` is (all, H, W, C) uint8; `tf.data` prepares the next batches while the model trains on this one.
    """
    box = geometry(preprocessing, *images.shape[1:3])
    with tf.device("CPU"):
        pixels, classes = tf.constant(images), tf.constant(labels)

        def load(chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return normalize(resize_and_crop(tf.gather(pixels, chosen), box), preprocessing), tf.gather(classes, chosen)

        signature = tf.TensorSpec([None], tf.int64)
        dataset = tf.data.Dataset.from_generator(lambda: iter(indices), output_signature=signature).map(load).prefetch(2)
    yield from dataset.as_numpy_iterator()


def resize_and_crop(images: tf.Tensor, box: Geometry) -> tf.Tensor:
    """([N,] H, W, C) uint8 -> ([N,] crop, crop, C) float32."""
    pixels = tf.cast(images, tf.float32)
    if pixels.shape[-3:-1] != (box.resized_height, box.resized_width):
        pixels = resize_bilinear(pixels, box.resized_height, box.resized_width)
    return pixels[..., box.top : box.top + box.crop, box.left : box.left + box.crop, :]


def resize_bilinear(pixels: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Bilinear with antialiasing, float32 in and out."""
    return tf.image.resize(pixels, (height, width), method="bilinear", antialias=True)


def normalize(pixels: tf.Tensor, preprocessing: Preprocessing) -> tf.Tensor:
    """(x / 255 - mean) / std by channel, in float32."""
    mean, std = (tf.constant(values, tf.float32) for values in (preprocessing.mean, preprocessing.std))
    return (pixels / 255.0 - mean) / std
