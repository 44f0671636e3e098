"""What loading a checkpoint refuses: damage, lies and absurdities, each named by file or key."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, checkpoint, initialize, tensor_file
from triptych.core.errors import InputRefused

TINY = catalog.tiny(catalog.get_spec("resnet20"))
WEIGHTS = initialize.parity_weights(TINY, 7, "float32")


def rehash(directory: Path) -> None:
    """Make the manifest vouch for whatever lies in the directory now."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (directory / name).read_bytes()
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (directory / "manifest.json").write_text(json.dumps(manifest))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the JSON object in `path`."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved tiny ResNet."""
    return checkpoint.save(tmp_path / "saved", TINY, WEIGHTS)


def test_bfloat16_is_not_canonical(saved: Path) -> None:
    entries = {name: ("BF16", array.shape, array.size * 2) for name, array in WEIGHTS.items() if array.dtype.kind == "f"}
    (saved / "model.safetensors").write_bytes(raw_safetensors(entries))
    rehash(saved)
    with pytest.raises(InputRefused, match=r"wrong dtype: conv1\.weight is bfloat16"):
        checkpoint.load(saved)


def raw_safetensors(entries: dict[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """A safetensors file of zeros with the given (dtype, shape, bytes) entries."""
    header, offset = {}, 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(offset)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("position", [0.0, 0.5, 0.999])
def test_a_flipped_byte_is_refused_by_name(saved: Path, name: str, position: float) -> None:
    data = bytearray((saved / name).read_bytes())
    data[int(len(data) * position)] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(InputRefused, match=f"{name} was altered"):
        checkpoint.load(saved)


@pytest.mark.parametrize("keep", [0, 7, 0.7, 1.5])
def test_a_wrong_length_is_refused_by_name(saved: Path, keep: float) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes((data * 2)[: int(keep if keep in (0, 7) else len(data) * keep)])
    with pytest.raises(InputRefused, match=r"model\.safetensors is [\d,]+ bytes"):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_missing_file_is_refused_by_name(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(InputRefused, match=f"{name} is missing"):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_the_manifest_does_not_vouch_for_is_refused(saved: Path, name: str) -> None:
    edit_json(saved / "manifest.json", lambda data: data["files"].pop(name))
    with pytest.raises(InputRefused, match=f"does not list {name}"):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a/b", "a\\b", "C:x", "manifest.json"])
def test_the_manifest_cannot_point_outside(saved: Path, name: str) -> None:
    (saved.parent / "secret").write_text("x")
    edit_json(saved / "manifest.json", lambda data: data["files"].update({name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}))
    with pytest.raises(InputRefused, match="not a plain file name"):
        checkpoint.load(saved)


def test_links_out_and_special_files_are_refused(saved: Path) -> None:
    model = saved / "model.safetensors"
    shutil.move(model, saved.parent / "elsewhere")
    model.symlink_to(saved.parent / "elsewhere")
    with pytest.raises(InputRefused, match=r"model\.safetensors is a symbolic link out"):
        checkpoint.load(saved)
    model.unlink()
    os.mkfifo(model)
    with pytest.raises(InputRefused, match=r"model\.safetensors is not a regular file"):
        checkpoint.load(saved)


def test_a_linked_directory_is_fine(saved: Path) -> None:
    latest = saved.parent / "latest"
    latest.symlink_to(saved.name)
    assert np.array_equal(checkpoint.load(latest).weights["fc.weight"], WEIGHTS["fc.weight"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"schema": 2, "files": {}}', b'{"schema": 1}'])
def test_a_damaged_manifest_is_refused(saved: Path, content: bytes) -> None:
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(InputRefused, match=r"manifest\.json"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(schema_version=2),
        lambda config: config.pop("schema_version"),
        lambda config: config.pop("spec"),
        lambda config: config["spec"].update(family="rnn"),
        lambda config: config["spec"].update(surprise=1),
        lambda config: config["spec"].update(surprise={}),
        lambda config: config["spec"].update(num_classes=10.0),
        lambda config: config["spec"].update(num_classes="many"),
        lambda config: config["spec"].update(num_classes=10**30),
        lambda config: config["spec"]["stages"][0].update(blocks=10**6),
        lambda config: config["spec"]["stages"][0].update(stride=0),
        lambda config: config["spec"].update(stages=config["spec"]["stages"] * 100),
        lambda config: config["spec"].update(stem=3),
        lambda config: config.update(labels=["one"]),
        lambda config: config.update(labels=list(range(10))),
        lambda config: config.update(provenance=None),
    ],
)
def test_a_malformed_config_is_refused(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(saved / "config.json", change)
    rehash(saved)
    with pytest.raises(InputRefused, match=r"config\.json|model\.safetensors does not hold"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        (2**63 - 1).to_bytes(8, "little") + b"{}",
        (2**40).to_bytes(8, "little") + b"{" * 100,
        raw_safetensors({"conv1.weight": ("F32", (2**40, 2**40), 4)}),
        raw_safetensors({"conv1.weight": ("F32", (1,), 4)})[:-2],
        raw_safetensors({"conv1.weight": ("F8_E4M3", (4,), 4)}),
        b"\x80\x04\x95",
    ],
)
def test_absurd_safetensors_are_refused_by_name(saved: Path, content: bytes) -> None:
    (saved / "model.safetensors").write_bytes(content)
    rehash(saved)
    with pytest.raises(InputRefused, match=r"model\.safetensors"):
        checkpoint.load(saved)


@pytest.mark.parametrize(("change", "key"), [("drop", "layer2.1.bn2.running_var"), ("add", "layer9.weight")])
def test_a_rehashed_wrong_key_is_named(saved: Path, change: str, key: str) -> None:
    weights = dict(WEIGHTS)
    if change == "drop":
        del weights[key]
    else:
        weights[key] = np.zeros(3, np.float32)
    (saved / "model.safetensors").write_bytes(tensor_file.encode(weights))
    rehash(saved)
    with pytest.raises(InputRefused, match=key) as caught:
        checkpoint.load_weights(saved, TINY)
    assert "model.safetensors" in str(caught.value)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="no such checkpoint directory"):
        checkpoint.load(tmp_path / "none")
