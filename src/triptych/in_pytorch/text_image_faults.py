"""Realistic porting mistakes in texts, their LSTM and the pooled image: what `faults.py` plants in a layer, in place of its `call`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

Call = Callable[..., Tensor]
Weights = tuple[Tensor, Tensor, Tensor, Tensor]


def _with_weights(change: Callable[..., Weights]) -> Callable[[nn.LSTM, Call, Tensor], Tensor]:
    """The LSTM, which reads other weights than it has: `change` takes and gives those of inputs and state, and their biases."""

    def wrapper(lstm: nn.LSTM, call: Call, x: Tensor) -> Tensor:
        with patch.object(lstm, "_flat_weights", list(change(*lstm._flat_weights))):
            return call(x)

    return wrapper


def _gate_order(*weights: Tensor) -> Weights:
    """i, g, f, o, as TensorFlow 1 had them (numerics 25)."""
    order = [0, 2, 1, 3]
    input_, state, input_bias, state_bias = (weight.unflatten(0, (4, -1))[order].flatten(0, 1) for weight in weights)
    return input_, state, input_bias, state_bias


def _bias_lost(input_: Tensor, state: Tensor, input_bias: Tensor, state_bias: Tensor) -> Weights:
    """One of two biases carried over where there is room for one (numerics 25)."""
    return input_, state, input_bias, torch.zeros_like(state_bias)


def _unit_forget_bias(input_: Tensor, state: Tensor, input_bias: Tensor, state_bias: Tensor) -> Weights:
    """1 added to the bias of the forget gate at every step, as TensorFlow 1 did (numerics 25)."""
    ones = torch.zeros_like(input_bias).unflatten(0, (4, -1))
    ones[1] = 1.0
    return input_, state, input_bias + ones.flatten(), state_bias


def _mask_ignored(lstm: nn.LSTM, call: Call, x: Tensor) -> Tensor:
    """The state after the last place, padding or not (numerics 39)."""
    return call(x, mask=torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))


def _reversed(lstm: nn.LSTM, call: Any, x: Tensor) -> Tensor:
    """Read from the end, as the second direction of a bidirectional LSTM is (numerics 39)."""
    return call(x.flip(1), mask=call.keywords["mask"].flip(1))


def _mean(pool: nn.Module, call: Call, x: Tensor) -> Tensor:
    """The mean over all pixels (numerics 40)."""
    return x.mean(dim=(2, 3))


WRAPPERS: dict[str, Callable[[Any, Any, Tensor], Tensor]] = {
    "lstm_gate_order": _with_weights(_gate_order),
    "lstm_bias_lost": _with_weights(_bias_lost),
    "lstm_unit_forget_bias": _with_weights(_unit_forget_bias),
    "lstm_mask_ignored": _mask_ignored,
    "lstm_reversed": _reversed,
    "global_max_pool_mean": _mean,
}
