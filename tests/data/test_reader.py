"""Images read again and again: vetted once while they stay the same, decoded once with a cache."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.core.errors import InputRefused, StorageError
from triptych.data import Source, images
from triptych.data.reader import Reader


def as_png(pixels: np.ndarray, **options: Any) -> bytes:
    """(H, W, 3) uint8 as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture
def pixels() -> list[np.ndarray]:
    """Three images of different sizes."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (5 + i, 9 - i, 3), dtype=np.uint8) for i in range(3)]


def source_of(held: list[Any]) -> Source:
    """A source that shows what the list holds now."""
    return Source("held", "train", ("0",), np.zeros(len(held), np.int64), held, [f"image {i}" for i in range(len(held))])  # type: ignore[arg-type]


def test_a_file_is_vetted_again_only_when_it_changes(pixels: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    vetted: list[str] = []
    vet = images.vet
    monkeypatch.setattr(images, "vet", lambda data, name, channels: (vetted.append(name), vet(data, name, channels))[1])
    held = [as_png(each) for each in pixels]
    reader = Reader(source_of(held), 3, images.decode, None)
    for _ in range(2):
        for i, image in enumerate(pixels):
            assert reader.read(i) == (held[i], image.shape[:2])
    assert vetted == ["image 0", "image 1", "image 2"]
    held[1] = held[1][:50]
    with pytest.raises(InputRefused, match="image 1"):
        reader.read(1)


def test_an_image_on_its_side_has_the_size_it_is_shown_with(pixels: list[np.ndarray]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    reader = Reader(source_of([as_png(pixels[0], exif=exif)]), 3, images.decode, None)
    encoded, size = reader.read(0)
    assert size == (9, 5)
    assert isinstance(encoded, bytes)
    np.testing.assert_array_equal(images.decode(encoded, 3), np.rot90(pixels[0], -1))


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_cache_gives_what_was_decoded(where: str, pixels: list[np.ndarray], tmp_path: Path) -> None:
    held: list[Any] = [as_png(each) for each in pixels[:2]] + [pixels[2]]
    cache = where if where == "memory" else str(tmp_path / "decoded")
    reader = Reader(source_of(held), 3, images.decode, cache)
    for i in (2, 0, 1):
        reader.read(i)
    held[0] = held[1] = b"gone"
    for i, image in enumerate(pixels):
        read, size = reader.read(i)
        np.testing.assert_array_equal(read, image)
        assert size == image.shape[:2]


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot cache decoded images in"):
        Reader(source_of([]), 3, images.decode, str(tmp_path / "no" / "file"))
