"""Images in JAX: decoded by Pillow (JAX has no decoder of its own), resized and normalized by XLA, always in float32."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from triptych.core.errors import UsageError
from triptych.core.preprocess import Geometry, geometry
from triptych.core.spec import Preprocessing

MODES = {1: "L", 3: "RGB"}
# Photographs are padded to multiples of this before they are resized.
CANVAS = 256


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """JPEG or PNG bytes, already vetted by `data.images`, -> (H, W, C) uint8. UsageError unless `channels` is 1 or 3."""
    if channels not in MODES:
        raise UsageError(f"channels={channels}; images are decoded to 1 (grey) or 3 (RGB) channels")
    image = Image.open(io.BytesIO(encoded))
    image.draft(MODES[channels], image.size)  # a grey JPEG is its Y channel, as in libjpeg, not a mean of rounded RGB
    return np.array(image.convert(MODES[channels])).reshape(image.height, image.width, channels)


def resize(image: np.ndarray, box: Geometry) -> np.ndarray:
    """(H, W, C) uint8 -> resized and cropped (crop, crop, C) float32 in [0, 255], never rounded (numerics 20).

    The image is laid on a canvas of a coarser size: XLA compiles once a canvas, not once a size of photograph.
    """
    height, width = image.shape[:2]
    if (height, width) == (box.resized_height, box.resized_width):
        return image[box.top : box.top + box.crop, box.left : box.left + box.crop].astype(np.float32)
    canvas = np.pad(image, ((0, -height % CANVAS), (0, -width % CANVAS), (0, 0)))
    with jax.enable_x64(False):
        return np.array(resample(canvas, *_numbers(box, height, width), crop=box.crop))


def _numbers(box: Geometry, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(size, resized size, corner of the crop), each (vertical, horizontal) float32."""
    pairs = ((height, width), (box.resized_height, box.resized_width), (box.top, box.left))
    size, resized, corner = (np.array(pair, np.float32) for pair in pairs)
    return size, resized, corner


@functools.partial(jax.jit, static_argnames=("crop", "antialias"))
def resample(canvas: jax.Array, size: jax.Array, resized: jax.Array, corner: jax.Array, *, crop: int, antialias: bool = True) -> jax.Array:
    """The `size` upper left pixels of a canvas (H, W, C), resized to `resized`, cut at `corner` -> (crop, crop, C) float32.

    Bilinear and antialiased. At the image's edges the kernel's weight inside the image must be one: a channel of ones, which
    ends where the image ends, is resampled along and divided by.
    """
    rows, columns = (jnp.arange(length) for length in canvas.shape[:2])
    inside = ((rows < size[0])[:, None] & (columns < size[1]))[..., None].astype(jnp.float32)
    out = jax.image.scale_and_translate(
        jnp.concatenate([canvas.astype(jnp.float32) * inside, inside], axis=-1),
        (crop, crop, canvas.shape[-1] + 1),
        (0, 1),
        resized / size,
        -corner,
        method="linear",
        antialias=antialias,
        precision=jax.lax.Precision.HIGHEST,
    )
    return out[..., :-1] / out[..., -1:]


@functools.partial(jax.jit, static_argnames="preprocessing")
def normalize(image: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """(..., C) float32 in [0, 255] -> (x / 255 - mean) / std, each operation rounded as IEEE 754 says; not for use under `vmap`."""
    values = (np.asarray(row, np.float32) for row in (255.0, preprocessing.mean, preprocessing.std))
    # Where XLA sees one divisor for many elements it multiplies by the rounded reciprocal: two units in the last place off, which
    # a float64 run would take for a difference of 1e-8. Behind the barrier every element has a divisor of its own.
    levels, mean, std = (jax.lax.optimization_barrier(jnp.broadcast_to(value, image.shape)) for value in values)
    return (image / levels - mean) / std


def preprocess(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(H, W, C) uint8 -> (crop, crop, C) float32, resized, cropped and normalized. UsageError for another number of channels."""
    _check_channels(image, preprocessing)
    cropped = resize(image, geometry(preprocessing, *image.shape[:2]))
    with jax.enable_x64(False):
        return np.array(normalize(cropped, preprocessing))


def batches(
    images: np.ndarray, labels: np.ndarray, indices: Iterable[np.ndarray], preprocessing: Preprocessing
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The input pipeline: (M, H, W, C) uint8 images, and the indices of each batch -> (images (N, crop, crop, C) float32, labels).

    JAX dispatches asynchronously: batch k + 1 is prepared while the caller works on batch k.
    """
    _check_channels(images, preprocessing)
    prepare = jax.jit(jax.vmap(functools.partial(_prepare, preprocessing=preprocessing)))
    pending: tuple[jax.Array, np.ndarray] | None = None
    for chosen in indices:
        with jax.enable_x64(False):
            upcoming = normalize(prepare(images[chosen]), preprocessing), labels[chosen]
        if pending is not None:
            yield np.array(pending[0]), pending[1]
        pending = upcoming
    if pending is not None:
        yield np.array(pending[0]), pending[1]


def _prepare(image: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """(H, W, C) uint8 -> (crop, crop, C) float32 in [0, 255]; images of one batch share their size, which is the canvas."""
    height, width = image.shape[:2]
    box = geometry(preprocessing, height, width)
    if (height, width) != (box.resized_height, box.resized_width):
        return resample(image, *_numbers(box, height, width), crop=box.crop)
    return image[box.top : box.top + box.crop, box.left : box.left + box.crop].astype(jnp.float32)


def _check_channels(images: np.ndarray, preprocessing: Preprocessing) -> None:
    given, takes = images.shape[-1], preprocessing.channels
    if given != takes:
        raise UsageError(f"images of shape {images.shape} have {given} channels; the preprocessing takes {takes}")
