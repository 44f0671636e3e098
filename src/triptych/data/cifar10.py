"""CIFAR-10 (Krizhevsky 2009) as it is distributed: the official Python and binary versions, archived or extracted.

Both hold 3,072 bytes an image: the red plane, then green, then blue, each 32 x 32 by rows. Archives are read as a stream, without
extracting to disk, and never beyond the size of the real ones. The Parquet layout is read by `data/parquet.py`.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from triptych.core.errors import InputRefused, UsageError
from triptych.data import unpickle
from triptych.data.source import Source

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}

# The real archives hold 186 MB, their largest member 31 MB.
_MAX_ARCHIVE = 256 * 1024**2
_MAX_BATCH = 48 * 1024**2
_PIXELS = 3 * 32 * 32


def holds_batches(folder: Path) -> bool:
    """Whether a folder is an extracted archive."""
    return any((folder / f"{batch}{suffix}").is_file() for batches in BATCHES.values() for batch in batches for suffix in ("", ".bin"))


def open_folder(folder: Path, split: str) -> Source:
    """An extracted archive, `data_batch_1 ... test_batch` with or without `.bin`. Raises InputRefused for a damaged batch."""
    paths = (folder / f"{batch}{suffix}" for batch in _batches(split) for suffix in ("", ".bin"))
    return _source(folder, split, ((path.name, _read(path)) for path in paths if path.is_file()))


def open_archive(archive: Path, split: str) -> Source:
    """`cifar-10-python.tar.gz` or `cifar-10-binary.tar.gz`. Raises InputRefused for a damaged, oversized or foreign archive."""
    return _source(archive, split, _members(archive, _batches(split)))


def _batches(split: str) -> tuple[str, ...]:
    if split not in BATCHES:
        raise UsageError(f"CIFAR-10 has no split {split!r}; choose from {', '.join(BATCHES)}")
    return BATCHES[split]


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return _bounded(file.read(_MAX_BATCH + 1), str(path))


def _bounded(data: bytes, name: str) -> bytes:
    if len(data) > _MAX_BATCH:
        raise InputRefused(f"{name}: larger than any CIFAR-10 batch")
    return data


class _BoundedStream(io.RawIOBase):
    """A decompressed stream that refuses to go beyond the size of the real archive."""

    def __init__(self, stream: gzip.GzipFile, name: str) -> None:
        self._stream, self._name, self._left = stream, name, _MAX_ARCHIVE

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise InputRefused(f"{self._name}: unpacks to more than {_MAX_ARCHIVE // 1024**2} MiB; CIFAR-10 does not")
        return data


def _members(archive: Path, batches: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the wanted batches, wherever they lie in the archive; nothing is written to disk."""
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=_BoundedStream(stream, str(archive)), mode="r|") as members:
            for member in members:
                name = member.name.rpartition("/")[2]
                if not member.isfile() or name.removesuffix(".bin") not in batches:
                    continue
                content = members.extractfile(member)
                if content is not None:
                    yield name, _bounded(content.read(_MAX_BATCH + 1), f"{archive}:{name}")
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise InputRefused(f"{archive}: damaged archive ({error})") from None


def _source(path: Path, split: str, members: Iterator[tuple[str, bytes]]) -> Source:
    batches = {name: _parse(name, content, path) for name, content in members}
    wanted = _batches(split)
    missing = [batch for batch in wanted if batch not in batches and f"{batch}.bin" not in batches]
    if missing:
        raise InputRefused(f"{path}: {', '.join(missing)} not found; an official CIFAR-10 archive holds {', '.join(wanted)}")
    order = sorted(batches)
    images = np.concatenate([batches[name][0] for name in order])
    labels = np.concatenate([batches[name][1] for name in order])
    names = [f"{name}[{row}]" for name in order for row in range(len(batches[name][1]))]
    return Source("cifar10", split, CLASSES, labels, images, names)


def _parse(name: str, content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32, 32, 3) uint8 images and (N,) int64 labels of one batch."""
    planes, labels = _binary_batch(content) if name.endswith(".bin") else _python_batch(content, f"{path}:{name}")
    if planes is None or planes.shape != (len(labels), _PIXELS) or planes.dtype != np.uint8 or len(labels) == 0:
        raise InputRefused(f"{path}: {name} does not hold images of 3072 bytes, each with a label")
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise InputRefused(f"{path}: {name} has labels {labels.min()} ... {labels.max()}; CIFAR-10's are 0 ... 9")
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _binary_batch(content: bytes) -> tuple[np.ndarray | None, np.ndarray]:
    """Records of one label byte and 3,072 pixel bytes."""
    if len(content) % (1 + _PIXELS):
        return None, np.empty(0, dtype=np.int64)
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + _PIXELS)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _python_batch(content: bytes, name: str) -> tuple[np.ndarray | None, np.ndarray]:
    batch = unpickle.load(content, name)
    data, labels = batch.get("data"), batch.get("labels")
    try:
        return (data if isinstance(data, np.ndarray) else None), np.asarray(labels, dtype=np.int64).reshape(-1)
    except (TypeError, ValueError):
        return None, np.empty(0, dtype=np.int64)
