"""What is refused before a runtime sees it: paths that lead out of the artefact, and code. Standard library only.

A format's own dangers are refused by its adapter (`runtimes/with_*.py`), which knows how to read it; here is what they share.
"""

from __future__ import annotations

import json
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from triptych.core.errors import InputRefused

LARGEST_JSON = 256 * 2**20
UNPACKED = 20
"""How many times its own size an archive may unpack to: weights hardly shrink, so that what grows a hundredfold is a bomb."""


def check(artefact: Path) -> None:
    """InputRefused unless this is a regular file, or a folder of regular files and folders, and an archive stays where it is unpacked."""
    for path in (artefact, *(artefact.rglob("*") if artefact.is_dir() and not artefact.is_symlink() else ())):
        _check_kind(path)
    if artefact.is_file() and zipfile.is_zipfile(artefact):
        _check_archive(artefact)


def _check_kind(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {error.strerror}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputRefused(f"{path} is a link or a special file; an artefact holds files and folders alone: copy the file itself")


def _check_archive(artefact: Path) -> None:
    with zipfile.ZipFile(artefact) as archive:
        for member in archive.infolist():
            if not inside(member.filename) or stat.S_ISLNK(member.external_attr >> 16):
                raise InputRefused(f"{artefact}: its member {member.filename!r} leads out of the archive")
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > UNPACKED * artefact.stat().st_size + 2**20:
        raise InputRefused(f"{artefact} would unpack to {unpacked:,} bytes, far more than weights do (a decompression bomb?)")


def inside(name: str) -> bool:
    """Whether a path that a file names stays below the folder of that file."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and not re.search(r"[\\\0:]", name)


def check_beside(artefact: Path, name: str) -> None:
    """InputRefused unless the file `name` that an artefact points to lies beside or below it, and is no link."""
    if not inside(name):
        raise InputRefused(f"{artefact} points to {name!r}, out of its directory; its data must lie beside it")
    path = artefact.parent / name
    if not path.is_file() or path.resolve() != artefact.parent.resolve() / PurePosixPath(name):
        raise InputRefused(f"{artefact} points to {name!r}, which is missing, or a link; its data must lie beside it")


# --- torch's archives ---------------------------------------------------------------------------------------------------------------

_OPERATOR = re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|mod|eq|ne|le|lt|ge|gt)")
_SYMBOL = re.compile(r"Symbol\('[a-z]\w*'(, (positive|integer|nonnegative)=True)*\)|[\d+*() -]")


def check_torch_export(artefact: Path) -> None:
    """InputRefused for a torch.export archive with a pickle that is loaded unrestricted, or Python that loading would evaluate.

    torch 2.14 unpickles what a config flags (`use_pickle`), custom objects and files of older versions, compiles `guards_code`, and hands
    symbolic shapes to `sympy.sympify`, which evaluates them. None of it is in what `torch.export.save` writes of our models.
    """
    with _archive(artefact, "torch.export") as archive:
        for name in archive.namelist():
            if re.search(r"/data/(weights|constants)/.*\.pt$", name):
                raise InputRefused(f"{artefact}: {name} is a pickle; write the file anew with torch.export.save")
            if re.search(r"/data/(weights|constants)/.*config\.json$", name):
                _check_payloads(artefact, _json(archive, name))
            if re.search(r"/models/[^/]+\.json$", name):
                _check_graph(artefact, _json(archive, name))


def _check_payloads(artefact: Path, config: Any) -> None:
    for name, payload in dict(config.get("config", {})).items():
        if payload.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", str(payload.get("path_name"))):
            raise InputRefused(f"{artefact}: {name!r} is stored as a pickle, which could run code; only plain tensors are loaded")


def _check_graph(artefact: Path, model: Any) -> None:
    for key, value in _entries(model):
        if key == "guards_code" and value:
            raise InputRefused(f"{artefact} carries guards, Python code that loading it would run")
        if key == "expr_str" and re.sub(_SYMBOL, "", str(value)):
            raise InputRefused(f"{artefact} has a shape {value!r}, which is no sum or product of symbols: loading it would evaluate it")
        if key == "target" and isinstance(value, str) and not _OPERATOR.fullmatch(value):
            raise InputRefused(f"{artefact} calls {value!r}; only PyTorch's own operators (torch.ops.aten) are run")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested JSON with its value."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            yield from each.items()
            pending += each.values()
        elif isinstance(each, list):
            pending += each


def check_torchscript(artefact: Path) -> None:
    """InputRefused for what is no TorchScript archive, or has code that reaches files, or operators that are not PyTorch's own.

    Its code is run by torch's interpreter, which knows no Python, and its pickles are read by torch's own reader, which builds nothing
    but what the code declares. Yet that interpreter can write a file (`aten::save`) and map one (`aten::from_file`), even while loading.
    """
    with _archive(artefact, "TorchScript") as archive:
        if not any(re.search(r"/constants\.pkl$", name) for name in archive.namelist()):
            raise InputRefused(f"{artefact} is not a TorchScript archive; weights alone are read by `triptych convert`")
        for name in archive.namelist():
            if re.search(r"/code/.*\.py$", name):
                found = re.search(r"\b(save|from_file)\s*\(|\bops\.(?!prim\b|aten\b)\w+", archive.read(name).decode(errors="replace"))
                if found:
                    raise InputRefused(f"{artefact}: {name} calls {found[0]!r}, which a model has no use for")


def _archive(artefact: Path, kind: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(artefact)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputRefused(f"{artefact} is not a {kind} archive ({error})") from None


def _json(archive: zipfile.ZipFile, name: str) -> Any:
    if archive.getinfo(name).file_size > LARGEST_JSON:
        raise InputRefused(f"{archive.filename}: {name} is larger than {LARGEST_JSON // 2**20} MiB")
    try:
        return json.loads(archive.read(name))
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{archive.filename}: {name} is not valid JSON ({error})") from None
