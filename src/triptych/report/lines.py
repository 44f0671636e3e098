"""How much code a model takes in each framework: a count that formatting and documentation cannot change.

Counted are the statements of the syntax tree, without docstrings; beside them the lines of the same tree after one canonical
formatting (`ast.unparse`), also without docstrings and comments. Every file of a room counts; those of the models are told apart.
"""

from __future__ import annotations

import ast
from pathlib import Path

from triptych.core.contract import FRAMEWORKS
from triptych.core.environment import PACKAGE
from triptych.report.evidence import CodeCount

MODEL_FILES = ("layers.py", "resnet.py", "mlp.py", "vit.py")
"""The files that make up the models: layers and networks, not weights, training or data."""

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def count_rooms(root: Path = PACKAGE) -> tuple[CodeCount, ...]:
    """The files of every framework room under `root`, in the order of `FRAMEWORKS`."""
    rooms = {name: root / row.package.rpartition(".")[2] for name, row in FRAMEWORKS.items()}
    present = [(name, file) for name, room in rooms.items() for file in sorted(room.glob("*.py")) if file.name != "__init__.py"]
    return tuple(CodeCount(name, path.name, *count(path.read_text(encoding="utf-8"))) for name, path in present)


def count(source: str) -> tuple[int, int]:
    """(statements, lines after canonical formatting) of Python source, both without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    statements = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
    lines = [line for line in ast.unparse(tree).splitlines() if line.strip()]
    return statements, len(lines)
