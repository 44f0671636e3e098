"""What a PyTorch user would write for the two-input model, with the same state dict, computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, initialize

SPEC = catalog.tiny(catalog.get_spec("text_image"))
WEIGHTS = initialize.parity_weights(SPEC, 3)
TEXTS = np.array([[3, 7, 2, 5, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]])  # padding stands behind: packing asks for it
BATCH = {"text": TEXTS, "image": np.random.default_rng(0).normal(size=(len(TEXTS), 12, 12, 3))}


@pytest.fixture(scope="module")
def plain() -> Any:
    """`nn.Embedding`, `nn.LSTM` over packed sequences, `nn.Conv2d`, `nn.Linear`, with our weights."""
    import torch
    from torch import nn

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(SPEC.vocabulary, SPEC.width, padding_idx=0)
            self.lstm = nn.LSTM(SPEC.width, SPEC.features, batch_first=True)
            self.conv = nn.Conv2d(3, SPEC.filters, SPEC.kernel)
            self.fc = nn.Linear(SPEC.features + SPEC.filters, 1)

        def forward(self, text: Any, image: Any) -> Any:
            lengths = (text != 0).sum(1)
            packed = nn.utils.rnn.pack_padded_sequence(self.embedding(text), lengths, batch_first=True, enforce_sorted=False)
            _, (read, _) = self.lstm(packed)
            seen = nn.functional.adaptive_max_pool2d(self.conv(image).relu(), 1).flatten(1)
            return self.fc(torch.cat([read[-1], seen], dim=1))

    module = Plain().double()
    module.load_state_dict({name: torch.from_numpy(value) for name, value in WEIGHTS.items()}, strict=True)
    return module


def test_the_same_logits_loss_and_gradients(room: Any, lab: Any, plain: Any) -> None:
    import torch

    model, labels = room.create_model(SPEC, WEIGHTS, precision="float64", device="cpu"), np.array([1, 0, 1])
    logits = plain(torch.from_numpy(TEXTS), torch.from_numpy(BATCH["image"]).permute(0, 3, 1, 2))
    np.testing.assert_allclose(model.predict(BATCH), logits.detach().numpy(), rtol=0, atol=1e-14)
    torch.nn.BCEWithLogitsLoss()(logits[:, 0], torch.from_numpy(labels).double()).backward()
    found = room.create_trainer(model, lab.recipe(label_smoothing=0.0)).gradients(BATCH, labels).gradients
    for name, parameter in plain.named_parameters():
        np.testing.assert_allclose(found[name], parameter.grad.numpy(), rtol=0, atol=1e-14, err_msg=name)
