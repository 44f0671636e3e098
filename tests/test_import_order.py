"""All three frameworks in one process, whatever the order: TensorFlow and triton both carry LLVM and crash when loaded unluckily.

`core/contract.load` owns the import order. Each order runs in its own interpreter, because a wrong one is a segmentation fault.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable

import pytest

from triptych.core import contract

Python = Callable[..., "subprocess.CompletedProcess[str]"]

CREATE = """
import sys
import numpy as np
import triptych

images = np.linspace(-1.0, 1.0, 2 * 28 * 28, dtype=np.float32).reshape(2, 28, 28, 1)
logits = [triptych.create_model("mlp", framework=name, seed=1, device="cpu").predict(images) for name in {order!r}]
assert all(np.abs(one - logits[0]).max() < 1e-5 for one in logits), logits

import torch
import torchvision

# What loads triton when nobody has: torchvision's operators, torch.export, torch.compile.
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.9, 2.0]])
assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0]
program = torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),))
assert program.module()(torch.zeros(1, 3)).shape == (1, 2)
compiled = torch.compile(lambda x: torch.sin(x) * x + 1.0, backend={backend!r})
x = torch.linspace(0.0, 1.0, 8)
assert torch.allclose(compiled(x), torch.sin(x) * x + 1.0)
print("survived", file=sys.stderr)
"""
ORDERS = list(itertools.permutations(contract.FRAMEWORKS))
# Inductor writes C++ on a CPU; without a compiler the tracing half of torch.compile, which is what loads triton, still runs.
BACKEND = "inductor" if shutil.which("g++") or shutil.which("clang++") else "eager"

needs_all = pytest.mark.skipif(contract.installed() != list(contract.FRAMEWORKS), reason="needs all three frameworks installed")


def last_words(python: Python, program: str) -> tuple[int, str]:
    """Exit code (negative: killed by that signal) and the last line of stderr."""
    done = python("-c", program)
    return done.returncode, done.stderr.strip().rpartition("\n")[2]


@needs_all
@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_models_of_all_frameworks_in_one_process(python: Python, order: tuple[str, ...]) -> None:
    assert last_words(python, CREATE.format(order=order, backend=BACKEND)) == (0, "survived")


@needs_all
def test_after_the_user_imported_tensorflow(python: Python) -> None:
    program = "import tensorflow\n" + CREATE.format(order=("pytorch", "jax", "tensorflow"), backend=BACKEND)
    assert last_words(python, program) == (0, "survived")
