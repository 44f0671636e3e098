"""A Keras archive in Keras on TensorFlow. It names our own layers, which the room registers; nothing else is trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from triptych.core import contract


def opened(artefact: Path) -> Callable[[np.ndarray], np.ndarray]:
    """(N, H, W, C) -> logits (N, classes)."""
    contract.load("tensorflow")
    model = keras.saving.load_model(artefact, compile=False, safe_mode=True)
    return lambda x: np.asarray(model.predict_on_batch(x))


def versions() -> dict[str, str]:
    """The runtime's version."""
    return {"keras": keras.__version__}
