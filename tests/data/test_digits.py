"""The embedded digits are scikit-learn's, split as documented, and the catalogue's statistics are theirs."""

from __future__ import annotations

import numpy as np
import pytest

from triptych.core import catalog
from triptych.core.errors import UsageError
from triptych.data import digits, open_source


def test_they_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn, the origin of the digits, is not installed")
    original = datasets.load_digits()
    images, labels = digits.load()
    assert images.shape == (1797, 8, 8)
    np.testing.assert_array_equal(images, original.images)
    np.testing.assert_array_equal(labels, original.target)


def test_pixels_are_scaled_and_repeated() -> None:
    stored = np.arange(64, dtype=np.uint8).reshape(1, 8, 8) % 17
    large = digits.enlarge(stored)
    assert large.shape == (1, 32, 32, 1)
    assert large.dtype == np.uint8
    for row, column in ((0, 0), (5, 18), (31, 31)):
        assert large[0, row, column, 0] == round(int(stored[0, row // 4, column // 4]) * 255 / 16)


def test_every_other_digit_is_the_test_split() -> None:
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (899, 898)
    assert test.names[:3] == ["digits[1]", "digits[3]", "digits[5]"]
    assert set(train.names).isdisjoint(test.names)
    assert test.classes == tuple("0123456789")
    assert set(test.labels) == set(range(10))
    np.testing.assert_array_equal(test.image(1), digits.enlarge(digits.load()[0][3:4])[0])


def test_the_catalogue_holds_the_training_statistics() -> None:
    images, _ = open_source("digits", "train").arrays(channels=1)
    pixels = images / 255
    assert catalog.DIGITS.mean == (round(float(pixels.mean()), 4),)
    assert catalog.DIGITS.std == (round(float(pixels.std()), 4),)


def test_another_split_is_named() -> None:
    with pytest.raises(UsageError, match=r"'dev'.*train, test"):
        digits.open_digits("dev")
