"""TensorFlow and Keras 3: functional models, `tf.function`, `tf.data`. Fulfils `core.contract.Room`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import keras
import tensorflow as tf

from triptych.in_tensorflow.data import batches, decode, preprocess, resize
from triptych.in_tensorflow.faults import PLANTINGS
from triptych.in_tensorflow.lanes import contender
from triptych.in_tensorflow.model import create_model
from triptych.in_tensorflow.train import create_trainer


@contextlib.contextmanager
def profile(directory: Path) -> Iterator[None]:
    """Trace what runs while open: `directory/plugins/profile/`, which TensorBoard's profiler shows."""
    with tf.profiler.experimental.Profile(str(directory)):
        yield


def versions() -> dict[str, str]:
    """Versions of the libraries under this room."""
    return {"tensorflow": tf.__version__, "keras": keras.__version__}


__all__ = ["PLANTINGS", "batches", "contender", "create_model", "create_trainer", "decode", "preprocess", "profile", "resize", "versions"]
