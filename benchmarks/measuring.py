"""What the measuring scripts of this folder share: the head of a record, a file that is written whole, and tables in a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from triptych.core import storage
from triptych.core.environment import environment

RESULTS = Path(__file__).parent / "results"


def head(command: str) -> dict[str, Any]:
    """What every record begins with: its schema, the command that makes it, and the environment it was made in."""
    return {"schema": 1, "command": command, "environment": environment()}


def write_json(path: Path, data: Any) -> None:
    """Replace `path` by the JSON of `data`, whole or not at all; a number that does not exist is null, and NaN a ValueError."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_whole(path, text)


def marked(name: str, content: str) -> str:
    """A part of a document that a script writes, between its marks."""
    return f"<!-- begin {name} -->\n{content}\n<!-- end {name} -->"


def fill(document: Path, blocks: dict[str, str]) -> None:
    """Replace these parts of a document."""
    text = document.read_text()
    for name, content in blocks.items():
        before, _, rest = text.partition(f"<!-- begin {name} -->\n")
        text = before + marked(name, content) + rest.partition(f"<!-- end {name} -->")[2]
    document.write_text(text)
