"""An ONNX file as a SavedModel, by onnx2tf: a script for the environment of `requirements/onnx2tf.txt`, and for no other.

Lines of JSON as `core/conversation.py` has them: `start` tells versions, `convert` reads the file `given` and writes the folder `path`,
whose `serving_default` takes `images` (N, H, W, C) float32, any N, and gives `logits`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx2tf
import tensorflow as tf
from onnx import helper, numpy_helper

Answer = dict[str, Any]


def start() -> Answer:
    """What converts."""
    return {"versions": {"onnx2tf": onnx2tf.__version__, "tensorflow": tf.__version__}}


def convert(given: str, path: str) -> Answer:
    """Write the SavedModel. RuntimeError with what onnx2tf says when it gives up, which it does by leaving the process."""
    file = onnx.load(given)
    as_convolutions(file.graph)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            # Not by its own command line: that simplifies the file in place, and fetches test images for a batch of fixed size.
            model = onnx2tf.convert(
                onnx_graph=file, output_folder_path=scratch, not_use_onnxsim=True, disable_model_save=True, verbosity="warn"
            )
        except SystemExit as error:
            raise RuntimeError(f"onnx2tf gave up, with code {error.code}") from None
    (images,) = model.inputs
    module = tf.Module()
    module.kept = model.variables
    signature = tf.TensorSpec((None, *images.shape[1:]), tf.float32, name="images")
    function = tf.function(lambda images: {"logits": model(images)}, autograph=False).get_concrete_function(signature)
    tf.saved_model.save(module, path, signatures={"serving_default": function})
    return {}


def as_convolutions(graph: onnx.GraphProto) -> None:
    """Every second pixel (two Slice) of more channels, the new ones zero (Pad), as what it is too: a 1x1 convolution of stride 2.

    onnx2tf tells a layout by sizes: where there are as many channels as rows it takes those for these, and the shortcuts of a ResNet for
    CIFAR come out wrong. The weights are 0 and 1, so that the convolution changes no bit.
    """
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    users = [name for node in graph.node for name in node.input]
    channels = {each.name: each.type.tensor_type.shape.dim[1].dim_value for each in graph.value_info if _is_image(each)}
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        second = makers.get(pad.input[0])
        first = makers.get(second.input[0]) if second is not None else None
        if first is None or second is None or {_halved(first, constants), _halved(second, constants)} != {2, 3}:
            continue
        pads, name = constants.get(pad.input[1]), first.input[0]
        zero = len(pad.input) < 3 or not pad.input[2] or not np.any(constants.get(pad.input[2], 1))
        once = users.count(first.output[0]) == users.count(second.output[0]) == 1
        if pads is None or len(pads) != 8 or pads[[0, 2, 3, 4, 6, 7]].any() or not zero or not once or not channels.get(name):
            continue
        weight = np.zeros((channels[name] + pads[1] + pads[5], channels[name], 1, 1), np.float32)
        weight[pads[1] + np.arange(channels[name]), np.arange(channels[name])] = 1
        graph.initializer.append(numpy_helper.from_array(weight, f"{pad.output[0]}_identity"))
        made = helper.make_node(
            "Conv", [name, f"{pad.output[0]}_identity"], list(pad.output), pad.name, kernel_shape=[1, 1], strides=[2, 2]
        )
        graph.node.insert(list(graph.node).index(pad), made)
        for node in (pad, second, first):
            graph.node.remove(node)


def _is_image(value: onnx.ValueInfoProto) -> bool:
    return len(value.type.tensor_type.shape.dim) == 4


def _halved(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> int | None:
    """The axis of which this Slice takes every second element from the first on; None for all others."""
    if node.op_type != "Slice" or len(node.input) != 5:
        return None
    start, end, axis, step = (constants.get(name, np.empty(0)).tolist() for name in node.input[1:])
    return axis[0] if start == [0] and step == [2] and len(axis) == 1 and end >= [2**31 - 1] else None


def main() -> None:
    """Answer until the input ends. What libraries print goes to stderr, the log."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        action: Callable[..., Answer] = start if asked.pop("do") == "start" else convert
        try:
            answer = action(**asked)
        except Exception as error:
            answer = {"error": {"kind": type(error).__name__, "message": " ".join(str(error).split())[:500]}}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
