"""The plain files of a run: `metrics.jsonl`, a row at a time, and JSON written whole or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from triptych.core import storage

METRICS = "metrics.jsonl"


ADVICE = "make room or put the directory back, then go on with --resume auto"


def storing(path: Path) -> contextlib.AbstractContextManager[None]:
    """`core.storage.storing`, with the advice of a run that can be resumed."""
    return storage.storing(path, ADVICE)


def write_whole(path: Path, data: str | bytes) -> None:
    """`core.storage.write_whole`. StorageError when that fails."""
    with storing(path):
        storage.write_whole(path, data)


class Metrics:
    """`metrics.jsonl`, open for appending: each row is on its way to the disk when `write` returns. Raises StorageError."""

    def __init__(self, path: Path, kept: Sequence[Mapping[str, Any]]) -> None:
        """Start with the rows that are kept of an earlier start."""
        self.path = path
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        with storing(path):
            self._file = path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        with storing(self.path):
            self._file.write(json.dumps(row) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with storing(self.path):
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
