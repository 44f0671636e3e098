"""From a path or a name to a `Source`: which of the known layouts lies there."""

from __future__ import annotations

from pathlib import Path

from triptych.core.errors import InputRefused, UsageError
from triptych.data import cifar10, digits, folders, parquet
from triptych.data import ground_truth as truth
from triptych.data.source import Source

# What a split is called in the wild; the first name is ours.
SPLITS = {"train": ("train", "training"), "test": ("test", "validation", "val", "valid")}
_PARQUET_FOLDERS = ("", "data", "plain_text")
_LAYOUTS = """known layouts:
  digits                                     the embedded digits
  train-*.parquet, test-*.parquet            the Hub's Parquet layout (also in data/ or plain_text/)
  cifar-10-python.tar.gz, cifar-10-batches-py, cifar-10-binary.tar.gz, cifar-10-batches-bin
  <class>/*.JPEG                             class folders (also in images/, val/, test/, train/)
  ILSVRC2012_val_00000001.JPEG ...           flat images with a ground-truth file"""


def open_source(path_or_name: str | Path, split: str = "test", *, ground_truth: Path | None = None, synsets: Path | None = None) -> Source:
    """The images and labels at a path, or the embedded `digits`; `split` is `train` or `test` (which stands for validation, too).

    `ground_truth` and `synsets` are for flat ImageNet folders (`data/ground_truth.py`). Raises UsageError for a path, name or split
    that does not exist, InputRefused for files that are damaged or unsafe.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    path = Path(path_or_name)
    if str(path_or_name) == "digits":
        return digits.open_digits(split)
    if path.is_dir():
        return _open_folder(path, split, ground_truth, synsets)
    if path.is_file():
        return _open_file(path, split)
    raise UsageError(f"no data at {path_or_name}; {_LAYOUTS}")


def _open_file(path: Path, split: str) -> Source:
    if path.name.endswith((".tar.gz", ".tgz")):
        return cifar10.open_archive(path, split)
    if path.suffix == ".parquet":
        return parquet.open_parquet(path.stem, split, [path])
    raise InputRefused(f"{path}: not a data set that Triptych reads; {_LAYOUTS}")


def _open_folder(root: Path, split: str, ground_truth: Path | None, synsets: Path | None) -> Source:
    files = _parquet_files(root, split)
    if files:
        return parquet.open_parquet(root.resolve().name, split, files)
    for folder in (root, *(root / name for name in cifar10.FOLDERS)):
        if cifar10.holds_batches(folder):
            return cifar10.open_folder(folder, split)
    for archive in cifar10.ARCHIVES:
        if (root / archive).is_file():
            return cifar10.open_archive(root / archive, split)
    return _open_images(root, split, ground_truth, synsets)


def _parquet_files(root: Path, split: str) -> list[Path]:
    """The files of a split; UsageError when there are Parquet files, but of other splits."""
    others: list[Path] = []
    for folder in _PARQUET_FOLDERS:
        for name in SPLITS[split]:
            files = sorted((root / folder).glob(f"{name}-*.parquet")) + sorted((root / folder).glob(f"{name}.parquet"))
            if files:
                return files
        others += sorted((root / folder).glob("*.parquet"))
    if others:
        raise UsageError(f"{root}: no {split} split among {', '.join(path.name for path in others[:4])}")
    return []


def _open_images(root: Path, split: str, ground_truth: Path | None, synsets: Path | None) -> Source:
    """Class folders, else flat images whose labels are known: ImageNet's own `test/` has none and is passed over for `val/`."""
    candidates = [folder for folder in (root / name for name in (*SPLITS[split], "images", "")) if folder.is_dir()]
    for folder in candidates:
        if ground_truth is None and folders.class_folders(folder):
            return folders.open_class_folders(folder, root.resolve().name, split)
        labels = ground_truth or truth.find(folder)
        if labels is not None and folders.image_paths(folder):
            return folders.open_flat(folder, root.resolve().name, split, labels, synsets or truth.find_synsets(folder))
    if any(folders.image_paths(folder) for folder in candidates):
        usual = ", ".join(truth.GROUND_TRUTH_FILES)
        raise UsageError(f"{root}: images without class folders need labels: give --ground-truth FILE, or put one of {usual} beside them")
    raise InputRefused(f"{root}: no data set found there; {_LAYOUTS}")
