"""The arithmetic of what happens to an image, and the order in which images come. Executed natively in `in_*/data.py`.

Every box is computed here, once, and passed to the frameworks: their own rounding differs (numerics 22).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from triptych.core import philox
from triptych.core.spec import Preprocessing


@dataclass(frozen=True, slots=True)
class Geometry:
    """Resize to (resized_height, resized_width), then cut `crop` x `crop` pixels at (top, left)."""

    resized_height: int
    resized_width: int
    top: int
    left: int
    crop: int


def geometry(preprocessing: Preprocessing, height: int, width: int) -> Geometry:
    """The boxes for an image of height x width, by torchvision's arithmetic.

    Short side to `resize_short_side`, long side truncated; centred crop with Python's rounding. Without a short side an image
    that already has the crop's size on its short side is left alone and any other is resized to it.
    """
    short = preprocessing.resize_short_side or preprocessing.crop
    if height <= width:
        resized_height, resized_width = short, int(short * width / height)
    else:
        resized_height, resized_width = int(short * height / width), short
    crop = preprocessing.crop
    return Geometry(resized_height, resized_width, round((resized_height - crop) / 2.0), round((resized_width - crop) / 2.0), crop)


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` samples in an epoch: a pure function of (seed, epoch, size), for every framework alike."""
    return philox.permutation(f"order/{seed}/{epoch}", size)


def batch_indices(seed: int, size: int, batch_size: int, steps: int, *, first_step: int = 0) -> Iterator[np.ndarray]:
    """Indices of the batches of steps first_step ... steps - 1; an epoch's uneven last batch is dropped.

    Any step can be reached directly, so that a run resumes in the middle of an epoch.
    """
    per_epoch = size // batch_size
    if per_epoch == 0:
        raise ValueError(f"a batch of {batch_size} needs at least as many samples; there are {size}")
    for step in range(first_step, steps):
        epoch, position = divmod(step, per_epoch)
        if step == first_step or position == 0:
            order = epoch_order(seed, epoch, size)
        yield order[position * batch_size : (position + 1) * batch_size]
