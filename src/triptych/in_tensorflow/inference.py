"""How a model that is only asked runs fastest on a CPU, in full float32: the tuned lanes of inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from triptych.core.batch import Inputs
from triptych.core.contract import Execution
from triptych.in_tensorflow.model import Model


def program(model: Model, execution: Execution) -> tuple[Callable[[Inputs], np.ndarray], tuple[str, ...]]:
    """Inputs -> logits, (N, classes), of a model whose BatchNorm is folded where it is `tuned`, and the levers it pulls.

    One `tf.function`, with constant weights unless XLA compiles it.
    """
    function = compiled(model) if execution.compile else frozen(model)

    def run(inputs: Inputs) -> np.ndarray:
        named = model.check_inputs(inputs)
        with model.running():
            return np.asarray(function(model.native_inputs(named)).numpy())

    return run, ("folded BatchNorm",) * execution.tuned + ("XLA (jit_compile)" if execution.compile else "constant weights",)


def compiled(model: Model) -> Callable[[Any], tf.Tensor]:
    """The eval pass, compiled by XLA."""
    return tf.function(lambda inputs: model.native(inputs, training=False), autograph=False, jit_compile=True)


def frozen(model: Model) -> Callable[[Any], tf.Tensor]:
    """The eval pass with its weights as constants of the graph, as TensorFlow freezes it for inference.

    Grappler then fuses every convolution with its bias, the shortcut's addition and ReLU, and oneDNN lays out the weights once.
    """
    function = tf.function(lambda inputs: model.native(inputs, training=False), autograph=False)
    signature = tf.nest.map_structure(lambda given: tf.TensorSpec(given.shape, given.dtype), model.native.input)
    with model.running():
        constant = convert_variables_to_constants_v2(function.get_concrete_function(signature))
    return lambda inputs: constant(*tf.nest.flatten(inputs))[0]
