"""What a process that times TensorFlow tells and forgets."""

from __future__ import annotations

import keras
import tensorflow as tf

from triptych.core.environment import variables
from triptych.in_tensorflow.model import full_precision


def numerics() -> dict[str, str]:
    """What float32 means here, as TensorFlow tells it: in our lanes, and by its defaults in stock ones."""
    stock = _tf32()
    with full_precision():
        ours = _tf32()
    flags = ("TF_ENABLE_ONEDNN_OPTS", "ONEDNN_DEFAULT_FPMATH_MODE", "XLA_FLAGS", "TF_XLA_FLAGS")
    return {
        "TF32": ours,
        "TF32, stock": stock,
        "Keras dtype policy": keras.config.dtype_policy().name,
        "oneDNN": "on" if _onednn() else "off",
        **{name: variables().get(name, "not set") for name in flags},
        "threads": str(tf.config.threading.get_intra_op_parallelism_threads() or variables().get("TF_NUM_INTRAOP_THREADS", "all cores")),
    }


def forget() -> None:
    """Drop what Keras remembers of models that are gone."""
    keras.utils.clear_session()


def _tf32() -> str:
    return "on" if tf.config.experimental.tensor_float_32_execution_enabled() else "off"


def _onednn() -> bool:
    # No public name: imported here, so that a version without it costs a benchmark and not the room.
    from tensorflow.python.framework.test_util import IsMklEnabled

    return bool(IsMklEnabled())
