"""What a user of PyTorch writes without us: torchvision's model, eager, and the plain loop of its tutorials."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from triptych.core.contender import RATE, Contender
from triptych.core.errors import LaneMissing
from triptych.core.spec import Spec


def contender(spec: Spec, weights: Mapping[str, np.ndarray], mode: str) -> Contender:
    """torchvision's model of this name with the same weights. LaneMissing when it has none."""
    if spec.name not in torchvision.models.list_models(module=torchvision.models):
        raise LaneMissing(f"torchvision has no {spec.name}")
    native = torchvision.models.get_model(spec.name, weights=None, num_classes=spec.num_classes)
    load(native, weights)
    if mode == "inference":
        native.eval()

        def run(batch: tuple[Tensor, Tensor]) -> np.ndarray:
            with torch.inference_mode():
                return np.asarray(native(batch[0]).numpy())

        return Contender(stage, run)
    optimizer = torch.optim.SGD(native.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)

    def start_from(weights: Mapping[str, np.ndarray]) -> None:
        load(native, weights)
        optimizer.state.clear()

    return Contender(stage, lambda batch: step(native, optimizer, *batch), start_from)


def load(native: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Copy canonical weights, whose names are torchvision's."""
    native.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})


def stage(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """(N, H, W, C) -> (N, C, H, W) and (N,)."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)


def step(native: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> np.ndarray:
    """One step of the plain loop; its loss."""
    native.train()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(native(x), y)
    loss.backward()
    optimizer.step()
    return np.asarray(loss.item())
