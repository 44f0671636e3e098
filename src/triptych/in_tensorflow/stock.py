"""What a user of Keras writes without us: keras.applications, `predict` and `train_on_batch`."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from triptych.core.contender import RATE, Contender
from triptych.core.errors import LaneMissing
from triptych.core.spec import ResNetSpec, Spec

UNEQUAL = "keras.applications has ResNet v1: strides on the 1x1 convolutions, convolutions with biases, epsilon 1.001e-5 (numerics 10)"


def contender(spec: Spec, weights: Mapping[str, np.ndarray], mode: str) -> Contender:
    """The ResNet of keras.applications of this depth, with weights of its own: it is another model. LaneMissing when there is none."""
    native = build(spec)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    native.compile(keras.optimizers.SGD(RATE, momentum=0.9, weight_decay=1e-4), loss)

    def run(batch: tuple[tf.Tensor, tf.Tensor]) -> np.ndarray:
        if mode == "inference":
            return np.asarray(native.predict(batch[0], batch_size=len(batch[0]), verbose=0))
        return np.asarray(native.train_on_batch(*batch))

    return Contender(stage, run, compiles=True, unequal=UNEQUAL, macs=macs(native))


def build(spec: Spec) -> keras.Model:
    """The Keras model, in its initial state."""
    kinds = {"resnet50": keras.applications.ResNet50, "resnet101": keras.applications.ResNet101, "resnet152": keras.applications.ResNet152}
    if spec.name not in kinds or not isinstance(spec, ResNetSpec):
        raise LaneMissing(f"keras.applications has no {spec.name}")
    return kinds[spec.name](weights=None, input_shape=spec.input_shape, classes=spec.num_classes, classifier_activation=None)


def stage(images: np.ndarray, labels: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
    """The batch as tensors."""
    return tf.constant(images), tf.constant(labels)


def macs(native: keras.Model) -> int:
    """Multiply-accumulates of one forward pass of one image: of every kernel, at every position of its output."""
    kernels = [layer for layer in native.layers if hasattr(layer, "kernel")]
    return sum(int(np.prod(layer.output.shape[1:-1], dtype=int)) * int(np.prod(layer.kernel.shape)) for layer in kernels)
