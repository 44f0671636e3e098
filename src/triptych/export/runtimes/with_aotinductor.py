"""An AOTInductor package, on the CPU that it was compiled for. It is machine code: open none that you did not make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def opened(artefact: Path) -> Callable[[np.ndarray], np.ndarray]:
    """(N, C, H, W) -> logits (N, classes)."""
    from torch._inductor import aoti_load_package  # the documented name; importing it loads the compiler

    model = aoti_load_package(str(artefact))

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(x)).numpy())

    return run


def versions() -> dict[str, str]:
    """The runtime's version."""
    return {"torch": torch.__version__}
