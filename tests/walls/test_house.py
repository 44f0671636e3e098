"""How the house is kept: docstrings, sizes, names, and nothing in it that belongs to one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# Methods that a framework calls by these names; its own documentation describes them. The protocols of core/contract.py
# document theirs once for the three rooms.
HOOKS = {"forward", "call", "build", "setup", "get_config", "compute_output_shape", "extra_repr", "from_config"}
JUNK = {"utils", "util", "helpers", "helper", "common", "misc"}
FUNCTION_LINES, FILE_LINES = 60, 400

each_source = pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT / "src")))


def promised() -> set[str]:
    """Methods documented by a protocol of the contract."""
    tree = ast.parse((ROOT / "src/triptych/core/contract.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases)]
    return {node.name for each in classes for node in each.body if isinstance(node, ast.FunctionDef)}


def undocumented(source: str, excused: set[str] = HOOKS) -> list[str]:
    """The module, public classes, functions and methods without a docstring."""
    tree = ast.parse(source)
    return [name for name, node in _public(tree) if name.rpartition(".")[2] not in excused and not ast.get_docstring(node)]


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    yield "module", tree
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
            continue
        yield node.name, node
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inner.name.startswith("_"):
                yield f"{node.name}.{inner.name}", inner


@each_source
def test_public_things_have_docstrings(file: Path) -> None:
    in_room = any(part.startswith("in_") for part in file.parts)
    assert undocumented(file.read_text(), HOOKS | promised() if in_room else HOOKS) == []


def test_the_docstring_check_sees_a_bare_function() -> None:
    source = '"""Module."""\ndef f(): ...\nclass A:\n    """A."""\n    def g(self): ...\n    def _h(self): ...\n    def forward(self): ...'
    assert undocumented(source) == ["f", "A.g"]
    assert undocumented("x = 1") == ["module"]


@each_source
def test_files_and_functions_are_small(file: Path) -> None:
    text = file.read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert text.count("\n") <= FILE_LINES
    assert [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES] == []
    assert file.stem not in JUNK, "a thing without a home is a missing concept"


def test_tests_can_fail() -> None:
    weak = []
    for file in TESTS:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                asserts = any(isinstance(inner, ast.Assert) for inner in ast.walk(node))
                if not asserts and not re.search(r"\b(raises|warns|assert_\w+|check_\w+)\(", ast.unparse(node)):
                    weak.append(f"{file.relative_to(ROOT)}:{node.name}")
    assert weak == []


def kept() -> list[Path]:
    """Files that git keeps, or would keep; without git (an unpacked archive), the sources and tests."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return [*SOURCES, *TESTS]
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def package_indexes() -> set[str]:
    """Hosts and folders of this machine's package indexes."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    places = " ".join(re.findall(r"(?:index-url|find-links)='([^']*)'", done.stdout)).split()
    return {re.sub(r"^\w+://(\w+:\w+@)?([^/]*)(/.*)", r"\2", place) or place.removeprefix("file://") for place in places}


def of_this_machine() -> set[str]:
    """Strings that would tie a file to the machine it was written on."""
    folders = {folder for folder in (ROOT, Path(sys.base_prefix)) if len(folder.parts) > 2}
    return {f"{folder}/" for folder in folders | {Path.home()} - {Path("/")}} | package_indexes()


def test_no_file_names_this_machine() -> None:
    forbidden = of_this_machine()
    found = [
        f"{file.relative_to(ROOT)}: {text}"
        for file in kept()
        for text in forbidden
        if text.encode() in file.read_bytes()
    ]  # fmt: skip
    assert found == []


def test_no_unfinished_marks_and_no_index_options() -> None:
    marks = re.compile("|".join(["TO" + "DO", "FIX" + "ME", r"\bX" + r"XX\b", "--(extra-)?index-" + "url", "--trusted-" + "host"]))
    texts = [file for file in kept() if file.suffix in {".py", ".md", ".toml", ".sh", ".yaml", ".html", ".css", ".in", ".txt", ""}]
    assert len(texts) > 20
    assert [str(file.relative_to(ROOT)) for file in texts if marks.search(file.read_text(errors="replace"))] == []
