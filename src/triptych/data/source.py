"""A labelled set of images, whatever it came from: what every reader of `triptych.data` returns. Numpy only."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from triptych.core.errors import InputRefused
from triptych.data import images as image_files

# The largest array that `arrays` makes: all of CIFAR-10 is 184 MB, all of ImageNet's validation set at 224 would be 7.5 GB.
MAX_ARRAY_BYTES = 2 * 1024**3


class Images(Protocol):
    """Images by index: encoded JPEG or PNG bytes, or (H, W, C) uint8. An (N, H, W, C) array is one; files are read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes | np.ndarray: ...


class ContentHash:
    """SHA-256 of images and labels in order: encoded images by their bytes, decoded ones by shape and pixels."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, image: bytes | np.ndarray, label: int) -> None:
        """Take one image and its label."""
        shape, content = ("encoded", image) if isinstance(image, bytes) else (str(image.shape), np.ascontiguousarray(image).tobytes())
        self._sha256.update(f"{shape} {len(content)} {label}\n".encode())
        self._sha256.update(content)

    def hexdigest(self) -> str:
        """The hash of all that was added."""
        return self._sha256.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """N images with labels. `labels` is (N,) int64, indices into `classes` (-1: unknown); `names` says where each image is from."""

    name: str
    split: str
    classes: tuple[str, ...]
    labels: np.ndarray
    images: Images
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> bytes | np.ndarray:
        """Encoded bytes, not yet vetted, or (H, W, C) uint8. Raises InputRefused for a file that cannot be read."""
        return self.images[index]

    def label(self, index: int) -> int:
        """The class of an image, -1 when unknown."""
        return int(self.labels[index])

    def sha256(self) -> str:
        """The content hash that certificates carry: images and labels, in order. Reads every image."""
        content = ContentHash()
        for index in range(len(self)):
            content.add(self.image(index), self.label(index))
        return content.hexdigest()

    def take(self, limit: int | None) -> Source:
        """At most `limit` images, evenly spaced, so that a set sorted by class still shows every class."""
        if limit is None or limit >= len(self):
            return self
        chosen = np.arange(limit) * len(self) // limit
        names = [self.names[int(i)] for i in chosen]
        images = self.images[chosen] if isinstance(self.images, np.ndarray) else _Chosen(self.images, chosen)
        return dataclasses.replace(self, labels=self.labels[chosen], images=images, names=names)

    def relabeled(self, classes: Sequence[str], index_of: dict[str, int]) -> Source:
        """The same images under other class indices: class `c` becomes `classes[index_of[c]]`."""
        table = np.array([index_of[name] for name in self.classes], dtype=np.int64)
        labels = np.where(self.labels >= 0, table[self.labels], -1)
        return dataclasses.replace(self, classes=tuple(classes), labels=labels)

    def arrays(self, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """(N, H, W, C) uint8 images and (N,) int64 labels, in memory; encoded images are vetted and decoded by Pillow.

        Raises InputRefused when an image is refused, sizes differ, or the whole is larger than 2 GiB.
        """
        if isinstance(self.images, np.ndarray):
            return self.images, self.labels
        first = self._pixels(0, channels)
        if first.nbytes * len(self) > MAX_ARRAY_BYTES:
            raise InputRefused(f"{self.name}: {len(self)} images of {first.shape} do not fit in 2 GiB; stream them with image(i)")
        pixels = np.empty((len(self), *first.shape), dtype=np.uint8)
        for index in range(len(self)):
            image = self._pixels(index, channels)
            if image.shape != first.shape:
                raise InputRefused(f"{self.names[index]}: {image.shape} where the first image is {first.shape}; stream them with image(i)")
            pixels[index] = image
        return pixels, self.labels

    def _pixels(self, index: int, channels: int) -> np.ndarray:
        image = self.image(index)
        return image_files.decode(image_files.vet(image, self.names[index], channels), channels) if isinstance(image, bytes) else image


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Some of the images of another set."""

    images: Images
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int, /) -> bytes | np.ndarray:
        return self.images[int(self.chosen[index])]
