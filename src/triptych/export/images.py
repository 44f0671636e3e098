"""The real images that an artefact is verified on, as files of them would be: JPEG and PNG bytes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from triptych.core.errors import InputRefused
from triptych.data import Source, open_source
from triptych.data import images as image_files

BATCHES = (7, 1)
"""The sizes of batch that are checked; none of them is the 2 that PyTorch's exporters are shown."""
COUNT = 32
"""Images in all: those of the batches first, and all of them for the classes that a quantised model names."""


def encoded(data: str | None, channels: int, count: int = COUNT) -> tuple[Source, list[bytes]]:
    """`count` images of the test split of `data` (None: the embedded digits), evenly spaced, each safe to decode natively.

    Images in arrays become PNG and JPEG in turn. InputRefused for an image that is refused, or fewer than the batches need.
    """
    source = open_source(data or "digits", "test").take(count)
    if len(source) < sum(BATCHES):
        raise InputRefused(f"{source.name} has {len(source)} image(s); verifying takes {sum(BATCHES)} or more")
    return source, [image_files.vet(_bytes(source.image(i), i), source.names[i], channels) for i in range(len(source))]


def _bytes(image: bytes | np.ndarray, number: int) -> bytes:
    if isinstance(image, bytes):
        return image
    file = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(pixels).save(file, *(("PNG",) if number % 2 else ("JPEG",)))
    return file.getvalue()
