"""The PyTorch room: the same models, checkpoint, optimizers and image pipeline, as PyTorch is written.

`Model.native` is an ordinary `nn.Module` whose `state_dict()` *is* the canonical checkpoint. Fulfils `core.contract.Room`.
"""

from __future__ import annotations

import torch
import torchvision

from triptych.in_pytorch.data import batches, decode, preprocess, resize
from triptych.in_pytorch.export import export
from triptych.in_pytorch.faults import PLANTINGS
from triptych.in_pytorch.lanes import contender, phases
from triptych.in_pytorch.model import Model, create_model
from triptych.in_pytorch.process import forget, numerics
from triptych.in_pytorch.profile import annotate, operators, profile
from triptych.in_pytorch.train import Trainer, create_trainer


def versions() -> dict[str, str]:
    """Versions of the libraries under this room."""
    return {"torch": torch.__version__, "torchvision": torchvision.__version__}


__all__ = [
    "Model", "PLANTINGS", "Trainer", "annotate", "batches", "contender", "create_model", "create_trainer", "decode", "export", "forget",
    "numerics", "operators", "phases", "preprocess", "profile", "resize", "versions",
]  # fmt: skip
