"""An LSTM with PyTorch's two biases (Hochreiter & Schmidhuber 1997; gates as Gers et al. 2000), as a Keras cell and its layer."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from triptych.in_tensorflow.layers import register

Shape = tuple[int | None, ...]


@register
class LSTMCell(keras.layers.Layer):
    """One step: gates i, f, g, o of inputs and state, each with a bias of its own, none of them ones at first (numerics 25).

    `keras.layers.LSTMCell` has one bias in place of two: the same function, but half the step while training.
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.state_size = [units, units]
        self.output_size = units

    def build(self, input_shape: Shape) -> None:
        """Create kernels and biases of the four gates, side by side."""
        gates = 4 * self.units
        self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], gates), initializer="zeros")
        self.recurrent_kernel = self.add_weight(name="recurrent_kernel", shape=(self.units, gates), initializer="zeros")
        self.bias = self.add_weight(name="bias", shape=(gates,), initializer="zeros")
        self.recurrent_bias = self.add_weight(name="recurrent_bias", shape=(gates,), initializer="zeros")

    def call(self, inputs: Any, states: Any, training: bool = False) -> tuple[Any, list[Any]]:
        """(N, width), [h, c] of (N, units) each -> h, [h, c] after the step."""
        hidden, carry = states
        gates = ops.matmul(inputs, self.kernel) + self.bias + ops.matmul(hidden, self.recurrent_kernel) + self.recurrent_bias
        i, f, g, o = split_gates(gates)
        carry = ops.sigmoid(f) * carry + ops.sigmoid(i) * ops.tanh(g)
        hidden = ops.sigmoid(o) * ops.tanh(carry)
        return hidden, [hidden, carry]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "units": self.units}


def split_gates(gates: Any) -> list[Any]:
    """(N, 4 units) -> i, f, g, o, in this order, of (N, units) each."""
    return list(ops.split(gates, 4, axis=-1))


@register
class LSTM(keras.layers.RNN):
    """An `LSTMCell` over (N, tokens, width) -> (N, units), the hidden state after the last token that counts (numerics 39).

    As in every Keras RNN, tokens that the mask leaves out leave the state as it is; nothing else gives the initial state, zeros.
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(LSTMCell(units, dtype=kwargs.get("dtype")), **kwargs)
        self.units = units

    @property
    def kernel(self) -> keras.Variable:
        """The cell's, of the inputs: (width, 4 units)."""
        return self.cell.kernel

    @property
    def recurrent_kernel(self) -> keras.Variable:
        """The cell's, of the state: (units, 4 units)."""
        return self.cell.recurrent_kernel

    @property
    def bias(self) -> keras.Variable:
        """The cell's, beside the kernel: (4 units,)."""
        return self.cell.bias

    @property
    def recurrent_bias(self) -> keras.Variable:
        """The cell's, beside the recurrent kernel: (4 units,)."""
        return self.cell.recurrent_bias

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**keras.layers.Layer.get_config(self), "units": self.units}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LSTM:
        """The layer that `get_config` described: it makes its own cell."""
        return cls(**config)
