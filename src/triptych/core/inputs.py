"""What goes into a model, and what happens to an image before it does: plain data. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGES = "images"
"""The name of the only input of a model that images alone go into."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What happens to a decoded image before the model sees it, as data; executed natively in each framework.

    `resize_short_side` (None: keep the size) is followed by a centred crop of `crop` pixels; then `(x / 255 - mean) / std`.
    Resizing is float32, bilinear, antialiased, never rounded to integers (numerics 20, 21).
    """

    resize_short_side: int | None
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Channels of the decoded image: 3 (RGB) or 1 (grey)."""
        return len(self.mean)


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a model. `shape` is that of one sample.

    `image`: floats (H, W, C), natively in each framework's own layout; `features`: floats (tokens, width); `tokens`: integer ids
    (tokens,) in [0, vocabulary), of which 0 may be a mask.
    """

    name: str
    kind: Literal["image", "features", "tokens"]
    shape: tuple[int, ...]
    vocabulary: int = 0

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.shape))
        if self.kind == "tokens":
            return f"{self.name}: integer ids (N, tokens) = (N, {sizes}) in [0, {self.vocabulary})"
        axes = "H, W, C" if self.kind == "image" else "tokens, width"
        return f"{self.name} (N, {axes}) = (N, {sizes})"
