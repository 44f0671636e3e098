"""The real images that an artefact is calibrated and verified on, as files of them would be: JPEG and PNG bytes."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from PIL import Image

from triptych.core import philox
from triptych.core.errors import InputRefused, UsageError
from triptych.core.spec import ImageSpec
from triptych.data import Source, fitting, open_source
from triptych.data import images as image_files

BATCHES = (7, 1)
"""The sizes of batch that are checked; none of them is the 2 that PyTorch's exporters are shown."""
COUNT = 32
"""Images in all, those of the batches first, on which an artefact in float32 names its classes."""
MOST, LARGEST = 10_000, 2**30
"""Images, and bytes of them once they are prepared, on which a rounded one does, where there are so many: all that CIFAR-10 tests with."""
CALIBRATION, FEWEST = 512, 32
"""Images that ranges are taken from, and those without which none are."""
ORDER = "calibration of exports, seed 0"
"""The random stream that chooses them."""


def most(spec: ImageSpec) -> int:
    """As many images as are prepared at most, unless somebody asks for more."""
    return max(COUNT, min(MOST, LARGEST // (4 * math.prod(spec.input_shape))))


def encoded(data: str | None, channels: int, count: int = COUNT) -> tuple[Source, list[bytes]]:
    """`count` images of the test split of `data` (None: the embedded digits), evenly spaced, each safe to decode natively.

    Images in arrays become PNG, and of the first some JPEG. InputRefused for an image that is refused, or fewer than the batches need.
    """
    source = open_source(data or "digits", "test").take(count)
    if len(source) < sum(BATCHES):
        raise InputRefused(f"{source.name} has {len(source)} image(s); verifying takes {sum(BATCHES)} or more")
    return source, [_vetted(source, i, channels, "JPEG" if i < COUNT and i % 2 == 0 else "PNG") for i in range(len(source))]


def training(data: str | None, spec: ImageSpec, labels: Sequence[str] | None, trained: bool) -> Source:
    """The training images of `data`, to calibrate on; the embedded digits for None. UsageError when their classes are not the model's.

    Digits stand in for the images of a model whose weights were trained (`trained`) only if it may have been trained on them.
    """
    source = open_source(data or "digits", "train")
    if data is not None:
        return fitting.fitted(source, spec, labels)
    if trained and (set(labels) != set(source.classes) if labels else spec.num_classes != len(source.classes)):
        raise UsageError(f"the ranges of int8 are those of training images: name {spec.name}'s own by --calibration, a folder or a file")
    return source


def calibration(source: Source, channels: int, count: int, apart_from: Collection[bytes]) -> list[bytes]:
    """`count` images of `source`, or all if there are fewer, in a random order that is always the same; none of `apart_from`.

    InputRefused when fewer than `FEWEST` are left: what accuracy is measured on must not have been calibrated on.
    """
    chosen: list[bytes] = []
    for index in philox.permutation(ORDER, len(source)):
        image = _vetted(source, int(index), channels, "PNG")
        if image not in apart_from:
            chosen.append(image)
        if len(chosen) == count:
            return chosen
    if len(chosen) < FEWEST:
        raise InputRefused(
            f"{source.name} has {len(chosen)} training image(s) that it is not verified on, too; calibrating takes {FEWEST} or more: "
            "name others by --calibration, or verify on others (--data) or fewer (--limit)"
        )
    return chosen


def told(source: Source, chosen: Sequence[bytes]) -> dict[str, Any]:
    """What a record says of a set: its name, and how many images of it, with the hash of their bytes."""
    return {"data": source.name, "images": len(chosen), "images_sha256": hashlib.sha256(b"".join(chosen)).hexdigest()}


def _vetted(source: Source, index: int, channels: int, kind: str) -> bytes:
    image = source.image(index)
    return image_files.vet(image if isinstance(image, bytes) else _file(image, kind), source.names[index], channels)


def _file(image: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, kind)
    return file.getvalue()
