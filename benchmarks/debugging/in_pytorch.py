"""A user's program in PyTorch: the zoo's network, a layer of the wrong size put into it, and a call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import triptych
from debugging.bugs import BATCH, CLASSES, MODEL, PIXELS, Bug, channels


def network(bug: Bug) -> nn.Module:
    """The network with the bug in it."""
    model: nn.Module = triptych.create_model(MODEL, framework="pytorch", device="cpu").native
    if bug.name == "linear":
        model.fc = nn.Linear(bug.wrong, CLASSES)
    elif bug.name == "convolution":
        model.layer2[0].conv1 = nn.Conv2d(bug.wrong, 32, 3, stride=2, padding=1, bias=False)
    return model.eval()


def call(model: nn.Module, bug: Bug, mode: str) -> None:
    """One forward pass; compiled, as the first of its process."""
    torch.compiler.reset()
    predict: Callable[..., object] = torch.compile(model) if mode == "compiled" else model
    with torch.inference_mode():
        predict(torch.zeros(BATCH, channels(bug), PIXELS, PIXELS))
