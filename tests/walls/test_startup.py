"""The command line starts without what it does not need: numpy alone would cost it more than its whole budget."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

FORBIDDEN = [
    "numpy",
    "torch",
    "torchvision",
    "triton",
    "tensorflow",
    "keras",
    "jax",
    "flax",
    "optax",
    "rich",
    "safetensors",
    "PIL",
    "pydantic",
]
PROGRAM = """
import sys
from triptych.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("exit", end.code, file=sys.stderr)
print("loaded", sorted(set(sys.modules) & set({forbidden!r})), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["list"], ["list", "resnet*", "--json"], ["info", "resnet50"]], ids=" ".join
)
def test_no_heavy_module_is_loaded(python: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str]) -> None:
    done = python("-c", PROGRAM.format(forbidden=FORBIDDEN), *arguments)
    assert done.stdout, done.stderr
    assert done.stderr.splitlines() == ["exit 0", "loaded []"]


def test_import_triptych_loads_nothing_heavy(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = python("-c", f"import sys, triptych; triptych.list_models('resnet*'); print(sorted(set(sys.modules) & set({FORBIDDEN!r})))")
    assert done.stdout.strip() == "[]", done.stderr
