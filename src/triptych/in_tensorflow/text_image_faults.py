"""Realistic porting mistakes in texts, their LSTM and the pooled image: what `faults.py` plants in a layer, in place of its `call`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import keras
import tensorflow as tf

from triptych.in_tensorflow import lstm

Call = Callable[..., Any]


def lstm_gate_order(native: Any, call: Call, x: Any) -> Any:
    """i, g, f, o, as TensorFlow 1 had them (numerics 25)."""

    def split_gates(gates: tf.Tensor) -> list[tf.Tensor]:
        i, g, f, o = tf.split(gates, 4, axis=-1)
        return [i, f, g, o]

    with patch.object(lstm, "split_gates", split_gates):
        return call(x)


def lstm_bias_lost(native: Any, call: Call, x: Any) -> Any:
    """One of two biases carried over where there is room for one (numerics 25)."""
    with keras.StatelessScope([(native.recurrent_bias, tf.zeros_like(native.recurrent_bias))]):
        return call(x)


def lstm_unit_forget_bias(native: Any, call: Call, x: Any) -> Any:
    """1 added to the bias of the forget gate at every step, as TensorFlow 1 did (numerics 25)."""
    bias = tf.convert_to_tensor(native.bias)
    ones = tf.repeat(tf.constant([0.0, 1.0, 0.0, 0.0], bias.dtype), native.units)
    with keras.StatelessScope([(native.bias, bias + ones)]):
        return call(x)


def lstm_mask_ignored(native: Any, call: Call, x: Any) -> Any:
    """The state after the last place, padding or not (numerics 39)."""
    return call(x, mask=None)


def lstm_reversed(native: Any, call: Any, x: Any) -> Any:
    """Read from the end, as the second direction of a bidirectional LSTM is (numerics 39)."""
    return call(tf.reverse(x, [1]), mask=tf.reverse(call.keywords["mask"], [1]))


def global_max_pool_mean(native: Any, call: Call, x: Any) -> Any:
    """The mean over all pixels (numerics 40)."""
    return tf.reduce_mean(x, [1, 2])


WRAPPERS = (lstm_gate_order, lstm_bias_lost, lstm_unit_forget_bias, lstm_mask_ignored, lstm_reversed, global_max_pool_mean)
