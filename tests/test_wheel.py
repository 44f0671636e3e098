"""The wheel, as a user gets it: built from a clean copy of the sources, installed into an empty folder, started with click alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
Python = Callable[..., "subprocess.CompletedProcess[str]"]


def pip(*arguments: str | Path) -> None:
    """Run pip without reaching for an index; the test fails with its output."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel. It is built from a copy: setuptools leaves build products beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.glob("triptych-*.whl")
    return built


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    kept = [file for file in (ROOT / "src/triptych").rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert {str(file.relative_to(ROOT / "src")) for file in kept} - packed == set()
    assert {"triptych/py.typed", "triptych/core/spec.py"} <= packed
    assert [name for name in packed if name.endswith("digits.npz")]
    assert [name for name in packed if name.startswith("triptych/report/templates/")]


def test_its_metadata_name_licence_command_and_extras(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata, entry_points = (
        archive.read(next(name for name in archive.namelist() if name.endswith(end))).decode() for end in ("/METADATA", "/entry_points.txt")
    )
    assert "License-Expression: Apache-2.0" in metadata
    assert [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert {f"Provides-Extra: {extra}" for extra in ("pytorch", "tensorflow", "jax", "all", "dev")} <= set(metadata.splitlines())
    assert "triptych = triptych.cli:main" in entry_points


@pytest.fixture(scope="module")
def bare(wheel: Path) -> dict[str, str]:
    """The environment of a machine that has our wheel and click, nothing else (with `python -S`: no site-packages)."""
    installed, libraries = wheel.parent / "installed", wheel.parent / "libraries"
    pip("install", "--no-index", "--no-deps", "--target", installed, wheel)
    shutil.copytree(Path(click.__file__).parent, libraries / "click")
    return {"PYTHONPATH": f"{installed}{os.pathsep}{libraries}"}


def test_it_runs_with_click_alone(bare: dict[str, str], python: Python) -> None:
    done = python("-S", "-m", "triptych.cli", "list", env=bare)
    assert done.returncode == 0, done.stderr
    assert "resnet50" in done.stdout
    where = python("-S", "-c", "import triptych; print(triptych.__file__)", env=bare)
    assert bare["PYTHONPATH"].startswith(str(Path(where.stdout.strip()).parents[1])), "the sources were tested, not the wheel"


LOAD = """
from triptych.core import contract, errors
try:
    contract.load("jax")
except errors.FrameworkMissing as error:
    print(error)
    raise SystemExit(error.exit_code)
"""


def test_a_missing_framework_is_exit_code_3_with_the_pip_line(bare: dict[str, str], python: Python) -> None:
    done = python("-S", "-c", LOAD, env=bare)
    assert done.returncode == 3, done.stderr
    assert "pip install 'triptych[jax]'" in done.stdout
