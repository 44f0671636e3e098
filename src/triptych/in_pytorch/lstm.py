"""An LSTM over padded texts (Hochreiter & Schmidhuber 1997; gates as Gers et al. 2000): `nn.LSTM`, and the state after the last token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LSTM(nn.LSTM):
    """`nn.LSTM` of one layer, whose output is the hidden state after the last token that counts (numerics 25, 39).

    (N, tokens, width), and (N, tokens) bool, true where a token counts -> (N, features). Padding leaves the state as it is, wherever
    it stands; a text of nothing but padding leaves the initial state, zeros. Parameters are those of `nn.LSTM`, both biases included.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__(width, features, batch_first=True)

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:  # type: ignore[override]
        # Padding goes behind the tokens, where it cannot change the states at them: no packing, so that lengths stay on the device.
        tokens_first = torch.argsort(mask.logical_not().byte(), dim=1, stable=True)
        states, _ = super().forward(x.take_along_dim(tokens_first[..., None], dim=1))
        states = F.pad(states, (0, 0, 1, 0))  # (N, 1 + tokens, features): after no token, after one, ...
        return states[torch.arange(len(x), device=x.device), mask.sum(dim=1)]
