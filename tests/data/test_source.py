"""A source of images: subsets, hashes, arrays, other class indices."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from triptych.core.errors import InputRefused
from triptych.data.source import Source


def png(size: int, value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def encoded_source(*sizes: int) -> Source:
    images = [png(size, i) for i, size in enumerate(sizes)]
    return Source("reds", "test", ("a", "b"), np.arange(len(sizes)) % 2, images, [f"{i}.png" for i in range(len(sizes))])


def array_source() -> Source:
    images = np.arange(10 * 4, dtype=np.uint8).reshape(10, 2, 2, 1)
    return Source("ten", "test", ("a", "b"), np.arange(10) // 5, images, [str(i) for i in range(10)])


def test_arrays_decodes_encoded_images() -> None:
    images, labels = encoded_source(3, 3, 3).arrays()
    assert images.shape == (3, 3, 3, 3)
    assert images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert labels.tolist() == [0, 1, 0]


def test_arrays_of_different_sizes_are_refused_by_name() -> None:
    with pytest.raises(InputRefused, match=r"1\.png: \(4, 4, 3\) where the first image is \(3, 3, 3\)"):
        encoded_source(3, 4).arrays()


def test_arrays_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.data.source.MAX_ARRAY_BYTES", 26)
    with pytest.raises(InputRefused, match="do not fit"):
        encoded_source(3).arrays()


def test_take_spreads_over_the_set() -> None:
    part = array_source().take(4)
    assert list(part.names) == ["0", "2", "5", "7"]
    assert part.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(part.image(2), array_source().image(5))
    assert len(array_source().take(None)) == len(array_source().take(99)) == 10


def test_the_hash_sees_pixels_labels_and_order() -> None:
    source = array_source()
    assert source.sha256() == array_source().sha256()
    flipped = np.array(source.images)
    flipped[3, 0, 0, 0] ^= 1
    others = [
        Source("ten", "test", source.classes, source.labels, flipped, source.names),
        Source("ten", "test", source.classes, 1 - source.labels, source.images, source.names),
        source.take(9),
        Source("ten", "test", source.classes, source.labels, np.array(source.images).reshape(10, 4, 1, 1), source.names),
    ]
    assert len({source.sha256(), *(other.sha256() for other in others)}) == 5


def test_the_hash_of_encoded_images_is_that_of_their_bytes() -> None:
    data = png(3, 0)
    expected = hashlib.sha256(f"encoded {len(data)} 0\n".encode() + data).hexdigest()
    assert encoded_source(3).sha256() == expected


def test_relabeled_maps_by_name_and_keeps_the_unknown() -> None:
    source = Source("two", "test", ("b", "a"), np.array([0, 1, -1]), [b"", b"", b""], ["x", "y", "z"])
    again = source.relabeled(("a", "b", "c"), {"a": 0, "b": 1, "c": 2})
    assert again.labels.tolist() == [1, 0, -1]
    assert again.classes == ("a", "b", "c")
