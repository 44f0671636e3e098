"""Directories that are either whole or absent, and a manifest that proves it. Standard library only.

Files go into a hidden sibling directory, are synced, and the directory is renamed into place; a crash leaves at worst a hidden
`.NAME.*.partial` beside an untouched original. `manifest.json` is written last: size and SHA-256 of every file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from triptych.core.errors import InputRefused, StorageError

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 1
LARGEST_JSON = 16 * 2**20
"""Bytes; far above any label list, far below what would hurt to parse."""

_REASONS = {
    errno.ENOSPC: "no space is left on the device; free some or choose another directory",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another directory",
    errno.EACCES: "permission denied; choose a directory you may write to",
    errno.EPERM: "permission denied; choose a directory you may write to",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EEXIST: "it exists already; choose another directory or ask to overwrite it (overwrite=True, --overwrite)",
    errno.ENOTEMPTY: "it exists already; choose another directory or ask to overwrite it (overwrite=True, --overwrite)",
}


@contextlib.contextmanager
def new_directory(target: str | os.PathLike[str], *, overwrite: bool, replaceable: frozenset[str]) -> Iterator[Path]:
    """A temporary directory to fill; it becomes `target`, at once and durably, when the block ends without an error.

    `overwrite` replaces an existing directory, but only one whose entries are all in `replaceable`: nobody's own files are lost.
    Raises StorageError when `target` exists or cannot be written.
    """
    final = Path(os.path.realpath(target))
    partial = final.parent / f".{final.name}.{secrets.token_hex(4)}.partial"
    try:
        _check_target(final, overwrite, replaceable)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _sync(partial)
        _put_in_place(partial, final, overwrite)
        _sync(final.parent)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
        raise StorageError(f"cannot write {final}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_target(final: Path, overwrite: bool, replaceable: frozenset[str]) -> None:
    nearest = next(parent for parent in final.parents if os.path.lexists(parent))
    if not os.path.isdir(nearest):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    if not os.path.lexists(final):
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "exists", str(final))
    if not final.is_dir():
        raise StorageError(f"cannot write {final}: it is a file, and only a directory can be overwritten; choose another name")
    foreign = sorted(entry.name for entry in final.iterdir() if entry.name not in replaceable)
    if foreign:
        raise StorageError(f"will not overwrite {final}: it holds files that are not part of a checkpoint: {', '.join(foreign)}")


def _put_in_place(partial: Path, final: Path, overwrite: bool) -> None:
    if not (overwrite and final.exists()):
        os.rename(partial, final)
    elif not _exchange(partial, final):
        retired = partial.with_suffix(".old")
        os.rename(final, retired)
        try:
            os.rename(partial, final)
        except OSError:
            os.rename(retired, final)
            raise
        shutil.rmtree(retired, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one atomic step (Linux renameat2, RENAME_EXCHANGE); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0)


def write_file(path: Path, data: bytes) -> None:
    """Write and sync one file."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def storing(path: Path, advice: str = "name another place with --out") -> Iterator[None]:
    """StorageError, naming `path` and what to do, in place of an OSError: disk full, read-only, vanished."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"cannot write {path}: {reason[:1].lower()}{reason[1:]}; {advice}") from error


def make_directory(path: Path) -> None:
    """The directory, where it is missing. StorageError when it cannot be made."""
    with storing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file under another name and move it into place: a reader sees the old file or the new one. OSError when that fails."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(partial, path)


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """Readable JSON; the same data gives the same bytes."""
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_with_manifest(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write `files`, then the manifest that vouches for them."""
    for name, data in files.items():
        write_file(directory / name, data)
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    write_file(directory / MANIFEST, json_bytes({"schema": MANIFEST_SCHEMA, "files": entries}))


def _sync(directory: Path) -> None:
    if os.name != "posix":  # Windows cannot open a directory; its rename is all there is.
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verified_files(directory: Path) -> dict[str, bytes]:
    """Every file of the manifest, read once, its size and SHA-256 checked. Raises InputRefused naming the first bad file."""
    return {name: _verified(directory, name, entry) for name, entry in _manifest(directory).items()}


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    data = parse_json(read_regular(path, LARGEST_JSON), path)
    if data.get("schema") != MANIFEST_SCHEMA:
        raise InputRefused(f"{path}: unknown schema {data.get('schema')!r}; this version of triptych reads schema {MANIFEST_SCHEMA}")
    files = data.get("files")
    if not isinstance(files, dict):
        raise InputRefused(f"{path}: 'files' is missing or not an object")
    return files


def _verified(directory: Path, name: str, entry: Any) -> bytes:
    if name in ("", ".", "..", MANIFEST) or any(character in name for character in "/\\:\0"):
        raise InputRefused(f"{directory / MANIFEST}: {name!r} is not a plain file name; a manifest lists only files beside it")
    path = directory / name
    size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if not isinstance(size, int) or not isinstance(digest, str):
        raise InputRefused(f"{directory / MANIFEST}: the entry of {name!r} lacks 'size' or 'sha256'")
    data = read_regular(path, size)
    if len(data) != size:
        raise InputRefused(f"{path} is {len(data):,} bytes, its manifest says {size:,}: it was truncated or altered; fetch it again")
    if hashlib.sha256(data).hexdigest() != digest.lower():
        raise InputRefused(f"{path} was altered: its SHA-256 is not the one in {MANIFEST}; fetch it again")
    return data


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """The bytes of a regular file that lies where its path says. InputRefused for anything else, or above `limit` bytes."""
    try:
        if path.is_symlink() and Path(os.path.realpath(path)).parent != Path(os.path.realpath(path.parent)):
            raise InputRefused(f"{path} is a symbolic link out of its directory; copy the file itself")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputRefused(f"{path} is not a regular file")
        if limit is not None and status.st_size > limit:
            raise InputRefused(f"{path} is {status.st_size:,} bytes, at most {limit:,} were expected: it was altered; fetch it again")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputRefused(f"{path} is missing; a checkpoint is complete only with every file of its {MANIFEST}") from None
    except OSError as error:
        raise InputRefused(f"{path} cannot be read: {os.strerror(error.errno) if error.errno else error}") from error


def parse_json(data: bytes, source: Path) -> dict[str, Any]:
    """A JSON object; InputRefused naming `source` for anything else."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{source}: not valid JSON ({str(error) or 'nested too deeply'})") from None
    if not isinstance(parsed, dict):
        raise InputRefused(f"{source}: expected a JSON object, found {type(parsed).__name__}")
    return parsed
