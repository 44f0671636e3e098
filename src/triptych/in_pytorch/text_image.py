"""The two-input model: a text through an LSTM, an image through a convolution, and one logit for the pair."""

from __future__ import annotations

from torch import Tensor, nn

from triptych.core.text_image import TextImageSpec
from triptych.in_pytorch.layers import Concatenate, GlobalMaxPool, relu
from triptych.in_pytorch.lstm import LSTM


class TextImage(nn.Module):
    """text (N, length) integer tokens, image (N, in_channels, H, W) -> logits (N, num_classes); of one logit the sigmoid is the loss's."""

    def __init__(self, spec: TextImageSpec) -> None:
        super().__init__()
        self.padding_token = spec.padding_token
        # Its row for padding is a row like any other, to which no gradient leads, because the LSTM does not look at it.
        self.embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.lstm = LSTM(spec.width, spec.features)
        self.conv = nn.Conv2d(spec.in_channels, spec.filters, spec.kernel)
        self.relu = relu()
        self.maxpool = GlobalMaxPool()
        self.concat = Concatenate()
        self.fc = nn.Linear(spec.features + spec.filters, spec.num_classes)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        read = self.lstm(self.embedding(text), mask=text != self.padding_token)
        seen = self.maxpool(self.relu(self.conv(image)))
        return self.fc(self.concat([read, seen]))
