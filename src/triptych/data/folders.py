"""Folders of images: one folder a class, or the flat official ImageNet validation set with its ground truth.

Only regular files inside the root are read: a link that leads out of it is refused by name, never followed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core.errors import InputRefused
from triptych.data import ground_truth as truth
from triptych.data import images as image_files
from triptych.data.source import Source

CLASSES_FILE = "classes.json"


@dataclass(frozen=True, slots=True)
class FileImages:
    """Encoded images read from files when asked for. With a `root`, a file that resolves to outside of it is refused."""

    paths: Sequence[Path]
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> bytes:
        path = self.paths[index]
        if self.root is not None:
            _check_inside(path, self.root)
        return image_files.read(path)


def open_files(paths: Sequence[Path]) -> Source:
    """Single images without labels."""
    return Source("files", "none", (), np.full(len(paths), -1), FileImages(paths), [str(path) for path in paths])


def class_folders(root: Path) -> list[Path]:
    """The folders directly in `root` that hold images, sorted by name."""
    return [folder for folder in _visible(root) if folder.is_dir() and image_paths(folder)]


def image_paths(folder: Path) -> list[Path]:
    """The JPEG and PNG files directly in `folder`, by extension, sorted by name; nothing hidden."""
    return [path for path in _visible(folder) if path.suffix.lower() in image_files.EXTENSIONS]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _check_inside(path: Path, root: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputRefused(f"{path}: a link that leads out of {root}; copy the file into the folder")


def open_class_folders(root: Path, name: str, split: str) -> Source:
    """`root/<class>/*.JPEG`. With a `classes.json` in `root` or above it, its indices; else classes are numbered in sorted order.

    Raises InputRefused for a class folder that leads out of the root or is not in `classes.json`.
    """
    folders = class_folders(root)
    for folder in folders:
        _check_inside(folder, root)
    paths = [(path, folder.name) for folder in folders for path in image_paths(folder)]
    return _labeled(root, name, split, [path for path, _ in paths], [folder for _, folder in paths])


def open_flat(root: Path, name: str, split: str, ground_truth: Path, synsets: Path | None) -> Source:
    """A folder of images (`ILSVRC2012_val_00000001.JPEG` ...) labeled by a ground-truth file (`data/ground_truth.py`)."""
    paths = image_paths(root)
    return _labeled(root, name, split, paths, truth.wnids_of(paths, ground_truth, synsets))


def _labeled(root: Path, name: str, split: str, paths: list[Path], class_of: list[str]) -> Source:
    declared = next((read_classes(folder / CLASSES_FILE) for folder in (root, root.parent) if (folder / CLASSES_FILE).is_file()), None)
    classes, index_of = declared if declared is not None else _sorted_classes(class_of)
    unknown = sorted(set(class_of) - set(index_of))
    if unknown:
        raise InputRefused(f"{root}: classes {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''} are not in {CLASSES_FILE}")
    labels = np.array([index_of[each] for each in class_of], dtype=np.int64)
    return Source(name, split, classes, labels, FileImages(paths, root), [str(path.relative_to(root)) for path in paths])


def _sorted_classes(class_of: Iterable[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    classes = tuple(sorted(set(class_of)))
    return classes, {name: index for index, name in enumerate(classes)}


def read_classes(path: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class identifiers by index, and the index of each, from `[{"index", "wnid", "name"}]` or Keras' `{"0": [wnid, name]}`.

    Raises InputRefused unless the indices are 0 ... n - 1 and the identifiers differ.
    """
    try:
        rows = _class_rows(json.loads(image_files.read(path)))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputRefused(f"{path}: not a list of {{index, wnid, name}} ({type(error).__name__}: {error})") from None
    index_of = {wnid: index for index, wnid in rows}
    if sorted(index for index, _ in rows) != list(range(len(rows))) or len(index_of) != len(rows):
        raise InputRefused(f"{path}: indices must be 0 ... {len(rows) - 1}, each with its own identifier")
    return tuple(wnid for _, wnid in sorted(rows)), index_of


def _class_rows(data: Any) -> list[tuple[int, str]]:
    if isinstance(data, dict):
        return [(int(index), str(row[0])) for index, row in data.items()]
    return [(int(row["index"]), str(row["wnid"] if "wnid" in row else row["name"])) for row in data]
