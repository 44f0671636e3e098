"""Images read when a pipeline asks for them: vetted once, or decoded once and kept."""

from __future__ import annotations

import contextlib
import io
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from triptych.core.errors import StorageError
from triptych.data import images as image_files
from triptych.data.source import Source


class Reader:
    """The images of a source for pipelines, which read many times and from several threads.

    With `cache` ("memory" or the path of a file), each is decoded once, by `decode(encoded, channels)`, and kept. Two threads that
    meet at one image do the same work twice.
    """

    def __init__(self, source: Source, channels: int, decode: Callable[[bytes, int], np.ndarray], cache: str | None) -> None:
        self._source = source
        self._channels = channels
        self._decode = decode
        self._cache = None if cache is None else DecodedImages(None if cache == "memory" else cache)
        self._passed: dict[int, tuple[int, tuple[int, int]]] = {}

    def read(self, index: int) -> tuple[bytes | np.ndarray, tuple[int, int]]:
        """What is to be decoded, or (H, W, C) uint8 pixels; and (height, width). Raises InputRefused, naming the image."""
        kept = None if self._cache is None else self._cache.get(index)
        image = self._source.image(index) if kept is None else kept
        if not isinstance(image, bytes):
            return image, (image.shape[0], image.shape[1])
        encoded, size = self._vet(index, image)
        if self._cache is None:
            return encoded, size
        pixels = self._decode(encoded, self._channels)
        self._cache.keep(index, pixels)
        return pixels, size

    def _vet(self, index: int, data: bytes) -> tuple[bytes, tuple[int, int]]:
        """What may be decoded in place of `data`, and its (height, width); a file that passed once passes while it stays the same."""
        checksum, passed = zlib.crc32(data), self._passed.get(index)
        if passed is not None and passed[0] == checksum:
            return data, passed[1]
        vetted = image_files.vet(data, self._source.names[index], self._channels)
        with Image.open(io.BytesIO(vetted)) as header:
            size = (header.height, header.width)
        if vetted is data:
            self._passed[index] = checksum, size
        return vetted, size


class DecodedImages:
    """Decoded images by index, in memory or one behind the other in a file, which is begun anew. StorageError when it cannot be written."""

    def __init__(self, path: str | None) -> None:
        self._images: dict[int, np.ndarray] = {}
        self._places: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._path, self._end, self._lock = path, 0, threading.Lock()
        with self._explained():
            self._file = None if path is None else open(path, "w+b", buffering=0)  # noqa: SIM115 (closed when nothing reads it any more)

    def get(self, index: int) -> np.ndarray | None:
        """The image, or None when it was not kept."""
        if self._file is None or index not in self._places:
            return self._images.get(index)
        offset, shape = self._places[index]
        return np.frombuffer(os.pread(self._file.fileno(), math.prod(shape), offset), np.uint8).reshape(shape)

    def keep(self, index: int, image: np.ndarray) -> None:
        """Keep a (H, W, C) uint8 image."""
        if self._file is None:
            self._images[index] = image
            return
        with self._lock:
            offset, self._end = self._end, self._end + image.nbytes
        with self._explained():
            written = os.pwrite(self._file.fileno(), image.tobytes(), offset)
        if written == image.nbytes:
            self._places[index] = offset, image.shape

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()  # type: ignore[union-attr]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot cache decoded images in {self._path}: {error.strerror}; name another file, or memory") from None
