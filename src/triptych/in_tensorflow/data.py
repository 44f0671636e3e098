"""From encoded images to normalized batches: `tf.io`, `tf.image`, and a `tf.data` pipeline that executes a sampling plan."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from triptych.core.contract import DEFAULT_LOADER, Loader
from triptych.core.errors import InputRefused, UsageError
from triptych.core.preprocess import DRAWN, GREY, WORDS, Geometry, Transforms, draw, geometry
from triptych.core.sampling import Batch
from triptych.core.spec import Preprocessing
from triptych.data import Source
from triptych.data.reader import Reader

PNG = b"\x89PNG\r\n\x1a\n"

Tensors = dict[str, tf.Tensor]
Load = Callable[[Tensors], tuple[tf.Tensor, Tensors]]


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """JPEG or PNG bytes -> (H, W, channels) uint8, the very pixels that Pillow and torchvision give (numerics 19).

    One channel is ITU-601 grey of the decoded colors. Raises UsageError for channels other than 1 or 3, InputRefused for bytes that
    are neither format or damaged.
    """
    if channels not in (1, 3):
        raise UsageError(f"channels={channels!r} given; an image has 1 (grey) or 3 (RGB)")
    try:
        with tf.device("CPU"):
            return decode_image(tf.constant(encoded), channels).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise InputRefused(f"not a JPEG or PNG that TensorFlow can decode: {error.message}") from None


def decode_image(encoded: tf.Tensor, channels: int) -> tf.Tensor:
    """A string tensor -> (H, W, channels) uint8."""
    is_png = tf.strings.substr(encoded, 0, len(PNG)) == PNG
    rgb = tf.cond(is_png, lambda: decode_png(encoded), lambda: decode_jpeg(encoded))
    return rgb if channels == 3 else grey(rgb)


def decode_jpeg(encoded: tf.Tensor) -> tf.Tensor:
    """(H, W, 3) uint8. The default DCT method is a fast one that is off by up to 21 levels."""
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def decode_png(encoded: tf.Tensor) -> tf.Tensor:
    """(H, W, 3) uint8; an alpha channel is dropped."""
    return tf.io.decode_png(encoded, channels=3)


def grey(rgb: tf.Tensor) -> tf.Tensor:
    """(H, W, 3) -> (H, W, 1) uint8: 0.299 R + 0.587 G + 0.114 B in Pillow's 16-bit fixed point."""
    weighted = tf.reduce_sum(tf.cast(rgb, tf.int32) * tf.constant([19595, 38470, 7471]), axis=-1, keepdims=True)
    return tf.cast((weighted + 0x8000) // 0x10000, tf.uint8)


def resize(image: np.ndarray, box: Geometry) -> np.ndarray:
    """(H, W, C) uint8 -> (crop, crop, C) float32 in [0, 255]: bilinear, antialiased, never rounded (numerics 20), then cropped."""
    with tf.device("CPU"):
        return resize_and_crop(tf.constant(image), box).numpy()


def preprocess(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(H, W, C) uint8 -> (crop, crop, C) float32: resized, cropped and normalized."""
    with tf.device("CPU"):
        return normalize(resize_and_crop(tf.constant(image), geometry(preprocessing, *image.shape[:2])), preprocessing).numpy()


def resize_and_crop(images: tf.Tensor, box: Geometry) -> tf.Tensor:
    """([N,] H, W, C) uint8 -> ([N,] crop, crop, C) float32."""
    pixels = tf.cast(images, tf.float32)
    if pixels.shape[-3:-1] != (box.resized_height, box.resized_width):
        pixels = resize_bilinear(pixels, box.resized_height, box.resized_width)
    return pixels[..., box.top : box.top + box.crop, box.left : box.left + box.crop, :]


def resize_bilinear(pixels: tf.Tensor, height: Any, width: Any) -> tf.Tensor:
    """Bilinear with antialiasing, float32 in and out."""
    return tf.image.resize(pixels, (height, width), method="bilinear", antialias=True)


def normalize(pixels: tf.Tensor, preprocessing: Preprocessing) -> tf.Tensor:
    """([N,] H, W, C): (x / 255 - mean) / std by channel, in float32."""
    *outer, width, channels = tf.unstack(tf.shape(pixels))
    # Row by row of W C values: a last axis of three is slow to broadcast over.
    mean, std = (tf.tile(tf.constant(values, tf.float32), [width]) for values in (preprocessing.mean, preprocessing.std))
    rows = tf.reshape(pixels, [*outer, width * channels])
    return tf.reshape((rows / 255.0 - mean) / std, tf.shape(pixels))


# --- The pipeline -----------------------------------------------------------------------------------------------------------------


def batches(
    source: Source, plan: Iterable[Batch], preprocessing: Preprocessing, transforms: Transforms, loader: Loader = DEFAULT_LOADER
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The input pipeline: for each batch of the plan, float32 images (N, crop, crop, C) and their targets.

    The graph of `tf.data` transforms images in one array a batch at a time, and reads and decodes files as they are asked for, several
    batches in parallel: `loader.workers`, by default as many as TensorFlow finds useful; they come out in the plan's order.
    Raises InputRefused for a file that is refused, StorageError for a cache that cannot be written.
    """
    rest = iter(plan)
    first = next(rest, None)
    if first is None:
        return
    whole = isinstance(source.images, np.ndarray)
    made = functools.partial(drawn_element, np.asarray(source.images), preprocessing, transforms) if whole else element_of
    signature = {name: _like(np.asarray(value)) for name, value in made(first).items()}
    calls = tf.data.AUTOTUNE if loader.workers is None else loader.workers or None
    failures: list[Exception] = []

    def elements() -> Iterator[dict[str, Any]]:
        with noted(failures):
            yield from map(made, itertools.chain([first], rest))

    with tf.device("CPU"):
        load = (in_memory if whole else from_files)(source, preprocessing, transforms, loader, failures)

        def prepare(element: Tensors) -> tuple[tf.Tensor, tf.Tensor]:
            return mix(augment(*load(element), preprocessing, transforms), element), element["targets"]

        dataset = tf.data.Dataset.from_generator(elements, output_signature=signature)
        dataset = dataset.map(prepare, num_parallel_calls=calls).prefetch(loader.prefetch)
    try:
        yield from dataset.as_numpy_iterator()
    except tf.errors.OpError:
        if failures:
            raise failures[0] from None
        raise


@contextlib.contextmanager
def noted(failures: list[Exception]) -> Iterator[None]:
    """Notes what is raised inside: behind `tf.data` it would come out as an error of TensorFlow's."""
    try:
        yield
    except Exception as error:
        failures.append(error)
        raise


def element_of(batch: Batch) -> dict[str, Any]:
    """A batch of the plan as a dataset's element: a flat dictionary of arrays, the same ones for every batch of a plan."""
    element: dict[str, Any] = {"indices": batch.indices.astype(np.int64), "targets": batch.targets}
    if batch.words is not None:
        element["words"] = batch.words
    if batch.mix is not None:
        box = batch.mix.box
        element |= {"share": np.float32(batch.mix.share), "partner": batch.mix.partner.astype(np.int64)}
        element |= {"pastes": np.bool_(box is not None), "box": np.array(box or (0, 0, 0, 0), np.int32)}
    return element


def drawn_element(images: np.ndarray, preprocessing: Preprocessing, transforms: Transforms, batch: Batch) -> dict[str, Any]:
    """`element_of`, of images of one size: what is drawn in place of the random words, which saves the graph a call of Python."""
    element = element_of(batch)
    height, width = images.shape[1:3]
    return element | draw(transforms, element.pop("words", None), height, width, preprocessing.crop).parts()


def _like(value: np.ndarray) -> tf.TensorSpec:
    """Of this type and shape, for any number of images."""
    return tf.TensorSpec([None, *value.shape[1:]] if value.ndim else [], value.dtype)


def drawn(element: Tensors, transforms: Transforms, heights: tf.Tensor, widths: tf.Tensor, crop: int) -> Tensors:
    """`core.preprocess.draw` of the element's words, inside the graph: what is drawn, by name."""
    if "words" not in element:
        return {}

    def drawing(words: np.ndarray | None, heights: np.ndarray | int, widths: np.ndarray | int) -> dict[str, np.ndarray]:
        return draw(transforms, words, heights, widths, crop).parts()

    like = drawing(np.zeros((1, WORDS), np.uint64), crop, crop)
    if not like:
        return {}
    parts = tf.numpy_function(lambda *given: list(drawing(*given).values()), (element["words"], heights, widths), [*_types(like)])
    return {name: tf.ensure_shape(part, (None, *like[name].shape[1:])) for name, part in zip(like, parts, strict=True)}


def _types(arrays: dict[str, np.ndarray]) -> Iterator[tf.DType]:
    return (tf.as_dtype(array.dtype) for array in arrays.values())


def in_memory(source: Source, preprocessing: Preprocessing, transforms: Transforms, loader: Loader, failures: list[Exception]) -> Load:
    """Loads a batch out of one array, already cropped and resized: float32 (N, crop, crop, C), and what was drawn for it."""
    images, crop = np.asarray(source.images), preprocessing.crop
    height, width = images.shape[1:3]
    check_padding(transforms, height, width)
    pixels = tf.constant(images)

    def load(element: Tensors) -> tuple[tf.Tensor, Tensors]:
        found = {name: element[name] for name in DRAWN if name in element}
        if "window" not in found:
            return resize_and_crop(tf.gather(pixels, element["indices"]), geometry(preprocessing, height, width)), found
        window, flip = found.pop("window"), found.pop("flip", tf.constant([False]))
        if transforms.pad_crop:
            side = min(height, width)
            cut = tf.cast(cut_windows(pixels, element["indices"], window, side, transforms.pad_crop, flip), tf.float32)
            return cut if side == crop else resize_bilinear(cut, crop, crop), found
        return resize_windows(tf.cast(tf.gather(pixels, element["indices"]), tf.float32), window, crop, flip), found

    return load


def check_padding(transforms: Transforms, height: int, width: int) -> None:
    """UsageError unless an image has the pixels that `pad_crop` reflects."""
    if transforms.pad_crop >= min(height, width):
        raise UsageError(f"pad_crop={transforms.pad_crop} reflects more than there is of an image of {height} x {width} pixels")


def cut_windows(images: tf.Tensor, indices: tf.Tensor, windows: tf.Tensor, side: int, padding: int, flip: tf.Tensor) -> tf.Tensor:
    """(all, H, W, C) -> (N, side, side, C): of the images at `indices`, padded by reflection, the windows, flipped where `flip`.

    One gather of pixels: the padding need not exist, and a flipped window is one read from right to left.
    """
    height, width, channels = images.shape[1:]
    rows = reflection(windows[:, 0, None] + tf.range(side) - padding, height)
    columns = reflection(windows[:, 1, None] + tf.range(side) - padding, width)
    columns = tf.where(flip[:, None], columns[:, ::-1], columns)
    places = (indices[:, None, None] * height + tf.cast(rows, tf.int64)[:, :, None]) * width + tf.cast(columns, tf.int64)[:, None, :]
    return tf.gather(tf.reshape(images, (-1, channels)), places)


def reflection(positions: tf.Tensor, size: int) -> tf.Tensor:
    """Positions up to size - 1 beyond an edge -> those they mirror, the edge itself not repeated."""
    return (size - 1) - tf.abs((size - 1) - tf.abs(positions))


def resize_windows(pixels: tf.Tensor, windows: tf.Tensor, crop: int, flip: tf.Tensor) -> tf.Tensor:
    """(N, H, W, C) -> (N, crop, crop, C): from each image its own window, as `resize_bilinear` resizes it, flipped where `flip`.

    `tf.image.resize` takes windows of one size only; so its filter is written as two matrix products for each image.
    """
    top, left, height, width = tf.unstack(windows, axis=1)
    vertical, horizontal = filter_weights(top, height, pixels.shape[1], crop), filter_weights(left, width, pixels.shape[2], crop)
    horizontal = tf.where(flip[:, None, None], horizontal[:, ::-1], horizontal)
    return tf.einsum("npw,nowc->nopc", horizontal, tf.einsum("noh,nhwc->nowc", vertical, pixels))


def filter_weights(start: tf.Tensor, length: tf.Tensor, size: int, crop: int) -> tf.Tensor:
    """(N, crop, size): what each of `size` pixels in a row adds to each of the `crop` pixels that [start, start + length) becomes.

    A triangle as wide as two pixels of the coarser grid, cut off at the window and summing up to one.
    """
    position = tf.range(size)
    inside = (position >= start[:, None]) & (position < (start + length)[:, None])  # (N, size)
    ratio = tf.cast(length, tf.float32)[:, None] / crop  # (N, 1)
    centre = tf.cast(start, tf.float32)[:, None] + (tf.range(crop, dtype=tf.float32) + 0.5) * ratio  # (N, crop)
    distance = tf.abs(centre[:, :, None] - (tf.cast(position, tf.float32) + 0.5)) / tf.maximum(ratio, 1.0)[:, :, None]
    weights = tf.where(inside[:, None, :], tf.maximum(0.0, 1.0 - distance), 0.0)
    return weights / tf.reduce_sum(weights, axis=2, keepdims=True)


def from_files(source: Source, preprocessing: Preprocessing, transforms: Transforms, loader: Loader, failures: list[Exception]) -> Load:
    """Loads a batch of files: read and vetted in Python, decoded, cropped and resized in the graph, image by image."""
    crop, channels = preprocessing.crop, preprocessing.channels
    reader = Reader(source, channels, decode, loader.cache)

    def read(indices: np.ndarray) -> list[np.ndarray]:
        with noted(failures):
            images, sizes = zip(*(reader.read(int(index)) for index in indices), strict=True)
            for size in sizes:
                check_padding(transforms, *size)
        boxes = [geometry(preprocessing, *size) for size in sizes]
        corners = [(box.resized_height, box.resized_width, box.top, box.left) for box in boxes]
        is_raw = [not isinstance(image, bytes) for image in images]
        contents = np.array([image if isinstance(image, bytes) else image.tobytes() for image in images], object)
        return [contents, np.array(is_raw), np.array(sizes, np.int32), np.array(corners, np.int32)]

    def load_one(image: tuple[tf.Tensor, ...]) -> tf.Tensor:
        content, is_raw, size, box, *window = image
        pixels = tf.cond(is_raw, lambda: tf.io.decode_raw(content, tf.uint8), lambda: tf.reshape(decode_image(content, channels), [-1]))
        pixels = tf.cast(tf.reshape(pixels, (size[0], size[1], channels)), tf.float32)
        if window:
            top, left, height, width = tf.unstack(window[0])
            padded = tf.pad(pixels, [[transforms.pad_crop] * 2] * 2 + [[0, 0]], "REFLECT")
            resized = resize_bilinear(padded[top : top + height, left : left + width], crop, crop)
        else:
            height, width, top, left = tf.unstack(box)
            resized = resize_bilinear(pixels, height, width)[top : top + crop, left : left + crop]
        return tf.ensure_shape(resized, (crop, crop, channels))

    def load(element: Tensors) -> tuple[tf.Tensor, Tensors]:
        indices = element["indices"]
        contents, is_raw, sizes, boxes = tf.numpy_function(read, [indices], [tf.string, tf.bool, tf.int32, tf.int32])
        contents, is_raw = tf.ensure_shape(contents, (None,)), tf.ensure_shape(is_raw, (None,))
        sizes, boxes = tf.ensure_shape(sizes, (None, 2)), tf.ensure_shape(boxes, (None, 4))
        found = drawn(element, transforms, sizes[:, 0], sizes[:, 1], crop)
        images = (contents, is_raw, sizes, boxes, *([found["window"]] if "window" in found else []))
        return tf.map_fn(load_one, images, fn_output_signature=tf.TensorSpec((crop, crop, channels), tf.float32)), found

    return load


# --- Transforms of a batch --------------------------------------------------------------------------------------------------------


def augment(pixels: tf.Tensor, found: Tensors, preprocessing: Preprocessing, transforms: Transforms) -> tf.Tensor:
    """(N, crop, crop, C) float32 in [0, 255] -> flipped, jittered, normalized, erased, as was drawn."""
    if "flip" in found:
        pixels = tf.where(found["flip"][:, None, None, None], tf.reverse(pixels, axis=[2]), pixels)
    if transforms.jitter is not None and "jitter" in found:
        pixels = jitter(pixels, found["jitter"], found["order"])
    images = normalize(pixels, preprocessing)
    return erase(images, found["erase"]) if "erase" in found else images


def jitter(pixels: tf.Tensor, amounts: tf.Tensor, order: tf.Tensor) -> tf.Tensor:
    """Colour jitter by `core.preprocess.ColorJitter`'s formulas: `amounts` (N, 4), in the `order` (N, 4) of each image.

    `tf.image`'s own functions differ, and take one amount for all images (numerics 32).
    """
    steps = (brightness, contrast, saturation, hue) if pixels.shape[-1] == 3 else (brightness, contrast, unchanged, unchanged)
    for place in range(len(steps)):
        rows = tf.dynamic_partition(tf.range(tf.shape(pixels)[0]), order[:, place], len(steps))
        parts = []
        for i, (step, chosen) in enumerate(zip(steps, rows, strict=True)):
            amount = tf.gather(amounts[:, i], chosen)[:, None, None, None]
            parts.append(tf.clip_by_value(step(tf.gather(pixels, chosen), amount), 0.0, 255.0))
        pixels = tf.ensure_shape(tf.dynamic_stitch(rows, parts), pixels.shape)
    return pixels


def brightness(pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """f x; (N, H, W, C) and (N, 1, 1, 1), as the other steps."""
    return factor * pixels


def contrast(pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """f x + (1 - f) m, m the mean of the grey image."""
    return factor * pixels + (1.0 - factor) * tf.reduce_mean(luma(pixels), axis=[1, 2, 3], keepdims=True)


def saturation(pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """f x + (1 - f) grey."""
    return factor * pixels + (1.0 - factor) * luma(pixels)


def hue(pixels: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """The hue turned by `shift` turns."""
    h, s, v = tf.split(tf.image.rgb_to_hsv(pixels / 255.0), 3, axis=-1)
    return tf.image.hsv_to_rgb(tf.concat([tf.math.floormod(h + shift, 1.0), s, v], axis=-1)) * 255.0


def unchanged(pixels: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    """What saturation and hue do to grey images."""
    return pixels


def luma(pixels: tf.Tensor) -> tf.Tensor:
    """(N, H, W, C) -> (N, H, W, 1) ITU-R 601 grey, not rounded."""
    return tf.tensordot(pixels, tf.constant(GREY), 1)[..., None] if pixels.shape[-1] == 3 else pixels


def erase(images: tf.Tensor, boxes: tf.Tensor) -> tf.Tensor:
    """Zero in each image's box (top, left, height, width)."""
    return tf.where(inside(boxes, images.shape[1]), 0.0, images)


def mix(images: tf.Tensor, element: Tensors) -> tf.Tensor:
    """The first images of a batch, one a target; by MixUp or CutMix, if the element is mixed, with their partners among all of it."""
    own = images[: tf.shape(element["targets"])[0]]
    if "partner" not in element:
        return own
    partners, share = tf.gather(images, element["partner"]), element["share"]
    box = inside(element["box"][None], images.shape[1])
    return tf.cond(element["pastes"], lambda: tf.where(box, partners, own), lambda: share * own + (1.0 - share) * partners)


def inside(boxes: tf.Tensor, side: int) -> tf.Tensor:
    """(N, 4) boxes -> (N, side, side, 1), whether a pixel is in its image's box."""
    position = tf.range(side)
    rows, columns = ((position >= boxes[:, i, None]) & (position < (boxes[:, i] + boxes[:, i + 2])[:, None]) for i in (0, 1))
    return (rows[:, :, None] & columns[:, None, :])[..., None]
