"""An ONNX file in ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from triptych.core.contender import Contender
from triptych.export.runtimes import channels_first, threads


def contender(model: Path) -> Contender:
    """Inference as its documentation has it: one session with every graph optimization, logits as numpy."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads()
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(given: list[np.ndarray]) -> np.ndarray:
        return np.asarray(session.run(None, dict(zip(names, given, strict=True)))[0])

    return Contender(channels_first, run, levers=("every graph optimization",))


def versions() -> dict[str, str]:
    """The runtime's version."""
    return {"onnxruntime": onnxruntime.__version__}
