"""The PyTorch room: the same models, checkpoint, optimizers and image pipeline, as PyTorch is written.

`Model.native` is an ordinary `nn.Module` whose `state_dict()` *is* the canonical checkpoint. Fulfils `core.contract.Room`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision

from triptych.in_pytorch.data import batches, decode, preprocess, resize
from triptych.in_pytorch.faults import PLANTINGS
from triptych.in_pytorch.lanes import contender
from triptych.in_pytorch.model import Model, create_model
from triptych.in_pytorch.train import Trainer, create_trainer


@contextlib.contextmanager
def profile(directory: Path) -> Iterator[None]:
    """Trace what runs while open: a Chrome trace under `directory`, which TensorBoard's profiler and ui.perfetto.dev show."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    written = torch.profiler.tensorboard_trace_handler(str(directory), worker_name="pytorch")
    with torch.profiler.profile(activities=activities, on_trace_ready=written):
        yield


def versions() -> dict[str, str]:
    """Versions of the libraries under this room."""
    return {"torch": torch.__version__, "torchvision": torchvision.__version__}


__all__ = [
    "PLANTINGS", "Model", "Trainer", "batches", "contender", "create_model", "create_trainer", "decode", "preprocess", "profile",
    "resize", "versions",
]  # fmt: skip
