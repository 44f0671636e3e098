"""Small YAML files that a user writes, recipes and suites: found, read within bounds, and checked by a pydantic model.

Shipped ones lie in a folder of the package and are named without their ending; any other file is named by its path.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from triptych.core.errors import InputRefused, UsageError

LARGEST = 2**20
"""Bytes; far above any file of this kind, far below what would hurt to parse."""
ENDINGS = (".yaml", ".yml")

Checked = TypeVar("Checked", bound=BaseModel)


def shipped(folder: str) -> list[str]:
    """Names of the files in a folder of the package."""
    entries = resources.files("triptych").joinpath(folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def read(name: str, kind: str, folder: str) -> str:
    """The text of a shipped file, or of the one at a path; `kind` is what a message calls it.

    UsageError for an unknown name; InputRefused for a file that cannot be read, is too large, or no text.
    """
    names = shipped(folder)
    if name.endswith(ENDINGS):
        return _bounded(Path(name), kind, names)
    if name in names:
        return resources.files("triptych").joinpath(folder, f"{name}.yaml").read_text(encoding="utf-8")
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UsageError(f"unknown {kind} {name!r}; {hint}shipped: {', '.join(names)}; or give the path of a .yaml file")


def _bounded(path: Path, kind: str, names: list[str]) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise InputRefused(f"{path}: larger than {LARGEST // 2**20} MiB; that is no {kind}")
        return data.decode()
    except OSError as error:
        raise InputRefused(f"{path}: {(error.strerror or str(error)).lower()}; shipped {kind}s: {', '.join(names)}") from None
    except UnicodeDecodeError:
        raise InputRefused(f"{path}: not a text file in UTF-8") from None


def mapping(text: str, source: str, kind: str) -> dict[str, Any]:
    """YAML's mapping. InputRefused for anything else, and for anchors and aliases, with which a short file can unfold into a huge one."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if getattr(event, "anchor", None) is not None:
                raise InputRefused(f"{source}: anchors and aliases (&, *) are not taken; write the values out")
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputRefused(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputRefused(f"{source}: a {kind} is a mapping of names to values; found {type(data).__name__}")
    return data


def checked(model: type[Checked], data: Mapping[str, Any], error: type[InputRefused] | type[UsageError], source: str) -> Checked:
    """The model that the data describes; `error`, with every wrong value, when they describe none."""
    try:
        return model.model_validate(data)
    except ValidationError as found:
        lines = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}; given {each['input']!r}" for each in found.errors()]
        raise error(f"{source}: {len(lines)} wrong value(s):\n  " + "\n  ".join(lines)) from None
