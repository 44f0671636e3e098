"""What an error tells its reader, counted: nothing here is judged by hand. Standard library only."""

from __future__ import annotations

import linecache
import re
import traceback
from pathlib import Path
from typing import Any

from debugging.bugs import Bug

PROGRAM = Path(__file__).parent
"""Where the user's programs lie."""


def told(error: BaseException, bug: Bug, rooms: Path) -> dict[str, Any]:
    """The facts of one error, as Python prints it with all that caused it. `rooms` is the folder of the model's own code.

    The layer is named when the message has its whole path; the sizes are told when it has both numbers, other than as line numbers.
    `model_line` is the innermost line of the model's code that is shown, in the traceback or, as compilers do, in the message.
    """
    message, places = plain(str(error)), _places(error)
    model = [place for place in places if rooms in Path(place[0]).parents]
    return {
        "exception": f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins."),
        "message": message,
        "names_layer": names(message, bug.layer),
        "names_both_sizes": all(has_number(message, size) for size in (bug.right, bug.wrong)),
        "shows_call": any(Path(file).parent == PROGRAM for file, _ in places),
        "model_line": linecache.getline(*model[-1]).strip() if model else None,
        "traceback_lines": len("".join(traceback.format_exception(error)).splitlines()),
    }


def names(message: str, layer: str) -> bool:
    """Whether a message has a layer's whole path, with dots or slashes, as a word of its own or after `self.` or the root's slash."""
    path = r"[./]".join(map(re.escape, layer.split(".")))
    return re.search(rf"(?<![\w./])(?:self\.|/)?{path}(?![\w./]*\w)", message) is not None


def has_number(message: str, number: int) -> bool:
    """Whether a message has a number as one of its own or in a shape (`2x64`), and not as that of a line."""
    return re.search(rf"(?<![\d.A-Za-wyz_])(?<!line ){number}(?!\d)", message) is not None


def plain(message: str) -> str:
    """A message without what changes from machine to machine: the folders of files, and addresses in memory."""
    return re.sub(r"\b0x[0-9a-f]+\b", "0x...", re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+\.py)\b", r"\1", message))


def _places(error: BaseException) -> list[tuple[str, int]]:
    """(file, line) of every frame that is printed, the cause's first, then of those that the message tells."""
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    in_message = [(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', str(error))]
    return [*(_places(earlier) if earlier is not None else ()), *frames, *in_message]
