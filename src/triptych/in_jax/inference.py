"""How a model that is only asked runs fastest on a CPU, in full float32: the tuned lanes of inference.

What holds XLA:CPU back in a network like ResNet-50 is not its products, which reach 90 % of the processor, but what lies between them:

- A second thread gives it little: it splits each small operation and waits for both halves. Of ResNet-50's first two stages two threads
  took longer than one. So every thread gets images of its own.
- It writes every bias, ReLU and addition as a pass over memory of its own. So each stage takes as many images at a time as stay in the
  caches between such passes, and not the whole batch. One image would be too few for the last stage, whose weights outweigh it.
- Its convolutions pad and copy. A 1x1 convolution is a matrix product, and a 3x3 one with stride 1 costs fewer products by Winograd's
  algorithm: 16 for 4 pixels instead of 36, as one batched product, which XLA has. Other XLA flags gained nothing (jaxlib 0.10).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from triptych.core.batch import Inputs, Named
from triptych.core.contender import RECIPE
from triptych.core.contract import Execution
from triptych.core.environment import usable_cores
from triptych.core.spec import ResNetSpec
from triptych.core.threads import shared_out
from triptych.core.winograd import applies, transformed
from triptych.in_jax.model import Model, numerics
from triptych.in_jax.resnet import ResNet
from triptych.in_jax.train import executed

CACHED = 4 << 20
"""Bytes of the largest activation that a stage may have at a time: of ResNet-50's four stages 1, 2, 5 and 10 images of 224 pixels."""

LEVERS = (
    "folded BatchNorm", "1x1 convolutions as matrix products", "3x3 convolutions by Winograd's algorithm", "stage by stage",
    "every thread its own images",
)  # fmt: skip

Kernels = Mapping[str, jax.Array]
"""Transformed kernels (16, C, K) by the name of their convolution."""


def program(model: Model, execution: Execution) -> tuple[Callable[[Inputs], np.ndarray], tuple[str, ...]]:
    """Inputs -> logits, (N, classes), of a model whose BatchNorm is folded, and the levers it pulls."""
    module, variables = executed(model.module, RECIPE, execution), model.variables
    with numerics(model.precision):
        kernels = {name: model.put(kernel) for name, kernel in winograd_kernels(model).items()}
    predict = jax.jit(partial(staged, module) if isinstance(module, ResNet) else partial(apply, module))

    def run(named: Named) -> np.ndarray:
        with numerics(model.precision):  # a setting of the thread
            return np.asarray(predict(variables, kernels, *model.native_inputs(named)))

    shared = shared_out(run, run, usable_cores())
    return lambda inputs: shared(model.check_inputs(inputs)), LEVERS


def winograd_kernels(model: Model) -> dict[str, np.ndarray]:
    """The transformed kernels, (16, C, K), of the layers that Winograd's algorithm takes."""
    weights = model.weights()
    chosen = [layer.name for layer in model.spec.layers() if applies(layer)]
    return {name: transformed(weights[f"{name}.weight"]) for name in chosen}


def staged(module: ResNet, variables: Any, kernels: Kernels, images: jax.Array) -> jax.Array:
    """Logits, (N, H, W, C) -> (N, classes): part after part of the network, each over as many images at a time as stay in the caches."""
    x = images
    for part, nbytes in largest_activations(module.spec).items():
        run = partial(apply, module.clone(parts=(part,)), variables, kernels)
        x = by_chunks(run, x, max(1, CACHED // nbytes))
    return x


def largest_activations(spec: ResNetSpec) -> dict[str, int]:
    """Bytes of the largest float32 activation of one image, by part of the network."""
    largest: dict[str, int] = {}
    stages = {block.name.partition(".")[0] for block in spec.blocks()}
    part = "stem"
    for layer in spec.layers():
        part = layer.name.partition(".")[0] if layer.name.partition(".")[0] in stages else "head" if part in stages else part
        largest[part] = max(largest.get(part, 0), 4 * layer.size**2 * layer.out_channels)
    return largest


def by_chunks(run: Callable[[jax.Array], jax.Array], x: jax.Array, most: int) -> jax.Array:
    """`run(x)`, of at most `most` of its first axis at a time, one chunk after the other."""
    count = -(-len(x) // most)
    size = -(-len(x) // max(1, count))
    if count <= 1:
        return run(x)
    whole = len(x) // size * size
    y = lax.map(run, x[:whole].reshape(-1, size, *x.shape[1:]))
    y = y.reshape(-1, *y.shape[2:])
    return y if whole == len(x) else jnp.concatenate([y, run(x[whole:])])


def apply(module: nn.Module, variables: Any, kernels: Kernels, *inputs: jax.Array) -> Any:
    """`module.apply`, with Winograd's algorithm for the convolutions that have a transformed kernel."""

    def interceptor(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        kernel = kernels.get(".".join(context.module.path))
        if kernel is None or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        return winograd(args[0], kernel) + context.module.get_variable("params", "bias")

    with nn.intercept_methods(interceptor):
        return module.apply(variables, *inputs)


def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution of stride 1 and padding 1, its kernel `transformed`: (N, H, W, C) -> (N, H, W, K)."""
    count, height, width, channels = x.shape
    rows, columns = (-(-size // 2) for size in (height, width))
    x = jnp.pad(x, ((0, 0), (1, 2 * rows + 1 - height), (1, 2 * columns + 1 - width), (0, 0)))
    tiles = [[x[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for j in range(4)] for i in range(4)]  # [4][4] of (N, rows, columns, C)
    inputs = jnp.stack([place for row in _rows(_input, _columns(_input, tiles)) for place in row]).reshape(16, -1, channels)
    products = jnp.einsum("pnc,pck->pnk", inputs, kernel, precision=lax.Precision.HIGHEST)
    places = products.reshape(4, 4, count, rows, columns, -1)
    outputs = _rows(_output, _columns(_output, [list(row) for row in places]))  # [2][2] of (N, rows, columns, K)
    y = jnp.stack([jnp.stack(row, axis=3) for row in outputs], axis=2)  # (N, rows, 2, columns, 2, K)
    return y.reshape(count, 2 * rows, 2 * columns, -1)[:, :height, :width]


Tile = list[Any]


def _rows(transform: Callable[[Tile], Tile], tile: list[Tile]) -> list[Tile]:
    return [transform(row) for row in tile]


def _columns(transform: Callable[[Tile], Tile], tile: list[Tile]) -> list[Tile]:
    return [list(row) for row in zip(*(transform(list(column)) for column in zip(*tile, strict=True)), strict=True)]


def _input(d: Tile) -> Tile:
    """Bᵀ d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output(m: Tile) -> Tile:
    """Aᵀ m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
