"""`export.json`, which lies beside an artefact and vouches for it: what was measured, and the size and hash of every file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from triptych.core import storage
from triptych.core.errors import InputRefused
from triptych.export import safety

NAME = "export.json"
SCHEMA = 1


def listed(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a directory but the record itself, by its path there."""
    files = {file.relative_to(directory).as_posix(): file for file in sorted(directory.rglob("*")) if file.is_file()}
    return {name: {"size": file.stat().st_size, "sha256": sha256(file)} for name, file in files.items() if name != NAME}


def read(directory: Path) -> dict[str, Any]:
    """The record of an exported artefact, its files verified. Raises InputRefused when one is altered, missing, a link, or not listed.

    The hashes tell damage from what was written; they do not tell who wrote it.
    """
    safety.check(directory)
    path = directory / NAME
    found = storage.parse_json(storage.read_regular(path, storage.LARGEST_JSON), path)
    if found.get("schema") != SCHEMA:
        raise InputRefused(f"{path}: unknown schema {found.get('schema')!r}; this version of triptych reads schema {SCHEMA}")
    stored, present = found.get("files"), listed(directory)
    if not isinstance(stored, dict) or stored != present:
        names = {*present, *(stored if isinstance(stored, dict) else ())}
        odd = sorted(name for name in names if not isinstance(stored, dict) or stored.get(name) != present.get(name))
        raise InputRefused(f"{directory}: {', '.join(odd) or NAME} is not what was exported; export it again")
    return found


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
