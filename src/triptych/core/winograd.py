"""Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016, arXiv:1509.09308, §4.1): 16 products for 4 pixels in place of 36.

Of every 4x4 tile d of the input, in steps of 2,
    Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A
where ⊙ sums over the input channels: for each of the 16 places in a tile a matrix product over all tiles. It rounds as the plain
convolution does; larger tiles, F(4x4, 3x3), would save more products and lose a digit. Kernels are transformed here, tiles in the rooms.
"""

from __future__ import annotations

import numpy as np

from triptych.core.spec import Layer

G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def applies(layer: Layer) -> bool:
    """Whether it is a 3x3 convolution of stride 1 that keeps the size."""
    return (layer.op, layer.kernel, layer.stride, layer.padding) == ("conv", 3, 1, 1)


def transformed(kernel: np.ndarray) -> np.ndarray:
    """G g Gᵀ of canonical kernels: (K, C, 3, 3) -> (16, C, K), computed in float64 and rounded once."""
    places: np.ndarray = np.einsum("ia,jb,kcab->ijck", G, G, kernel.astype(np.float64), optimize=True)
    return places.reshape(16, *places.shape[2:]).astype(kernel.dtype)
