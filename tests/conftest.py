"""What every test may ask for. No framework is imported here: tests load rooms through `triptych.core.contract.load`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Shared machines are slow at times, and a failure must come back when it is looked at: no deadline, fixed examples.
settings.register_profile("triptych", deadline=None, derandomize=True, database=None)
settings.load_profile("triptych")

# TensorFlow's C++ side logs its build options to stderr, which tests of the command line read.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python(tmp_path: Path) -> Python:
    """Run `python(*arguments)` in a new interpreter, in an empty folder, without warnings turned off."""

    def run(*arguments: str, env: dict[str, str] | None = None, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **(env or {})}, timeout=timeout, check=False
        )

    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets named by TRIPTYCH_DATA; without one, the test is skipped and says so."""
    folder = os.environ.get("TRIPTYCH_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real data: set TRIPTYCH_DATA to a folder with cifar10/ and imagenet-samples/")
    return Path(folder)
