"""An ONNX file in ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from triptych.core.contender import Contender
from triptych.core.errors import InputRefused
from triptych.export import safety
from triptych.export.runtimes import channels_first, threads


def opened(artefact: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A batch in the file's own layout -> logits (N, classes), by one session with every graph optimization.

    Threads that have nothing to do sleep, where ONNX Runtime would have them spin: what runs beside it needs the cores (docs/serving.md).
    """
    session = _session(artefact, spin=False)
    return lambda x: np.asarray(session.run(["logits"], {"images": x})[0])


def _session(artefact: Path, *, spin: bool = True) -> Any:
    check(artefact)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    return onnxruntime.InferenceSession(str(artefact), options, providers=["CPUExecutionProvider"])


def check(artefact: Path) -> None:
    """InputRefused for a file that is not ONNX, or whose tensors lie in a file that is not beside it."""
    import onnx  # only here: running a file takes no more than the runtime
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    try:
        model = onnx.load(artefact, load_external_data=False)
    except Exception as error:  # protobuf's own errors, which differ by its implementation
        raise InputRefused(f"{artefact} is not an ONNX file ({type(error).__name__})") from None
    for tensor in _get_all_tensors(model):
        if uses_external_data(tensor):
            places = [entry.value for entry in tensor.external_data if entry.key == "location"]
            for place in places or [""]:
                safety.check_beside(artefact, place)


def quantize(model: Path, path: Path, images: np.ndarray) -> None:
    """Write an ONNX file in 8 bits (Jacob et al. 2018, arXiv:1712.05877), its ranges those of `images`, in the file's own layout.

    Products are computed in 8 bits, and what ReLU and pooling make of them; sums of residual connections and what else a transformer does
    stay float32, which costs hardly any time. Weights keep to 7 bits: processors without VNNI add pairs of products in 16 bits, which
    those of 8 and 8 bits overflow. The logits stay float32, too: larger ones than any that was calibrated on would be cut off.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        model, path, _Images(images), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul", "Relu", "MaxPool"], per_channel=True, reduce_range=True,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
    )  # fmt: skip


class _Images:
    """A `CalibrationDataReader`: one image at a time."""

    def __init__(self, images: np.ndarray) -> None:
        self._left = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """What a session is fed, None at the end."""
        image = next(self._left, None)
        return None if image is None else {"images": image[None]}


def contender(model: Path) -> Contender:
    """Inference as its documentation has it: one session with every graph optimization, logits as numpy."""
    session = _session(model)
    names = [each.name for each in session.get_inputs()]

    def run(given: list[np.ndarray]) -> np.ndarray:
        return np.asarray(session.run(None, dict(zip(names, given, strict=True)))[0])

    return Contender(channels_first, run, levers=("every graph optimization",))


def versions() -> dict[str, str]:
    """The runtime's version."""
    return {"onnxruntime": onnxruntime.__version__}


def all_outputs(model: Path, images: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """Name, operator and value of every node's floating-point output, in the graph's order, computed without any optimization."""
    import onnx  # only here: running a file takes no more than the runtime

    graph = onnx.shape_inference.infer_shapes(onnx.load(model))
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.graph.value_info, *graph.graph.output)}
    nodes = [(output, node) for node in graph.graph.node for output in node.output if kinds.get(output) == onnx.TensorProto.FLOAT]
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None) for output, _ in nodes)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run([output for output, _ in nodes], {"images": images})
    return [(node.name or output, node.op_type, np.asarray(value)) for (output, node), value in zip(nodes, values, strict=True)]
