"""What a worker saw: named tensors in execution order, streamed through the run directory in bounded shards."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core import storage
from triptych.core.errors import TriptychError
from triptych.core.tensor_file import DTYPES

SHARD_BYTES = 64 * 2**20
PENDING_BYTES = 192 * 2**20
POLL_SECONDS = 0.02
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Observation:
    """One tensor at one place of the ladder. `group` decides its tolerance; `fault` names the planted fault, if any."""

    rung: int
    group: str
    name: str
    value: np.ndarray
    step: int = 0
    fault: str = ""

    @property
    def key(self) -> tuple[str, int, int, str, str]:
        """What must coincide for two observations to be compared."""
        return (self.fault, self.rung, self.step, self.group, self.name)


class ShardWriter:
    """Writes observations to `directory` as numbered safetensors files, each renamed into place when complete.

    It blocks while more than `PENDING_BYTES` wait for the reader, who deletes what he has read: the disk stays bounded.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.count = 0
        self.bytes = 0
        self.pending: list[Observation] = []
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, observation: Observation) -> None:
        """Queue one observation; a full shard goes to disk."""
        self.pending.append(observation)
        self.bytes += observation.value.nbytes
        if self.bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Put what is queued on disk now: before any wait for another worker, so that nobody waits in a circle."""
        if not self.pending:
            return
        self._wait_for_room()
        header = [{**asdict(o), "value": None} for o in self.pending]
        tensors = {str(i): o.value for i, o in enumerate(self.pending)}
        write_tensors(self.directory / f"{self.count:06d}.safetensors", tensors, {"observations": json.dumps(header)})
        self.count, self.bytes, self.pending = self.count + 1, 0, []

    def _wait_for_room(self) -> None:
        wait_until(lambda: bytes_in(self.directory, "[0-9]*.safetensors") <= PENDING_BYTES)

    def close(self, summary: dict[str, object]) -> None:
        """Flush and leave `done.json`, which ends the stream."""
        self.flush()
        write_json(self.directory / "done.json", {**summary, "shards": self.count})


def bytes_in(directory: Path, pattern: str) -> int:
    """Size of the files that match; one that is deleted meanwhile counts nothing."""
    total = 0
    for path in directory.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until `condition()`; a worker whose parent process is gone ends instead of waiting for ever."""
    parent = os.getppid()
    while not condition():
        if os.getppid() != parent:
            raise TriptychError("the process that started this worker is gone")
        time.sleep(POLL_SECONDS)


class ShardReader:
    """Reads a worker's observations in order, deleting each shard once it is consumed.

    `alive` tells whether the writer still runs; a stream that ends without `done.json` raises TriptychError.
    """

    def __init__(self, directory: Path, alive: object = None) -> None:
        self.directory = directory
        self.alive = alive
        self.summary: dict[str, object] = {}

    def __iter__(self) -> Iterator[Observation]:
        for number in range(10**6):
            path = self._wait(number)
            if path is None:
                return
            shard = StoredTensors(path)
            for i, fields in enumerate(json.loads(shard.metadata["observations"])):
                yield Observation(**{**fields, "value": shard[str(i)]})
            path.unlink()

    def _wait(self, number: int) -> Path | None:
        path, done = self.directory / f"{number:06d}.safetensors", self.directory / "done.json"
        while True:
            if path.exists():
                return path
            if done.exists():
                self.summary = json.loads(done.read_text())
                if number >= int(str(self.summary["shards"])):
                    return None
            elif callable(self.alive) and not self.alive() and not done.exists() and not path.exists():
                raise TriptychError(f"the worker in {self.directory.name} ended without finishing its observations")
            time.sleep(POLL_SECONDS)


class StoredTensors(Mapping[str, np.ndarray]):
    """Tensors of a file of `write_tensors`, some of them or all, each of them in memory for as long as it is held.

    Gigabytes pass through these files at every step, where a copy of each tensor would cost as much as the step, and the whole file
    would stand in memory beside the training state. So the file is mapped once (a map of each tensor would take a file descriptor of
    1,024 that a process often has), and the pages of a tensor are given back when it is dropped. The arrays are read-only; the file may be
    deleted meanwhile.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = 8 + int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8 : self._start])
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries: dict[str, Any] = header

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if start == stop:
            return np.empty(shape, dtype)
        count, first = math.prod(shape), self._start + start
        tensor = np.frombuffer(self._map, dtype, count, first).reshape(shape)
        weakref.finalize(tensor, _give_back, self._map, first, stop - start).atexit = False
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def under(self, prefix: str) -> Any:
        """Those whose names start with `prefix/`, without it."""
        part = copy.copy(self)
        part._entries = {name.removeprefix(f"{prefix}/"): entry for name, entry in self._entries.items() if name.startswith(f"{prefix}/")}
        return part


def _give_back(mapped: mmap.mmap, first: int, size: int) -> None:
    """Let the whole pages of this part go; who still looks at it gets them anew from the file."""
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (first + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, start, end - start)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that appears complete or not at all.

    Each tensor is asked for twice, for the header and to be written, and let go: of a lazy mapping no more than one is in memory.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    sizes = {}
    for name, value in tensors.items():
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape)}
        sizes[name] = (value.dtype.itemsize, value.nbytes)
    names, end = sorted(sizes, key=lambda name: -sizes[name][0]), 0  # stable; every tensor starts at a multiple of its item
    for name in names:
        start, end = end, end + sizes[name][1]
        header[name]["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].tobytes())  # in C order, whatever the array's
    partial.replace(path)


def write_json(path: Path, data: object) -> None:
    """A JSON file that appears complete or not at all."""
    storage.write_whole(path, json.dumps(data, indent=1, allow_nan=False))
