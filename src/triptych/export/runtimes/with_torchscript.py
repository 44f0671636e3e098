"""A TorchScript archive in torch's own interpreter, on the CPU; no Python of the model's is needed, nor run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from triptych.export import safety


def opened(artefact: Path) -> Callable[[np.ndarray], np.ndarray]:
    """(N, C, H, W) -> logits (N, classes)."""
    safety.check_torchscript(artefact)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, as docs/export.md tells
        module = torch.jit.load(str(artefact), map_location="cpu")

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(x)).numpy())

    return run


def versions() -> dict[str, str]:
    """The runtime's version."""
    return {"torch": torch.__version__}
