"""What a user might pick instead of a framework for inference: one module a runtime, which imports that library and no other.

A module has `contender(model)`, the exported file ready to take turns in a benchmark, and `versions()`. Standard library only here.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triptych.core.contract import not_installed
from triptych.core.errors import FrameworkMissing

if TYPE_CHECKING:
    import numpy as np

    from triptych.core.batch import Inputs

EXTRA = "runtimes"
ONNX = ("onnx", "onnxscript")
"""What PyTorch writes ONNX files with."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """One row of the table: how it is called, the libraries that it and the export to it need, and the module that runs it."""

    name: str
    title: str
    needs: tuple[str, ...]
    module: str


RUNTIMES: dict[str, Runtime] = {
    row.name: row
    for row in (
        Runtime("onnxruntime", "ONNX Runtime", ("onnxruntime", *ONNX), "triptych.export.runtimes.with_onnxruntime"),
        Runtime("openvino", "OpenVINO", ("openvino", *ONNX), "triptych.export.runtimes.with_openvino"),
    )
}


def missing(name: str) -> str | None:
    """Why the runtime `name` cannot run here, with the exact pip line; None when it can."""
    row = RUNTIMES[name]
    return not_installed(row.title, row.needs, EXTRA)


def load(name: str) -> Any:
    """The module of the runtime `name`. FrameworkMissing, with the exact pip line, when its library is not installed."""
    reason = missing(name)
    if reason is not None:
        raise FrameworkMissing(reason)
    return importlib.import_module(RUNTIMES[name].module)


def channels_first(inputs: Inputs, labels: np.ndarray) -> list[np.ndarray]:
    """The staging of every runtime: images (N, H, W, C) -> (N, C, H, W), which is what PyTorch's model takes; labels are not used.

    Several inputs come in the order of the spec, which is that of the exported model.
    """
    arrays = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    return [array.transpose(0, 3, 1, 2).copy() if array.ndim == 4 else array for array in arrays]


def threads() -> int:
    """The number of threads set for every framework, which these libraries do not read themselves; 0, their own choice, when none is."""
    return int(os.environ.get("OMP_NUM_THREADS", "0"))
