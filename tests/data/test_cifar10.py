"""CIFAR-10 in each of its distributions: the same images from all, and none of what an archive may do wrong."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core.errors import InputRefused, UsageError
from triptych.data import cifar10, open_source

PER_BATCH = 4


def batch(number: int) -> tuple[np.ndarray, list[int]]:
    """(4, 3072) uint8 planes and labels of one small batch; number 0 is the test batch."""
    planes = np.random.default_rng(number).integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8)
    return planes, [(number + i) % 10 for i in range(PER_BATCH)]


NUMBERS = {"test_batch": 0, **{f"data_batch_{i}": i for i in range(1, 6)}}


def python_files(protocol: int = 2) -> dict[str, bytes]:
    return {name: pickle.dumps({b"data": batch(n)[0], b"labels": batch(n)[1]}, protocol) for name, n in NUMBERS.items()}


def binary_files() -> dict[str, bytes]:
    records = {name: np.column_stack([np.array(batch(n)[1], np.uint8), batch(n)[0]]) for name, n in NUMBERS.items()}
    return {f"{name}.bin": rows.tobytes() for name, rows in records.items()}


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def written(layout: str, tmp_path: Path) -> Path:
    """One of the layouts, as a user would name it."""
    if layout == "python archive":
        return archive(tmp_path / "cifar-10-python.tar.gz", python_files())
    if layout == "binary archive":
        return archive(tmp_path / "cifar-10-binary.tar.gz", binary_files())
    if layout == "folder of an archive":
        return archive(tmp_path / "cifar-10-binary.tar.gz", binary_files()).parent
    if layout == "extracted python":
        return folder(tmp_path / "cifar-10-batches-py", python_files(protocol=4))
    if layout == "extracted python, protocol 5":
        return folder(tmp_path / "cifar-10-batches-py", python_files(protocol=5))
    return folder(tmp_path / "cifar-10-batches-bin", binary_files()).parent


LAYOUTS = [
    "python archive", "binary archive", "folder of an archive", "extracted python", "extracted python, protocol 5", "extracted binary",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_distribution_gives_the_same_images(layout: str, tmp_path: Path) -> None:
    path = written(layout, tmp_path)
    test, train = open_source(path, "test"), open_source(path, "train")
    assert (len(test), len(train)) == (PER_BATCH, 5 * PER_BATCH)
    assert test.classes == cifar10.CLASSES
    planes, labels = batch(3)
    images, train_labels = train.arrays()
    assert train_labels[8:12].tolist() == labels
    for image, plane in zip(images[8:12], planes, strict=True):
        np.testing.assert_array_equal(image[:, :, 1].ravel(), plane[1024:2048])
        assert image[5, 7, 2] == plane[2048 + 5 * 32 + 7]
    assert test.label(1) == 1
    assert train.sha256() != test.sha256()


def test_a_split_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no split 'dev'"):
        cifar10.open_archive(written("python archive", tmp_path), "dev")


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_runs_code_is_refused_unrun(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    files = python_files() | {"test_batch": pickle.dumps({b"data": batch(0)[0], b"labels": Exploit(marker)}, protocol)}
    path = archive(tmp_path / "cifar-10-python.tar.gz", files)
    with pytest.raises(InputRefused, match=r"test_batch: refused as a pickle.*it wants to run"):
        open_source(path, "test")
    assert not marker.exists()


BAD_BATCHES = {
    "not a pickle": (b"hello", "refused as a pickle"),
    "not a dictionary": (pickle.dumps([1, 2]), "expected"),
    "no data": (pickle.dumps({b"labels": [1]}), "does not hold images"),
    "objects": (pickle.dumps({b"data": np.array([{}], dtype=object), b"labels": [1]}), "array of type 'O8'"),
    "too few labels": (pickle.dumps({b"data": batch(0)[0], b"labels": [1]}), "does not hold images"),
    "labels beyond": (pickle.dumps({b"data": batch(0)[0], b"labels": [1, 2, 3, 10]}), "labels 1 ... 10"),
    "wide pixels": (pickle.dumps({b"data": batch(0)[0].astype(np.int32), b"labels": batch(0)[1]}), "does not hold images"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_damaged_batches_are_refused(case: str, tmp_path: Path) -> None:
    content, reason = BAD_BATCHES[case]
    path = folder(tmp_path / "cifar-10-batches-py", {"test_batch": content})
    with pytest.raises(InputRefused, match=reason):
        open_source(path, "test")


def test_labels_as_an_array_or_numpy_scalars_are_read(tmp_path: Path) -> None:
    for i, labels in enumerate((np.array(batch(0)[1]), list(np.array(batch(0)[1])))):
        path = folder(tmp_path / str(i), {"test_batch": pickle.dumps({"data": batch(0)[0], "labels": labels}, 2)})
        assert open_source(path, "test").labels.tolist() == batch(0)[1]


def test_an_incomplete_archive_names_what_is_missing(tmp_path: Path) -> None:
    path = archive(tmp_path / "cifar-10-python.tar.gz", {"data_batch_1": python_files()["data_batch_1"]})
    with pytest.raises(InputRefused, match="data_batch_2, data_batch_3, data_batch_4, data_batch_5 not found"):
        open_source(path, "train")


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    path = written("python archive", tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputRefused, match="damaged archive"):
        open_source(path, "train")


def test_an_archive_that_unpacks_too_far_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cifar10, "_MAX_ARCHIVE", 100_000)
    path = archive(tmp_path / "bomb.tar.gz", {"padding": bytes(1_000_000), **python_files()})
    with pytest.raises(InputRefused, match="unpacks to more than"):
        open_source(path, "test")


def test_a_header_that_claims_gigabytes_allocates_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cifar10, "_MAX_ARCHIVE", 1_000_000)
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2**40
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(2_000_000)))
    with pytest.raises(InputRefused, match=r"unpacks to more than|damaged"):
        open_source(path, "test")


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(binary_files()["test_batch.bin"])
    path = tmp_path / "links.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("../test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
    with pytest.raises(InputRefused, match="test_batch not found"):
        open_source(path, "test")
