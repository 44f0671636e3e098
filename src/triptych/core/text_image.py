"""The two-input model: what it is, every constant explicit. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from triptych.core.architecture import Architecture
from triptych.core.inputs import Input, Preprocessing
from triptych.core.layer import Layer


@dataclass(frozen=True, slots=True)
class TextImageSpec(Architecture):
    """Two inputs, one output: the text's tokens go through a lookup and an LSTM, the image through a convolution and a maximum over all
    pixels, and a linear layer takes both side by side.

    The LSTM is PyTorch's: gates i, f, g, o, two biases that add up, no peepholes (numerics 25). `padding_token` is no token: where it
    stands, the LSTM's state stays as it is, and the state after the last token is what goes on (numerics 39). The convolution has a
    stride of 1 and no padding. Of one logit the loss is the binary cross-entropy of its sigmoid, so that labels are 0 and 1 (numerics 41).
    """

    name: str
    vocabulary: int
    length: int
    padding_token: int
    width: int
    features: int
    filters: int
    kernel: int
    num_classes: int
    in_channels: int
    image_size: int
    preprocessing: Preprocessing

    family = "text_image"
    head = "fc"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return (self.image_size, self.image_size, self.in_channels)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(classes,) of one pair."""
        return (self.num_classes,)

    @property
    def proof_image_size(self) -> int:
        """Image size of the training rungs of a proof: as all pixels are pooled, 32 show what 224 do."""
        return min(self.image_size, max(32, self.kernel))

    def inputs(self) -> tuple[Input, ...]:
        """The text, then the image."""
        return (Input("text", "tokens", (self.length,), self.vocabulary), Input("image", "image", self.input_shape))

    def layers(self) -> tuple[Layer, ...]:
        """The layer table, in execution order."""
        return tuple(self._layers())

    def _layers(self) -> Iterator[Layer]:
        size, filters, joined = self.image_size - self.kernel + 1, self.filters, self.features + self.filters
        yield Layer("embedding", "lookup", self.vocabulary, self.width, 1, tokens=self.length)
        yield Layer("lstm", "lstm", self.width, self.features, 1, kernel=self.length)
        yield Layer("conv", "conv", self.in_channels, filters, size, self.kernel, bias=True)
        yield Layer("relu", "relu", filters, filters, size)
        yield Layer("maxpool", "global_max_pool", filters, filters, 1, kernel=size)
        yield Layer("concat", "concatenate", joined, joined, 1)
        yield Layer(self.head, "linear", joined, self.num_classes, 1, bias=True)
