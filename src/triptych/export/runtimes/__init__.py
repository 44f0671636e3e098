"""What runs an exported model: one module a runtime, which imports that library and no other.

A module has `opened(artefact)`, which gives a function from a batch to logits, and `versions()`; those that a benchmark offers beside the
frameworks have `contender(model)`, too. Standard library only here.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triptych.core.contract import not_installed
from triptych.core.errors import FrameworkMissing, InputRefused
from triptych.export import safety

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np

    from triptych.core.batch import Inputs

EXTRA = "runtimes"
ONNX = ("onnx", "onnxscript")
"""What PyTorch writes ONNX files with."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """One row of the table: how it is called, the libraries that it needs, and the extra that installs them."""

    name: str
    title: str
    needs: tuple[str, ...]
    extra: str = EXTRA

    @property
    def module(self) -> str:
        """The module that runs it."""
        return f"triptych.export.runtimes.with_{self.name}"


ADAPTERS: dict[str, Runtime] = {
    row.name: row
    for row in (
        Runtime("onnxruntime", "ONNX Runtime", ("onnxruntime", *ONNX)),
        Runtime("openvino", "OpenVINO", ("openvino", *ONNX)),
        Runtime("torchscript", "TorchScript", ("torch",), "pytorch"),
        Runtime("torch_export", "torch.export", ("torch",), "pytorch"),
        Runtime("aotinductor", "AOTInductor", ("torch",), "pytorch"),
        Runtime("saved_model", "TensorFlow", ("tensorflow",), "tensorflow"),
        Runtime("keras", "Keras", ("tensorflow", "keras"), "tensorflow"),
        Runtime("litert", "LiteRT", ("ai_edge_litert",), "export"),
        Runtime("stablehlo", "JAX", ("jax",), "jax"),
    )
}
RUNTIMES = {name: ADAPTERS[name] for name in ("onnxruntime", "openvino")}
"""What a user might pick instead of a framework for inference: these take turns in a benchmark."""


def missing(name: str) -> str | None:
    """Why the runtime `name` cannot run here, with the exact pip line; None when it can."""
    row = ADAPTERS[name]
    return not_installed(row.title, row.needs, row.extra)


def load(name: str) -> Any:
    """The module of the runtime `name`. FrameworkMissing, with the exact pip line, when its library is not installed."""
    reason = missing(name)
    if reason is not None:
        raise FrameworkMissing(reason)
    # Absent to OpenVINO and NNCF, which else leave an identity in the home folder and tell their makers what is done.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module(ADAPTERS[name].module)


def opened(name: str, artefact: Path, *, trusted: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """An artefact in the runtime `name`, ready to run: a batch in its own layout -> logits (N, classes).

    Raises InputRefused for one that is damaged, leads out of its directory or carries code; an AOTInductor package is nothing but
    machine code and is refused unless it is `trusted`. FrameworkMissing when the library is not installed.
    """
    if name == "aotinductor" and not trusted:
        raise InputRefused(f"{artefact} is machine code, which would run as this user; open only what you compiled yourself (trusted=True)")
    safety.check(artefact)
    module = load(name)
    try:
        run: Callable[[np.ndarray], np.ndarray] = module.opened(artefact)
    except InputRefused:
        raise
    except Exception as error:  # whatever a library raises for a file that it cannot read, or will not
        reason = str(error).strip().partition("\n")[0][:300]
        raise InputRefused(f"{artefact} was not opened by {ADAPTERS[name].title}: {type(error).__name__}: {reason}") from error
    return run


def channels_first(inputs: Inputs, labels: np.ndarray) -> list[np.ndarray]:
    """The staging of every runtime: images (N, H, W, C) -> (N, C, H, W), which is what PyTorch's model takes; labels are not used.

    Several inputs come in the order of the spec, which is that of the exported model.
    """
    arrays = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    return [array.transpose(0, 3, 1, 2).copy() if array.ndim == 4 else array for array in arrays]


def threads() -> int:
    """The number of threads set for every framework, which these libraries do not read themselves; 0, their own choice, when none is."""
    return int(os.environ.get("OMP_NUM_THREADS", "0"))
