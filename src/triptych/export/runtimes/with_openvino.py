"""An ONNX file, or OpenVINO's own IR, in OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino

from triptych.core.contender import Contender
from triptych.export.runtimes import channels_first, threads


def convert(model: Path, path: Path) -> None:
    """Write an ONNX file as IR: `path`, an .xml, and the weights beside it in a .bin, in float32."""
    openvino.save_model(openvino.convert_model(str(model)), str(path), compress_to_fp16=False)


def quantize(model: Path, path: Path, images: np.ndarray) -> None:
    """Write an ONNX file as IR in 8 bits, by NNCF, its ranges those of `images`, in the file's own layout.

    NNCF's default is the mean of the images' own ranges, which cuts off what only some images show; and it corrects biases, after which
    fewer images of CIFAR-10 kept their class. Its other default stays: the first layer's weights keep to 7 bits, where there is no VNNI.
    """
    import nncf  # optional: triptych[export]
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    ranges = RangeEstimatorParametersSet.MINMAX
    settings = AdvancedQuantizationParameters(activations_range_estimator_params=ranges, disable_bias_correction=True)
    read = openvino.convert_model(str(model))
    made = nncf.quantize(read, nncf.Dataset([image[None] for image in images]), subset_size=len(images), advanced_parameters=settings)
    openvino.save_model(made, str(path), compress_to_fp16=False)


def opened(artefact: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A batch in the file's own layout -> logits (N, classes), compiled once for every batch size, in full float32."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads()}
    request = openvino.Core().compile_model(str(artefact), "CPU", settings).create_infer_request()
    return lambda x: np.array(request.infer({"images": x})["logits"])


def contender(model: Path) -> Contender:
    """Inference as its documentation has it for lowest latency: a model compiled for the shape it is given, in full float32."""
    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads()}
    requests: dict[tuple[tuple[int, ...], ...], openvino.InferRequest] = {}

    def run(given: list[np.ndarray]) -> np.ndarray:
        shapes = tuple(array.shape for array in given)
        if shapes not in requests:
            network = core.read_model(str(model))
            network.reshape(dict(enumerate(shapes)))
            requests[shapes] = core.compile_model(network, "CPU", settings).create_infer_request()
        return np.array(requests[shapes].infer(dict(enumerate(given)))["logits"])

    return Contender(channels_first, run, compiles=True, levers=("compiled for the batch", "latency hint"))


def versions() -> dict[str, str]:
    """The runtime's version."""
    return {"openvino": openvino.__version__}
