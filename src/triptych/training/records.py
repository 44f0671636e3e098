"""The plain files of a run: `metrics.jsonl`, a row at a time, and JSON written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from triptych.core.errors import StorageError

METRICS = "metrics.jsonl"


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """StorageError, naming `path`, in place of an OSError: disk full, read-only, vanished."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot write {path}: {reason[:1].lower()}{reason[1:]}; make room or put the directory back, then go on with --resume auto"
        ) from error


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file under another name and move it into place. StorageError when that fails."""
    partial = path.with_name(f".{path.name}.partial")
    with storing(path):
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)


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
