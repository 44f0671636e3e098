"""The training transforms in plain numpy and float64, one image at a time: what every room's pipeline is held to.

Written from the docstrings of `core/preprocess.py` and `core/sampling.py` alone, for clarity, not speed.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

from triptych.core.preprocess import GREY, Draw, Transforms, draw, geometry
from triptych.core.sampling import Batch, Mix
from triptych.core.spec import Preprocessing

LEVELS = 0.05
"""How many levels of 255 a pixel may be off before normalization: the contract between the frameworks."""


def transformed(image: np.ndarray, preprocessing: Preprocessing, transforms: Transforms, draw_row: Draw) -> np.ndarray:
    """(H, W, C) uint8 -> (crop, crop, C) float64, normalized and erased; `draw_row` is what was drawn for this one image."""
    pixels = cropped(image, preprocessing, transforms, draw_row)
    if draw_row.flip is not None and draw_row.flip[0]:
        pixels = pixels[:, ::-1]
    if draw_row.jitter is not None and draw_row.order is not None:
        pixels = jittered(pixels, draw_row.jitter[0], draw_row.order[0])
    normalized = (pixels / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    if draw_row.erase is not None:
        top, left, height, width = draw_row.erase[0]
        normalized[top : top + height, left : left + width] = 0.0
    return normalized


def transformed_batch(images: Sequence[np.ndarray], batch: Batch, preprocessing: Preprocessing, transforms: Transforms) -> np.ndarray:
    """(N, crop, crop, C) float64: a batch of the plan over decoded images, mixed, one image for each target."""
    chosen = [images[index] for index in batch.indices]
    heights, widths = (np.array([image.shape[axis] for image in chosen]) for axis in (0, 1))
    drawn = draw(transforms, batch.words, heights, widths, preprocessing.crop)
    made = np.stack([transformed(image, preprocessing, transforms, drawn.row(i)) for i, image in enumerate(chosen)])
    return mixed(made, batch.mix)[: len(batch.targets)]


def cropped(image: np.ndarray, preprocessing: Preprocessing, transforms: Transforms, draw_row: Draw) -> np.ndarray:
    """(H, W, C) uint8 -> (crop, crop, C) float64 in [0, 255]: the drawn window, or without one the centre, as in evaluation."""
    crop = preprocessing.crop
    if draw_row.window is None:
        box = geometry(preprocessing, *image.shape[:2])
        resized = resize(image, box.resized_height, box.resized_width)
        return resized[box.top : box.top + crop, box.left : box.left + crop]
    top, left, height, width = draw_row.window[0]
    sides = (transforms.pad_crop, transforms.pad_crop)
    padded = np.pad(image, (sides, sides, (0, 0)), "reflect")
    return resize(padded[top : top + height, left : left + width], crop, crop)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) -> (height, width, C) float64: bilinear and antialiased, along one axis after the other."""
    rows, columns = filter_weights(image.shape[0], height), filter_weights(image.shape[1], width)
    return np.einsum("oh,hwc,pw->opc", rows, image.astype(np.float64), columns, optimize=True)


def filter_weights(length: int, out: int) -> np.ndarray:
    """(out, length): what each of `length` pixels gives to each of `out`, as in Pillow and in torchvision with antialias=True.

    A triangle around the centre of the new pixel, as wide as two pixels of the coarser grid, cut off at the edges; each row sums to one.
    """
    ratio = length / out
    centres = (np.arange(out) + 0.5) * ratio
    distances = np.abs(np.arange(length) + 0.5 - centres[:, None]) / max(1.0, ratio)
    weights = np.maximum(0.0, 1.0 - distances)
    return weights / weights.sum(axis=1, keepdims=True)


def jittered(pixels: np.ndarray, amounts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(H, W, C) float64 in [0, 255], one operation after the other, clamped after each; grey images have no saturation and no hue."""
    for operation in order:
        amount, grey = float(amounts[operation]), _grey(pixels)
        if operation == 0:
            pixels = amount * pixels
        elif operation == 1:
            pixels = amount * pixels + (1.0 - amount) * grey.mean()
        elif operation == 2 and pixels.shape[2] == 3:
            pixels = amount * pixels + (1.0 - amount) * grey
        elif operation == 3 and pixels.shape[2] == 3:
            pixels = _hue_turned(pixels, amount)
        pixels = np.clip(pixels, 0.0, 255.0)
    return pixels


def _grey(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (H, W, 1)."""
    return pixels @ np.array(GREY)[:, None] if pixels.shape[2] == 3 else pixels


def _hue_turned(pixels: np.ndarray, turns: float) -> np.ndarray:
    turned = []
    for rgb in (pixels / 255).reshape(-1, 3):
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        turned.append(colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value))
    return 255 * np.array(turned).reshape(pixels.shape)


def mixed(images: np.ndarray, mix: Mix | None) -> np.ndarray:
    """(N, H, W, C) images mixed with their partners, (len(mix.partner), H, W, C): MixUp, or CutMix where there is a box."""
    if mix is None:
        return images
    partners, own = images[mix.partner], images[: len(mix.partner)].copy()
    if mix.box is None:
        return mix.share * own + (1.0 - mix.share) * partners
    top, left, height, width = mix.box
    own[:, top : top + height, left : left + width] = partners[:, top : top + height, left : left + width]
    return own
