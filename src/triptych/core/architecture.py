"""What every spec derives from its layer table. Standard library only."""

from __future__ import annotations

from triptych.core.inputs import IMAGES, Input
from triptych.core.layer import Layer, TensorSpec


class Architecture:
    """A model's description: a frozen dataclass that expands into one layer table."""

    __slots__ = ()

    def inputs(self) -> tuple[Input, ...]:
        """What goes into the model, in the order in which the native models take it."""
        raise NotImplementedError

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one sample: (classes,), or (tokens, classes) when every position is classified on its own."""
        raise NotImplementedError

    def layers(self) -> tuple[Layer, ...]:
        """The layer table, in execution order."""
        raise NotImplementedError

    @property
    def branch_ends(self) -> frozenset[str]:
        """The normalization layers that end a residual branch: none, but where a family says otherwise."""
        return frozenset()

    def tensors(self) -> tuple[TensorSpec, ...]:
        """The whole state (parameters, statistics, counters), in state-dict order."""
        return tuple(tensor for layer in self.layers() for tensor in layer.tensors())

    def parameters(self) -> tuple[TensorSpec, ...]:
        """The trainable part of the state."""
        return tuple(tensor for tensor in self.tensors() if tensor.trainable)

    def intermediates(self) -> tuple[str, ...]:
        """Names of the intermediates every implementation returns, in execution order; the last one is the logits."""
        return tuple(layer.name for layer in self.layers() if layer.op != "dropout")

    def layer(self, name: str) -> Layer:
        """The row called `name`; KeyError when there is none."""
        for layer in self.layers():
            if layer.name == name:
                return layer
        raise KeyError(name)


class ImageArchitecture(Architecture):
    """A model that images alone go into, and one vector of logits an image comes out of."""

    __slots__ = ()
    num_classes: int
    image_size: int
    in_channels: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one input image."""
        return (self.image_size, self.image_size, self.in_channels)

    @property
    def proof_image_size(self) -> int:
        """Image size of the training rungs of a proof: the model's own, where no other fits its weights."""
        return self.image_size

    def inputs(self) -> tuple[Input, ...]:
        """The images."""
        return (Input(IMAGES, "image", self.input_shape),)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(classes,) of one image."""
        return (self.num_classes,)
