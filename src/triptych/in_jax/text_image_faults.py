"""Realistic porting mistakes in texts, their LSTM and the pooled image: what `faults.py` plants in a layer, in place of its `call`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp

from triptych.in_jax import lstm

Call = Callable[..., jax.Array]
Split = Callable[[jax.Array], list[jax.Array]]


def _with_gates(split_gates: Split) -> Callable[[Any, Call, jax.Array], jax.Array]:
    """The LSTM, whose gates are read otherwise."""

    def wrapper(module: Any, call: Call, x: jax.Array) -> jax.Array:
        with patch.object(lstm, "split_gates", split_gates):
            return call(x)

    return wrapper


def _gate_order(gates: jax.Array) -> list[jax.Array]:
    """i, g, f, o, as TensorFlow 1 had them (numerics 25)."""
    i, g, f, o = jnp.split(gates, 4, axis=-1)
    return [i, f, g, o]


def _unit_forget_bias(gates: jax.Array) -> list[jax.Array]:
    """1 added to the bias of the forget gate at every step, as TensorFlow 1 did (numerics 25)."""
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    return [i, f + 1.0, g, o]


def _bias_lost(module: Any, call: Call, x: jax.Array) -> jax.Array:
    """One of two biases carried over where there is room for one (numerics 25)."""
    right = lstm.both_biases
    with patch.object(lstm, "both_biases", lambda bias, recurrent_bias: right(bias, jnp.zeros_like(recurrent_bias))):
        return call(x)


def _mask_ignored(module: Any, call: Call, x: jax.Array) -> jax.Array:
    """The state after the last place, padding or not (numerics 39)."""
    return call(x, mask=jnp.ones(x.shape[:2], bool))


def _reversed(module: Any, call: Any, x: jax.Array) -> jax.Array:
    """Read from the end, as the second direction of a bidirectional LSTM is (numerics 39)."""
    return call(x[:, ::-1], mask=call.keywords["mask"][:, ::-1])


def _mean(module: Any, call: Call, x: jax.Array) -> jax.Array:
    """The mean over all pixels (numerics 40)."""
    return x.mean((1, 2))


WRAPPERS: dict[str, Callable[[Any, Any, jax.Array], jax.Array]] = {
    "lstm_gate_order": _with_gates(_gate_order),
    "lstm_bias_lost": _bias_lost,
    "lstm_unit_forget_bias": _with_gates(_unit_forget_bias),
    "lstm_mask_ignored": _mask_ignored,
    "lstm_reversed": _reversed,
    "global_max_pool_mean": _mean,
}
