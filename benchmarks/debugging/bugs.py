"""What is planted: one wrong size in a network of the zoo, the same in every framework."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "resnet20"
CLASSES = 10
BATCH, PIXELS = 2, 32


@dataclass(frozen=True, slots=True)
class Bug:
    """A layer that expects `wrong` features or channels where `right` arrive; of the images, `wrong` arrive where `right` are expected."""

    name: str
    layer: str
    right: int
    wrong: int
    text: str


BUGS = {
    bug.name: bug
    for bug in (
        Bug("linear", "fc", 64, 65, "the classifier is made for 65 features, and 64 arrive"),
        Bug("convolution", "layer2.0.conv1", 16, 17, "a convolution is made for 17 channels, and 16 arrive"),
        Bug("images", "conv1", 3, 7, "the images have 7 channels, and the network expects 3"),
    )
}
MODES = ("eager", "compiled")


def channels(bug: Bug) -> int:
    """Channels of the images that the network is called with."""
    return bug.wrong if bug.layer == "conv1" else 3
