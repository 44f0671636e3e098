"""Who may import whom, read from the syntax of whole files, function bodies included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "triptych"
ROOMS = {
    "in_pytorch": {"torch", "torchvision", "triton"},
    "in_tensorflow": {"tensorflow", "keras", "tf2onnx"},
    "in_jax": {"jax", "jaxlib", "flax", "optax", "orbax", "jax2onnx"},
}
FRAMEWORKS = set.union(*ROOMS.values()) | {"timm", "torchaudio"}
# What runs a framework's own formats, alone in its process; pyproject.toml tells import-linter the same.
RUNTIMES = {
    "with_torchscript": "torch",
    "with_torch_export": "torch",
    "with_aotinductor": "torch",
    "with_saved_model": "tensorflow",
    "with_keras": "keras",
    "with_stablehlo": "jax",
    "convert_onnx2tf": "tensorflow",
}
# Loaded before the command line knows what to do.
LIGHT = ["__init__.py", "cli", "core/__init__.py", "core/spec.py", "core/catalog.py", "core/contract.py", "core/errors.py"]


def files(*under: str) -> list[Path]:
    """Python files below the named folders (or the files themselves) of the package."""
    paths = [PACKAGE / name for name in under or [""]]
    found = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))
    assert found, f"nothing under {under}"
    return found


def room_of(file: Path) -> str | None:
    """`in_jax` for a file of that room, None for the framework-free rest."""
    top = file.relative_to(PACKAGE).parts[0]
    return top if top in ROOMS else None


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import statement, and of every import by a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in {"import_module", "__import__", "lazy_import", "run_module"}:
                yield node.lineno, node.args[0].value


def breaches(source: str, room: str | None) -> list[str]:
    """Imports that a file of `room` must not have."""
    allowed = ROOMS.get(room or "", set())
    bad = []
    for line, module in imports(ast.parse(source)):
        head, *rest = module.split(".")
        foreign_room = head == "triptych" and bool(rest) and rest[0] in ROOMS and rest[0] != room
        if (head in FRAMEWORKS and head not in allowed) or foreign_room:
            bad.append(f"line {line}: {module}")
    return bad


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_no_framework_but_its_own(file: Path) -> None:
    room = room_of(file)
    allowed_triton = file.relative_to(PACKAGE) == Path("core/contract.py")  # owns the import order (see test_import_order.py)
    found = [breach for breach in breaches(file.read_text(), room) if not (allowed_triton and breach.endswith(": triton"))]
    if file.parent in (PACKAGE / "export" / "runtimes", PACKAGE / "export" / "converters"):
        found = [breach for breach in found if breach.partition(": ")[2].split(".")[0] != RUNTIMES.get(file.stem)]
    assert found == []


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("import torch", None),
        ("def f():\n    import jax.numpy as jnp", None),
        ("def f():\n    from keras import layers", "in_pytorch"),
        ("import importlib\nimportlib.import_module('tensorflow')", "in_jax"),
        ("from triptych.in_jax import layers", "in_pytorch"),
        ("from triptych import in_jax", None),
        ("if TYPE_CHECKING:\n    import torch", "in_tensorflow"),
    ],
)
def test_the_check_sees_a_breach(source: str, room: str | None) -> None:
    assert len(breaches(source, room)) == 1


def test_the_check_lets_a_room_use_its_own() -> None:
    assert breaches("import torch\nfrom torchvision import ops\nfrom triptych.in_pytorch import layers", "in_pytorch") == []


def module_level(source: str) -> Iterator[str]:
    """Modules imported when the file is imported: neither in functions nor under TYPE_CHECKING."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from package import module` may import the module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)


def defined_in(module: str) -> Path | None:
    """The project's file behind `triptych.core.spec` or `triptych.core.spec.Spec`; None for a module that is not ours."""
    parts = module.split(".")
    while parts and parts[0] == "triptych":
        path = PACKAGE.joinpath(*parts[1:])
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
        parts.pop()
    return None


def heavy(source: str, seen: frozenset[Path] = frozenset()) -> set[str]:
    """What importing this source loads beyond the standard library, click and itself, through the project's own modules too."""
    found = set()
    for module in module_level(source):
        file = defined_in(module)
        if file is not None and file not in seen:
            found |= {f"{module} -> {name}" for name in heavy(file.read_text(), seen | {file})}
        elif file is None and module.split(".")[0] not in sys.stdlib_module_names | {"click"}:
            found.add(module)
    return found


@pytest.mark.parametrize("file", files(*LIGHT), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_light_module_loads_only_the_standard_library(file: Path) -> None:
    assert heavy(file.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import numpy",
        "try:\n    from rich import print\nexcept ImportError:\n    pass",
        "class A:\n    import pydantic",
        "from triptych.core import philox",
        "from triptych.core.philox import bits",
    ],
)
def test_the_check_sees_a_heavy_import(source: str) -> None:
    assert heavy(source)


@pytest.mark.parametrize(
    "source", ["def f():\n    import numpy", "import os, click", "from triptych.core import spec", "from triptych.core.spec import Spec"]
)
def test_the_check_lets_light_imports_pass(source: str) -> None:
    assert heavy(source) == set()
