"""Images in JAX: decoded by Pillow (JAX has no decoder of its own), transformed by XLA in float32; a pipeline executes a sampling plan.

Images of one array are transformed a batch at a time. Files are read, decoded and resized by threads of grain, the input pipeline
that JAX's documentation names: it is deterministic, keeps the order whatever the number of threads, and needs no TensorFlow. Threads, not
processes, because Pillow and XLA release Python's lock, and a process with XLA's own threads must not be forked.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from PIL import Image

from triptych.core.contract import DEFAULT_LOADER, Loader
from triptych.core.errors import FrameworkMissing, UsageError
from triptych.core.preprocess import GREY, Draw, Geometry, Transforms, draw, geometry
from triptych.core.sampling import Batch
from triptych.core.spec import Preprocessing
from triptych.data import Source
from triptych.data.reader import Reader

MODES = {1: "L", 3: "RGB"}
# Photographs are padded to multiples of this before they are resized.
CANVAS = 256

Arrays = dict[str, Any]
Made = tuple[np.ndarray, np.ndarray]


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
        precision=lax.Precision.HIGHEST,
    )
    return out[..., :-1] / out[..., -1:]


@functools.partial(jax.jit, static_argnames="preprocessing")
def normalize(image: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """(..., C) float32 in [0, 255] -> (x / 255 - mean) / std, each operation rounded as IEEE 754 says; not for use under `vmap`."""
    values = (np.asarray(row, np.float32) for row in (255.0, preprocessing.mean, preprocessing.std))
    # Where XLA sees one divisor for many elements it multiplies by the rounded reciprocal: two units in the last place off, which
    # a float64 run would take for a difference of 1e-8. Behind the barrier every element has a divisor of its own.
    levels, mean, std = (lax.optimization_barrier(jnp.broadcast_to(value, image.shape)) for value in values)
    return (image / levels - mean) / std


def preprocess(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(H, W, C) uint8 -> (crop, crop, C) float32, resized, cropped and normalized. UsageError for another number of channels."""
    _check_channels(image, preprocessing)
    cropped = resize(image, geometry(preprocessing, *image.shape[:2]))
    with jax.enable_x64(False):
        return np.array(normalize(cropped, preprocessing))


# --- The pipeline -----------------------------------------------------------------------------------------------------------------


def batches(
    source: Source, plan: Iterable[Batch], preprocessing: Preprocessing, transforms: Transforms, loader: Loader = DEFAULT_LOADER
) -> Iterator[Made]:
    """The input pipeline: for each batch of the plan, float32 images (N, crop, crop, C) and their targets.

    Images in one array are transformed by one program, a batch at a time; JAX dispatches it asynchronously, so that batch k + 1 is
    prepared while the caller works on batch k, and `loader` has nothing to add. Files are streamed through Grain: its threads read and
    decode several batches at once (Pillow and XLA release the lock of Python), it bounds how far they run ahead, and it gives the
    batches back in the plan's order. Raises InputRefused for a file that is refused, StorageError for a cache that cannot be written,
    FrameworkMissing where there are files and no Grain.
    """
    if isinstance(source.images, np.ndarray):
        return in_memory(source.images, plan, preprocessing, transforms)
    return from_files(source, plan, preprocessing, transforms, loader)


def in_memory(images: np.ndarray, plan: Iterable[Batch], preprocessing: Preprocessing, transforms: Transforms) -> Iterator[Made]:
    """The batches of (M, H, W, C) uint8 images."""
    _check_channels(images, preprocessing)
    height, width = images.shape[1:3]
    check_padding(transforms, height, width)

    # Compiled anew for each call, so that a function that has been replaced meanwhile is seen.
    @functools.partial(jax.jit, static_argnames="count")
    def prepare(pixels: jax.Array, drawn: Arrays, mix: Arrays, *, count: int) -> jax.Array:
        cropped = crop_batch(pixels, drawn.get("window"), preprocessing, transforms)
        return augment(cropped, drawn, mix, preprocessing=preprocessing, count=count)

    pending: tuple[jax.Array, np.ndarray] | None = None
    for batch in plan:
        drawn = draw(transforms, batch.words, height, width, preprocessing.crop).parts()
        with jax.enable_x64(False):
            upcoming = prepare(images[batch.indices], drawn, mix_of(batch), count=len(batch.targets)), batch.targets
        if pending is not None:
            yield np.array(pending[0]), pending[1]
        pending = upcoming
    if pending is not None:
        yield np.array(pending[0]), pending[1]


def from_files(
    source: Source, plan: Iterable[Batch], preprocessing: Preprocessing, transforms: Transforms, loader: Loader
) -> Iterator[Made]:
    """The batches of a source of files: image by image read, decoded, cropped and resized, then augmented together."""
    reader = Reader(source, preprocessing.channels, decode, loader.cache)
    finish = jax.jit(functools.partial(augment, preprocessing=preprocessing), static_argnames="count")

    def make(batch: Batch) -> Made:
        images, sizes = zip(*(reader.read(int(index)) for index in batch.indices), strict=True)
        heights, widths = np.array(sizes).T
        drawn = draw(transforms, batch.words, heights, widths, preprocessing.crop)
        cropped = np.stack([crop_file(image, drawn.row(i), preprocessing, transforms) for i, image in enumerate(images)])
        with jax.enable_x64(False):
            return np.array(finish(cropped, drawn.parts(), mix_of(batch), count=len(batch.targets))), batch.targets

    yield from streamed(make, plan, loader)


def streamed(make: Callable[[Batch], Made], plan: Iterable[Batch], loader: Loader) -> Iterator[Made]:
    """`make` of each batch of the plan, in its order, by Grain's threads."""
    grain = import_grain()
    workers = min(4, os.cpu_count() or 1) if loader.workers is None else loader.workers
    ahead = workers * max(1, loader.prefetch)
    dataset = grain.MapDataset.source(NumberedPlan(plan)).map(lambda found: tuple(map(make, found)))
    stream = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead)))
    try:
        yield from itertools.chain.from_iterable(itertools.takewhile(bool, stream))
    finally:
        stream.close()


def import_grain() -> Any:
    """Grain, which only those need who train on files."""
    try:
        import grain
    except ImportError:
        raise FrameworkMissing("JAX reads image files through grain, which is not installed: pip install 'triptych[jax]'") from None
    return grain


class NumberedPlan:
    """The batches of a plan by number, for threads that ask for them nearly in order: each in a tuple, which is empty behind the last.

    Grain wants to know how many there are, and a plan may be endless; None, Grain would take for an element to be skipped.
    """

    def __init__(self, plan: Iterable[Batch]) -> None:
        self._plan, self._lock = iter(plan), threading.Lock()
        self._waiting: dict[int, Batch] = {}
        self._taken = 0
        self._failure: Exception | None = None

    def __len__(self) -> int:
        """More than there are."""
        return sys.maxsize

    def __getitem__(self, number: int) -> tuple[Batch, ...]:
        """Batch `number`, once. Raises what the plan raised in place of it."""
        with self._lock:
            while self._taken <= number and self._failure is None:
                self._take()
            if number in self._waiting:
                return (self._waiting.pop(number),)
            if isinstance(self._failure, StopIteration):
                return ()
            raise self._failure or IndexError(f"batch {number} was taken before")

    def _take(self) -> None:
        try:
            self._waiting[self._taken] = next(self._plan)
            self._taken += 1
        except Exception as failure:
            self._failure = failure


def mix_of(batch: Batch) -> Arrays:
    """How a batch is mixed, as arrays of the same shapes for MixUp and CutMix; empty where it is not."""
    if batch.mix is None:
        return {}
    box = np.array(batch.mix.box or (0, 0, 0, 0), np.int32)
    return {
        "share": np.float32(batch.mix.share),
        "partner": batch.mix.partner.astype(np.int32),
        "pastes": np.bool_(batch.mix.box is not None),
        "box": box,
    }


def check_padding(transforms: Transforms, height: int, width: int) -> None:
    """UsageError unless an image has the pixels that `pad_crop` reflects."""
    if transforms.pad_crop >= min(height, width):
        raise UsageError(f"pad_crop={transforms.pad_crop} reflects more than there is of an image of {height} x {width} pixels")


def crop_file(encoded: bytes | np.ndarray, drawn: Draw, preprocessing: Preprocessing, transforms: Transforms) -> np.ndarray:
    """JPEG or PNG bytes or (H, W, C) uint8 -> (crop, crop, C) float32: the window drawn for one image, or as in evaluation."""
    image = decode(encoded, preprocessing.channels) if isinstance(encoded, bytes) else encoded
    _check_channels(image, preprocessing)
    height, width = image.shape[:2]
    check_padding(transforms, height, width)
    if drawn.window is None:
        return resize(image, geometry(preprocessing, height, width))
    top, left, height, width = drawn.window[0]
    padding, crop = (transforms.pad_crop,) * 2, preprocessing.crop
    padded = np.pad(image, (padding, padding, (0, 0)), "reflect")
    return resize(padded[top : top + height, left : left + width], Geometry(crop, crop, 0, 0, crop))


def crop_batch(images: jax.Array, windows: jax.Array | None, preprocessing: Preprocessing, transforms: Transforms) -> jax.Array:
    """(N, H, W, C) uint8 -> (N, crop, crop, C) float32 in [0, 255]: of each image its window (N, 4), or as in evaluation.

    Windows that have the crop's size already are cut, not resampled.
    """
    height, width = images.shape[1:3]
    crop, padding = preprocessing.crop, transforms.pad_crop
    if windows is None:
        return jax.vmap(functools.partial(_crop_centre, box=geometry(preprocessing, height, width)))(images)
    canvas = (min(height, width),) * 2 if padding else (height, width)
    cut = jax.vmap(functools.partial(cut_window, canvas=canvas, padding=padding))(images, windows)
    if padding and canvas == (crop, crop):
        return cut.astype(jnp.float32)
    whole, corner = np.full(2, crop, np.float32), np.zeros(2, np.float32)
    sizes = windows[:, 2:].astype(jnp.float32)
    return jax.vmap(lambda image, size: resample(image, size, whole, corner, crop=crop))(cut, sizes)


def _crop_centre(image: jax.Array, box: Geometry) -> jax.Array:
    """(H, W, C) uint8 -> (crop, crop, C) float32 in [0, 255]; images of one batch share their size, which is the canvas."""
    height, width = image.shape[:2]
    if (height, width) != (box.resized_height, box.resized_width):
        return resample(image, *_numbers(box, height, width), crop=box.crop)
    return image[box.top : box.top + box.crop, box.left : box.left + box.crop].astype(jnp.float32)


def cut_window(image: jax.Array, window: jax.Array, *, canvas: tuple[int, int], padding: int) -> jax.Array:
    """(H, W, C) -> (*canvas, C): the image padded by reflection, from the window's upper left corner on.

    One gather of pixels: the padding need not exist. What of the canvas is not the window is anything.
    """
    rows, columns = (reflection(window[i] + jnp.arange(canvas[i]) - padding, image.shape[i]) for i in (0, 1))
    return image[rows[:, None], columns]


def reflection(positions: jax.Array, size: int) -> jax.Array:
    """Positions up to size - 1 beyond an edge -> those they mirror, the edge itself not repeated."""
    return (size - 1) - jnp.abs((size - 1) - jnp.abs(positions))


# --- Transforms of a batch --------------------------------------------------------------------------------------------------------


def augment(pixels: jax.Array, drawn: Arrays, mix: Arrays, *, preprocessing: Preprocessing, count: int) -> jax.Array:
    """(M, crop, crop, C) float32 in [0, 255] -> flipped, jittered, normalized, erased, mixed, as was drawn; the first `count`."""
    if "flip" in drawn:
        pixels = jnp.where(drawn["flip"][:, None, None, None], pixels[:, :, ::-1], pixels)
    if "jitter" in drawn:
        pixels = jitter(pixels, drawn["jitter"], drawn["order"])
    images = normalize(pixels, preprocessing)
    if "erase" in drawn:
        images = jnp.where(jax.vmap(functools.partial(inside, side=images.shape[1]))(drawn["erase"]), 0.0, images)
    return mixed(images, mix, count) if mix else images[:count]


def jitter(pixels: jax.Array, amounts: jax.Array, order: jax.Array) -> jax.Array:
    """Colour jitter by `core.preprocess.ColorJitter`'s formulas: `amounts` (N, 4), in the `order` (N, 4) of each image.

    Image after image: under `vmap` each image would go through all four operations at each of the four places.
    """
    steps = (brightness, contrast, saturation, hue) if pixels.shape[-1] == 3 else (brightness, contrast, unchanged, unchanged)

    def one(given: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        image, factors, places = given
        for i in range(len(steps)):
            image = jnp.clip(lax.switch(places[i], steps, image, factors[places[i]]), 0.0, 255.0)
        return image

    return lax.map(one, (pixels, amounts, order))


def brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """f x; (H, W, C) and a scalar, as the other steps."""
    return factor * image


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """f x + (1 - f) m, m the mean of the grey image."""
    return factor * image + (1.0 - factor) * luma(image).mean()


def saturation(image: jax.Array, factor: jax.Array) -> jax.Array:
    """f x + (1 - f) grey."""
    return factor * image + (1.0 - factor) * luma(image)


def hue(image: jax.Array, shift: jax.Array) -> jax.Array:
    """The hue turned by `shift` turns: RGB to HSV and back (Smith 1978), chroma and value in place of saturation and value."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = image.max(-1)
    chroma = value - image.min(-1)
    divisor = jnp.where(chroma == 0.0, 1.0, chroma)
    sextant = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )
    turned = [(sextant + 6.0 * shift + offset) % 6.0 for offset in (5.0, 3.0, 1.0)]
    return jnp.stack([value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0) for k in turned], -1)


def unchanged(image: jax.Array, amount: jax.Array) -> jax.Array:
    """What saturation and hue do to grey images."""
    return image


def luma(image: jax.Array) -> jax.Array:
    """(H, W, C) -> (H, W, 1) ITU-R 601 grey, not rounded."""
    return (image * jnp.asarray(GREY)).sum(-1, keepdims=True) if image.shape[-1] == 3 else image


def mixed(images: jax.Array, mix: Arrays, count: int) -> jax.Array:
    """The first `count` images of a batch, by MixUp or CutMix with their partners among all of it."""
    own, partners, share = images[:count], images[mix["partner"]], mix["share"]
    pasted = inside(mix["box"], side=images.shape[1])
    return lax.cond(
        mix["pastes"],
        lambda: jnp.where(pasted, partners, own),
        lambda: share * own + (1.0 - share) * partners,
    )


def inside(box: jax.Array, side: int) -> jax.Array:
    """A box (top, left, height, width) -> (side, side, 1), whether a pixel is in it."""
    position = jnp.arange(side)
    rows, columns = ((position >= box[i]) & (position < box[i] + box[i + 2]) for i in (0, 1))
    return (rows[:, None] & columns)[..., None]


def _check_channels(images: np.ndarray, preprocessing: Preprocessing) -> None:
    given, takes = images.shape[-1], preprocessing.channels
    if given != takes:
        raise UsageError(f"images of shape {images.shape} have {given} channels; the preprocessing takes {takes}")
