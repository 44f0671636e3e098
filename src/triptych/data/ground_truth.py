"""Labels of the flat ImageNet validation set: which line of which file says what an image shows.

A ground-truth file has a line an image, in the order of the file names, or lines that name their image:

- `n01751748`                        `synset_labels.txt`: the WordNet id itself;
- `ILSVRC2012_val_00000001,n01751748 23 40 ...`   Kaggle's `LOC_val_solution.csv`: named lines in any order;
- `490`                              the devkit's `ILSVRC2012_validation_ground_truth.txt`: an ILSVRC2012_ID, 1 ... 1000.

ILSVRC2012_IDs are *not* in the sorted order of WordNet ids that classifiers use (490 is class 65), so a file of ids needs a second
one: `synsets`, whose n-th line starts with the WordNet id of id n, or the devkit's own `meta.mat`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

from triptych.core.errors import InputRefused, UsageError
from triptych.data import images as image_files

GROUND_TRUTH_FILES = ("synset_labels.txt", "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt")
SYNSET_FILES = ("meta.mat",)
_DEVKIT = ("ILSVRC2012_devkit_t12/data", "data")

_LINE = re.compile(r"(?:(?P<image>[^\s,]+)[\s,]+)?(?P<label>n\d{8}|\d+)(?:[\s,].*)?")
_WNID = re.compile(r"n\d{8}")
# The first labels of the devkit's file: with these, a sorted list of synsets cannot be the right key.
_DEVKIT_START = ["490", "361", "171", "822", "297"]


def find(root: Path) -> Path | None:
    """A ground-truth file with a usual name beside the images or above them."""
    return _beside(root, GROUND_TRUTH_FILES)


def find_synsets(root: Path) -> Path | None:
    """The devkit's `meta.mat`, when it lies beside the images or above them."""
    return _beside(root, SYNSET_FILES)


def _beside(root: Path, names: Sequence[str]) -> Path | None:
    folders = [base / sub for base in (root, root.parent) for sub in ("", *_DEVKIT)]
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def wnids_of(paths: Sequence[Path], ground_truth: Path, synsets: Path | None) -> list[str]:
    """The WordNet id of each image. Raises InputRefused when lines and images do not match, or ids cannot be told apart."""
    rows = _rows(ground_truth)
    labels = _by_name(paths, rows, ground_truth) if rows[0][0] is not None else _by_position(paths, rows, ground_truth)
    numeric = [label for label in labels if not _WNID.fullmatch(label)]
    if not numeric:
        return labels
    if len(numeric) < len(labels):
        raise InputRefused(f"{ground_truth}: mixes WordNet ids and numbers")
    return _translated(labels, [label for _, label in rows], ground_truth, synsets)


def _rows(path: Path) -> list[tuple[str | None, str]]:
    """(image or None, label) of every line; a first line that is not one is a header."""
    rows: list[tuple[str | None, str]] = []
    for number, line in enumerate(_lines(path), start=1):
        match = _LINE.fullmatch(line)
        if match is not None:
            rows.append((match["image"], match["label"]))
        elif number > 1:
            raise InputRefused(f"{path}: line {number} is neither a WordNet id nor a number: {line[:60]!r}")
    if not rows:
        raise InputRefused(f"{path}: holds no label")
    return rows


def _lines(path: Path) -> list[str]:
    try:
        text = image_files.read(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputRefused(f"{path}: not a text file") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _by_name(paths: Sequence[Path], rows: Sequence[tuple[str | None, str]], file: Path) -> list[str]:
    label_of = {Path(image or "").stem: label for image, label in rows}
    missing = [path.name for path in paths if path.stem not in label_of]
    if missing:
        raise InputRefused(f"{file}: no label for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    return [label_of[path.stem] for path in paths]


def _by_position(paths: Sequence[Path], rows: Sequence[tuple[str | None, str]], file: Path) -> list[str]:
    """A line an image, in the order of names; for a part of the official set, the number in the name is the line."""
    if len(rows) == len(paths):
        return [label for _, label in rows]
    numbers = [re.search(r"_(\d{8})$", path.stem) for path in paths]
    lines = [int(number[1]) for number in numbers if number is not None]
    if len(lines) < len(paths) or not all(1 <= line <= len(rows) for line in lines):
        raise InputRefused(f"{file}: {len(rows)} labels for {len(paths)} images, whose names do not say which lines are theirs")
    return [rows[line - 1][1] for line in lines]


def _translated(labels: Sequence[str], all_labels: Sequence[str], ground_truth: Path, synsets: Path | None) -> list[str]:
    """ILSVRC2012_IDs -> WordNet ids."""
    if synsets is None:
        raise InputRefused(
            f"{ground_truth}: its numbers are ambiguous. The devkit's ILSVRC2012_IDs (1 ... 1000) are not in the order of the classes "
            "(id 490 is class 65); give --synsets FILE, whose n-th line is the WordNet id of id n (or the devkit's meta.mat), "
            "or a ground truth of WordNet ids"
        )
    wnids = _meta_wnids(synsets) if synsets.suffix == ".mat" else _synset_lines(synsets)
    if all_labels[: len(_DEVKIT_START)] == _DEVKIT_START and wnids == sorted(wnids):
        raise InputRefused(f"{synsets}: in sorted order, but the devkit's ids in {ground_truth} follow another; use its meta.mat")
    outside = sorted({label for label in labels if not 1 <= int(label) <= len(wnids)}, key=int)
    if outside:
        raise InputRefused(
            f"{ground_truth}: ids {', '.join(outside[:5])} are not lines of {synsets} (ids count from 1; it has {len(wnids)})"
        )
    return [wnids[int(label) - 1] for label in labels]


def _synset_lines(path: Path) -> list[str]:
    wnids = [line.split()[0].rstrip(",") for line in _lines(path)]
    wrong = next((wnid for wnid in wnids if not _WNID.fullmatch(wnid)), None)
    if wrong is not None or len(set(wnids)) < len(wnids):
        raise InputRefused(
            f"{path}: every line must start with a WordNet id of its own, such as n01440764" + (f", not {wrong!r}" if wrong else "")
        )
    return wnids


def _meta_wnids(path: Path) -> list[str]:
    """WordNet ids by ILSVRC2012_ID from the devkit's `meta.mat`: its rows without children are the 1000 classes."""
    try:
        loadmat = importlib.import_module("scipy.io").loadmat
    except ImportError:
        raise UsageError(
            "reading meta.mat needs scipy: pip install scipy, or give --synsets a text file with a WordNet id a line"
        ) from None
    try:
        rows = loadmat(path, squeeze_me=True)["synsets"]
        classes = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if int(row["num_children"]) == 0}
        return [classes[number] for number in range(1, len(classes) + 1)]
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise InputRefused(f"{path}: not the devkit's meta.mat ({type(error).__name__}: {error})") from None
