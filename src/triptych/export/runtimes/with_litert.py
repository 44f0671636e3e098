"""A .tflite file in LiteRT on the CPU, without TensorFlow."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from triptych.export.runtimes import threads


def opened(artefact: Path) -> Callable[[np.ndarray], np.ndarray]:
    """(N, H, W, C) -> logits (N, classes)."""
    interpreter = Interpreter(str(artefact), num_threads=threads() or None)
    run = interpreter.get_signature_runner("serving_default")
    return lambda x: np.array(run(images=x)["logits"])


def versions() -> dict[str, str]:
    """The runtime's version."""
    return {"ai-edge-litert": importlib.metadata.version("ai-edge-litert")}
