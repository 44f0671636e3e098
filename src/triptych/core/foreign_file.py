"""What a foreign weights file is, told from its bytes before anything parses it, and reading it without running it."""

from __future__ import annotations

import importlib
import mmap
import os
import zipfile
from pathlib import Path
from typing import Any

from triptych.core import contract, storage, tensor_file
from triptych.core.errors import InputRefused

_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = b"PK\x03\x04"
_PICKLE = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_ZIP_EXPANSION = 20
"""torch stores its zip entries uncompressed; an archive that claims to unfold further than this is a bomb."""

_KERAS_RESNET = (b"conv2_block1_1_conv", b"res2a_branch2a")
_KERAS_RESNET_V2 = b"conv2_block1_preact_bn"
_KERAS_V1 = (
    "holds the ResNet of keras.applications, which is ResNet v1: the stride sits on the first 1x1 convolution of a block "
    "(v1.5: on the 3x3), its convolutions have biases, and its BatchNorm epsilon is 1.001e-5 (here 1e-5). The same weights in a v1.5 model "
    "would compute something else. Take torchvision's or timm's weights instead"
)
_KERAS_V2 = "holds the ResNetV2 of keras.applications (pre-activation blocks), which is not in the catalogue; see `triptych list`"
_KERAS_OTHER = "is a Keras or other HDF5 file; `triptych convert` takes PyTorch files (.pth .pt .th .bin) and .safetensors"


def read(path: str | os.PathLike[str]) -> Any:
    """The content of a PyTorch or safetensors weights file: (nested) mappings, numpy arrays and plain values.

    The kind is told from the content, not the name. Only PyTorch's own format needs PyTorch installed (FrameworkMissing).
    Raises InputRefused, naming the file and what it is instead.
    """
    path = Path(path)
    _check_file(path)
    with path.open("rb") as file:
        head = file.read(512)
    reason = _not_weights(path, head)
    if reason:
        raise InputRefused(f"{path} {reason}")
    if path.suffix == ".safetensors" or _looks_like_safetensors(path, head):
        return tensor_file.decode(storage.read_regular(path), path)
    if not head.startswith((_ZIP, *_PICKLE)):
        raise InputRefused(f"{path} is neither a PyTorch checkpoint nor a safetensors file (it begins with {head[:8]!r})")
    room = contract.load("pytorch")
    return importlib.import_module(f"{room.__name__}.weights").read_file(path)


def _check_file(path: Path) -> None:
    if os.path.isdir(path):
        raise InputRefused(f"{path} is a directory; give one weights file")
    if not os.path.exists(path):
        raise InputRefused(f"{path}: no such file")
    if not os.path.isfile(path):
        raise InputRefused(f"{path} is not a regular file")
    if not os.access(path, os.R_OK):
        raise InputRefused(f"{path} cannot be read: permission denied")
    if os.path.getsize(path) == 0:
        raise InputRefused(f"{path} is empty")


def _not_weights(path: Path, head: bytes) -> str | None:
    """Why the file cannot hold PyTorch weights, as the rest of a sentence that begins with its name; None when it may."""
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "is an HTML or XML page, probably the error page of a failed download; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if head.startswith(_HDF5):
        return _hdf5_reason(path)
    if head.startswith(_ZIP):
        return _zip_reason(path)
    return None


def _hdf5_reason(path: Path) -> str:
    """HDF5 keeps the names of its groups as plain bytes: enough to know the model, without h5py."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _keras_reason(content)


def _keras_reason(content: bytes | mmap.mmap) -> str:
    if content.find(_KERAS_RESNET_V2) >= 0:
        return _KERAS_V2
    return _KERAS_V1 if any(content.find(name) >= 0 for name in _KERAS_RESNET) else _KERAS_OTHER


def _zip_reason(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return _archive_reason(path, archive)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"is a damaged or truncated zip archive ({error}); fetch it again"


def _archive_reason(path: Path, archive: zipfile.ZipFile) -> str | None:
    names = archive.namelist()
    inner = {name.partition("/")[2] for name in names}
    if sum(entry.file_size for entry in archive.infolist()) > _ZIP_EXPANSION * path.stat().st_size:
        return "claims to unfold to far more than its size; refused as a decompression bomb"
    if "model.weights.h5" in names:
        return _keras_reason(archive.read("config.json") if "config.json" in names else b"")
    if any(name.startswith("code/") for name in inner) or "constants.pkl" in inner:
        return "is a TorchScript archive, a program and not a checkpoint; refused. Save `model.state_dict()` instead"
    if "models/model.json" in inner or "archive_format" in inner:
        return "is an exported PyTorch program (.pt2), not a checkpoint; refused. Save `model.state_dict()` instead"
    if "data.pkl" not in inner:
        return "is a zip archive but not a PyTorch checkpoint (it holds no data.pkl)"
    damaged = archive.testzip()
    return f"is damaged: the checksum of its entry {damaged} is wrong; fetch it again" if damaged else None


def _looks_like_safetensors(path: Path, head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8
