"""TensorFlow and Keras 3: functional models, `tf.function`, `tf.data`. Fulfils `core.contract.Room`."""

from __future__ import annotations

import keras
import tensorflow as tf

from triptych.in_tensorflow.data import batches, decode, preprocess, resize
from triptych.in_tensorflow.export import export, saved_model_of_module
from triptych.in_tensorflow.faults import PLANTINGS
from triptych.in_tensorflow.lanes import contender, phases
from triptych.in_tensorflow.model import create_model
from triptych.in_tensorflow.process import forget, numerics
from triptych.in_tensorflow.profile import annotate, operators, profile
from triptych.in_tensorflow.train import create_trainer


def versions() -> dict[str, str]:
    """Versions of the libraries under this room."""
    return {"tensorflow": tf.__version__, "keras": keras.__version__}


__all__ = [
    "PLANTINGS", "annotate", "batches", "contender", "create_model", "create_trainer", "decode", "export", "forget", "numerics",
    "operators", "phases", "preprocess", "profile", "resize", "saved_model_of_module", "versions",
]  # fmt: skip
