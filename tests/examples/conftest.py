"""Builds examples/cpp as its README tells, twice: the programs, and what prepares images with the sanitizers of the compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "examples" / "cpp"
CMAKE = {"torch": "share/cmake", "openvino": "cmake"}
"""Where a wheel has what CMake finds it by."""


def folder(package: str) -> Path | None:
    """Of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


def build(target: Path, *options: str) -> Path:
    """Configure and build, warnings being errors; the folder with the programs. Skips where there is nothing to build with."""
    compiler = os.environ.get("CXX", "c++")
    absent = [tool for tool in ("cmake", compiler) if shutil.which(tool) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not found: examples/cpp is not built")
    headers = "#include <cstdio>\n#include <jpeglib.h>\n#include <yaml.h>\n"
    if subprocess.run([compiler, "-x", "c++", "-E", "-"], input=headers.encode(), capture_output=True, check=False).returncode:
        pytest.skip("no headers of libjpeg and libyaml (libjpeg-dev, libyaml-dev): examples/cpp is not built")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (["cmake", "-S", str(SOURCES), "-B", str(target), *generator, *options], ["cmake", "--build", str(target)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return target


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs, one for each runtime that is installed."""
    prefixes = [str(found / below) for package, below in CMAKE.items() if (found := folder(package))]
    return build(tmp_path_factory.mktemp("programs"), f"-DCMAKE_PREFIX_PATH={';'.join(prefixes)}", "-DCMAKE_CXX_FLAGS=-Werror")


@pytest.fixture(scope="session")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program `prepare`, which stops at reads out of bounds, leaks and undefined behaviour."""
    flags = "-Werror -fsanitize=address,undefined -fno-sanitize-recover=all"
    return build(tmp_path_factory.mktemp("sanitized"), f"-DCMAKE_CXX_FLAGS={flags}") / "prepare"
