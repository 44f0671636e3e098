"""Converters whose pins no other library can live with: each in an environment of its own, made from its own lock. Standard library only.

Their script here is run by that environment's Python, by its path and isolated: it sees neither this package nor what is installed beside
it. It answers lines of JSON as every worker does (`core/conversation.py`).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Converter:
    """One row of the table: `requirements/NAME.txt` is its lock, `convert_NAME.py` its script."""

    name: str

    @property
    def variable(self) -> str:
        """The environment variable that names its Python."""
        return f"TRIPTYCH_{self.name.upper()}"

    @property
    def folder(self) -> str:
        """Its environment, beside ours, when the variable is not set."""
        return f".venv-{self.name}"

    def python(self) -> Path:
        """The Python of its environment, whether it is there or not."""
        named = os.environ.get(self.variable)
        return Path(named) if named else Path(sys.prefix).parent / self.folder / "bin" / "python"

    def command(self) -> list[str]:
        """The command line of its worker. `-I`: neither our packages nor the working directory can be imported there."""
        return [str(self.python()), "-I", str(Path(__file__).parent / f"convert_{self.name}.py")]


CONVERTERS = {row.name: row for row in (Converter("onnx2tf"),)}


def missing(name: str) -> str | None:
    """Why the converter `name` cannot be run here, with the exact command; None when it can. No path of this machine is told."""
    row = CONVERTERS[name]
    if os.access(row.python(), os.X_OK) and row.python().is_file():
        return None
    where = f"{row.variable} names no program" if os.environ.get(row.variable) else f"no {row.folder} beside this environment"
    return f"{name} needs an environment of its own ({where}). Build it with: make converters; or name its Python in {row.variable}"
