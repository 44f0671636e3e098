"""The Hub's Parquet layout: `train-*.parquet`, `test-*.parquet` with an image column `{bytes, path}` and a `label` column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core.errors import InputRefused, UsageError
from triptych.data.source import Source

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels")


def open_parquet(name: str, split: str, files: Sequence[Path], classes: tuple[str, ...] | None = None) -> Source:
    """One split, its images still encoded and read a row group at a time.

    Class names come from the Hub's schema metadata, else from `classes`, else they are the label numbers. Raises UsageError with
    the pip line without pyarrow, InputRefused for a damaged file or other columns.
    """
    parquet = _pyarrow_parquet()
    try:
        tables = [parquet.ParquetFile(path) for path in files]
        image_column, label_column = _columns(files[0], tables[0].schema_arrow.names)
        columns = [table.read(columns=[label_column]).column(0).to_numpy() for table in tables]
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these two
        raise InputRefused(f"{files[0].parent}: damaged Parquet file ({error})") from None
    labels = np.concatenate(columns).astype(np.int64)
    if not len(labels):
        raise InputRefused(f"{files[0].parent}: the {split} split is empty")
    known = _class_names(tables[0].schema_arrow.metadata, label_column) or classes or tuple(map(str, range(int(labels.max()) + 1)))
    if labels.min() < -1 or labels.max() >= len(known):
        raise InputRefused(f"{files[0]}: labels {labels.min()} ... {labels.max()} where there are {len(known)} classes")
    images = _ParquetImages(tables, image_column)
    names = [f"{path.name}[{row}]" for path, column in zip(files, columns, strict=True) for row in range(len(column))]
    return Source(name, split, known, labels, images, names)


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError("reading Parquet needs pyarrow, which is not installed. Install it with: pip install 'triptych[data]'") from None
    return pyarrow.parquet


def _columns(path: Path, present: list[str]) -> tuple[str, str]:
    image = next((column for column in IMAGE_COLUMNS if column in present), None)
    label = next((column for column in LABEL_COLUMNS if column in present), None)
    if image is None or label is None:
        raise InputRefused(f"{path}: columns {', '.join(present)}; expected one of {IMAGE_COLUMNS} and one of {LABEL_COLUMNS}")
    return image, label


def _class_names(metadata: dict[bytes, bytes] | None, label_column: str) -> tuple[str, ...] | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label_column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


@dataclass(slots=True)
class _ParquetImages:
    """Encoded images of several files; one row group is in memory at a time, so that reading in order is cheap."""

    tables: list[Any]
    column: str
    _starts: np.ndarray = field(init=False)
    _groups: list[tuple[Any, int]] = field(init=False)
    _current: tuple[int, Any] = field(init=False, default=(-1, None))

    def __post_init__(self) -> None:
        self._groups = [(table, group) for table in self.tables for group in range(table.num_row_groups)]
        sizes = [table.metadata.row_group(group).num_rows for table, group in self._groups]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int, /) -> bytes:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._current[0] != number:
            table, group = self._groups[number]
            try:
                rows = table.read_row_group(group, columns=[f"{self.column}.bytes"]).column(0)
            except (OSError, ValueError) as error:
                raise InputRefused(f"row {index}: damaged Parquet file ({error})") from None
            self._current = (number, rows)
        row = self._current[1][index - int(self._starts[number])].as_py()
        content = row["bytes"] if isinstance(row, dict) else row
        if not isinstance(content, bytes):
            raise InputRefused(f"row {index}: the image column holds no bytes")
        return content
