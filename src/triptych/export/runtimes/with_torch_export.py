"""A torch.export archive, as the graph module that it holds, on the CPU; no Python of the model's is needed."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from triptych.core.errors import InputRefused
from triptych.export import safety


def opened(artefact: Path) -> Callable[[np.ndarray], np.ndarray]:
    """(N, C, H, W) -> logits (N, classes)."""
    safety.check_torch_export(artefact)
    _check_example(artefact)
    module = torch.export.load(str(artefact)).module()

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(x)).numpy())

    return run


def _check_example(artefact: Path) -> None:
    """InputRefused when the example inputs need code to be read: torch, that fails to read them without, reads them with it."""
    with zipfile.ZipFile(artefact) as archive:
        for name in archive.namelist():
            if "/data/sample_inputs/" in name:
                try:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                except Exception as error:  # a hostile pickle can fail in any way at all
                    raise InputRefused(f"{artefact}: {name} cannot be read without running code ({type(error).__name__})") from None


def versions() -> dict[str, str]:
    """The runtime's version."""
    return {"torch": torch.__version__}
