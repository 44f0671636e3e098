"""The Hub's Parquet layout: splits, class names, row groups, damage, and pyarrow missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core.errors import InputRefused, UsageError
from triptych.data import images as image_files
from triptych.data import open_source

CLASSES = ["cat", "dog", "frog"]


@pytest.fixture
def arrow() -> Any:
    pytest.importorskip("pyarrow", reason="pyarrow (triptych[data]) is not installed")
    import pyarrow
    import pyarrow.parquet

    return pyarrow


def write(arrow: Any, path: Path, first: int, rows: int, *, image: str = "img", named: bool = True, label: str = "label") -> None:
    """A file of `rows` images whose bytes say which row they are, in row groups of two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": f"image {i}".encode(), "path": f"{i}.png"} for i in range(first, first + rows)]
    table = arrow.table({image: images, label: [i % 3 for i in range(first, first + rows)]})
    info = {"info": {"features": {label: {"names": CLASSES, "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)} if named else None)
    arrow.parquet.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize("sub", ["", "plain_text", "data"])
def test_a_split_of_several_files(arrow: Any, sub: str, tmp_path: Path) -> None:
    write(arrow, tmp_path / sub / "test-00000-of-00002.parquet", 0, 5)
    write(arrow, tmp_path / sub / "test-00001-of-00002.parquet", 5, 4)
    write(arrow, tmp_path / sub / "train-00000-of-00001.parquet", 0, 3)
    source = open_source(tmp_path, "test")
    assert source.classes == tuple(CLASSES)
    assert source.labels.tolist() == [i % 3 for i in range(9)]
    assert source.names[6] == "test-00001-of-00002.parquet[1]"
    for i in (0, 8, 4, 5, 1):
        assert source.image(i) == f"image {i}".encode()
    assert len(open_source(tmp_path, "train")) == 3


def test_names_of_other_sets(arrow: Any, tmp_path: Path) -> None:
    write(arrow, tmp_path / "validation-00000-of-00001.parquet", 0, 4, image="image", named=False)
    source = open_source(tmp_path, "test")
    assert source.classes == ("0", "1", "2")
    assert len(open_source(tmp_path / "validation-00000-of-00001.parquet")) == 4


def test_another_split_is_not_silently_taken(arrow: Any, tmp_path: Path) -> None:
    write(arrow, tmp_path / "train-00000-of-00001.parquet", 0, 4)
    with pytest.raises(UsageError, match="no test split among train-00000"):
        open_source(tmp_path, "test")


def test_damage_and_foreign_columns_are_refused(arrow: Any, tmp_path: Path) -> None:
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(InputRefused, match="damaged Parquet"):
        open_source(tmp_path)
    write(arrow, path, 0, 4, label="fine_label")
    with pytest.raises(InputRefused, match="columns img, fine_label"):
        open_source(tmp_path)
    write(arrow, path, 0, 0)
    with pytest.raises(InputRefused, match="the test split is empty"):
        open_source(tmp_path)


def test_without_pyarrow_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"pip install 'triptych\[data\]'"):
        open_source(tmp_path)


def test_the_real_cifar10(real_data: Path) -> None:
    source = open_source(real_data / "cifar10", "test")
    assert len(source) == 10_000
    assert np.bincount(source.labels).tolist() == [1000] * 10
    pixels = image_files.decode(image_files.vet(source.image(9_999), "last", 3), 3)
    assert pixels.shape == (32, 32, 3)
