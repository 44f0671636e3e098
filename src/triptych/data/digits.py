"""The embedded digits: 1,797 real handwritten digits of 8 x 8 pixels, so that everything works without a download.

They are scikit-learn's `load_digits` (the test part of the UCI "Optical Recognition of Handwritten Digits" data; E. Alpaydin and
C. Kaynak, CC BY 4.0), stored as uint8 values 0 ... 16 by

    from sklearn.datasets import load_digits
    bunch = load_digits()
    numpy.savez_compressed("digits.npz", images=bunch.images.astype("uint8"), labels=bunch.target.astype("uint8"))

and served as 32 x 32 grey images: `round(value * 255 / 16)`, every pixel repeated 4 x 4. Every other digit, starting with the second,
is the test split: 898; the other 899 are the training split. Half, because of a few hundred test images one alone is a quarter of a
point, and rounding decides more than one.
"""

from __future__ import annotations

from importlib import resources

import numpy as np

from triptych.core.errors import UsageError
from triptych.data.source import Source

CLASSES = tuple("0123456789")
SPLITS = ("train", "test")


def open_digits(split: str) -> Source:
    """One split of the digits, images (N, 32, 32, 1) uint8 in memory. Raises UsageError for a split that does not exist."""
    if split not in SPLITS:
        raise UsageError(f"digits has no split {split!r}; choose from {', '.join(SPLITS)}")
    images, labels = load()
    position = np.arange(len(labels))
    chosen = position[(position % 2 == 1) == (split == "test")]
    return Source("digits", split, CLASSES, labels[chosen], enlarge(images[chosen]), [f"digits[{i}]" for i in chosen])


def load() -> tuple[np.ndarray, np.ndarray]:
    """All digits as stored: (1797, 8, 8) uint8 of 0 ... 16, and (1797,) int64 labels."""
    with resources.files("triptych.data").joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return stored["images"], stored["labels"].astype(np.int64)


def enlarge(images: np.ndarray) -> np.ndarray:
    """(N, 8, 8) of 0 ... 16 -> (N, 32, 32, 1) uint8 of 0 ... 255."""
    grey = np.rint(images * (255 / 16)).astype(np.uint8)
    return grey.repeat(4, axis=1).repeat(4, axis=2)[..., None]
