"""What a user of JAX writes without us: a plain Flax ResNet and its training step, as in Flax's ImageNet example.

Linen modules, NHWC, batch statistics as a collection, `optax.sgd`, one jitted and donated step. ResNet v1.5, as the example and as ours.
One thing is not the example's: padding is explicit and symmetric instead of `SAME`, at the same cost, so that our weights give our
logits (numerics 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict

from triptych.core.contender import RATE, Contender
from triptych.core.errors import LaneMissing
from triptych.core.spec import ResNetSpec, Spec
from triptych.in_jax.weights import to_native


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, H / stride, W / stride, features)."""
        conv, norm = _layers(train)
        y = nn.relu(norm()(conv(self.features, (3, 3), strides=self.stride)(x)))
        y = norm(scale_init=nn.initializers.zeros)(conv(self.features, (3, 3))(y))
        return nn.relu(y + _shortcut(x, y, self.stride, train))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the features."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, H / stride, W / stride, 4 features)."""
        conv, norm = _layers(train)
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), strides=self.stride)(y)))
        y = norm(scale_init=nn.initializers.zeros)(conv(4 * self.features, (1, 1))(y))
        return nn.relu(y + _shortcut(x, y, self.stride, train))


class ResNet(nn.Module):
    """Stem, four stages, mean, classifier."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """(N, H, W, 3) -> (N, classes)."""
        conv, norm = _layers(train)
        x = nn.relu(norm()(conv(64, (7, 7), strides=2)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                x = self.block(64 * 2**stage, 2 if stage and not i else 1)(x, train)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


MODELS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


def _layers(train: bool) -> tuple[Any, Any]:
    norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
    return _conv, norm


def _conv(features: int, kernel: tuple[int, int], strides: int = 1, name: str | None = None) -> nn.Conv:
    return nn.Conv(features, kernel, strides=strides, padding=kernel[0] // 2, use_bias=False, name=name)


def _shortcut(x: jax.Array, y: jax.Array, stride: int, train: bool) -> jax.Array:
    if x.shape == y.shape:
        return x
    conv, norm = _layers(train)
    return norm(name="norm_proj")(conv(y.shape[-1], (1, 1), strides=stride, name="conv_proj")(x))


class State(TrainState):
    """Parameters, optimizer state and batch statistics."""

    batch_stats: Any


@partial(jax.jit, donate_argnums=0)
def train_step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
    """One step; returns the new state and the loss before it."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, images, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates["batch_stats"]

    (loss, batch_stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats), loss


@partial(jax.jit, static_argnums=0)
def predict(model: ResNet, variables: Any, images: jax.Array) -> Any:
    """Logits in eval mode."""
    return model.apply(variables, images, train=False)


def contender(spec: Spec, weights: Mapping[str, np.ndarray], mode: str) -> Contender:
    """The plain model with the same weights. LaneMissing when the example has no such model."""
    if not isinstance(spec, ResNetSpec) or spec.name not in MODELS:
        raise LaneMissing(f"Flax's example has no {spec.name}")
    model = ResNet(*MODELS[spec.name], classes=spec.num_classes)
    if mode == "inference":
        variables = plain_variables(spec, weights)
        return Contender(stage, lambda batch: np.asarray(predict(model, variables, batch[0])), compiles=True)
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(RATE, momentum=0.9))
    held: list[State] = []

    def start_from(weights: Mapping[str, np.ndarray]) -> None:
        variables = plain_variables(spec, weights)
        params, statistics = jax.tree.map(jnp.array, (variables["params"], variables["batch_stats"]))
        state = State.create(apply_fn=model.apply, params=params, tx=optimizer, batch_stats=statistics)
        held[:] = [state.replace(step=jnp.zeros((), jnp.int32))]  # as later steps have it: a Python 0 would be compiled for, too

    def run(batch: tuple[jax.Array, jax.Array]) -> np.ndarray:
        held[0], loss = jax.block_until_ready(train_step(held[0], *batch))
        return np.asarray(loss)

    start_from(weights)
    return Contender(stage, run, start_from, compiles=True)


def stage(images: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The batch as arrays on the device."""
    return jax.block_until_ready((jnp.asarray(images), jnp.asarray(labels)))


def plain_variables(spec: ResNetSpec, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Canonical weights under the names that `@nn.compact` gives: `layer2.0.conv1` is `Bottleneck_3/Conv_0`."""
    kind = MODELS[spec.name][0].__name__
    numbers = {tuple(block.name.split(".")): number for number, block in enumerate(spec.blocks())}
    plain = {}
    for (collection, *path, leaf), value in flatten_dict(to_native(spec.tensors(), weights, "float32", jax.devices("cpu")[0])).items():
        block = (f"{kind}_{numbers[tuple(path[:2])]}",) if len(path) > 1 else ()
        if leaf != "num_batches_tracked":
            plain[(collection, *block, _plain_name(".".join(path[2:] or path)), leaf)] = value
    return dict(unflatten_dict(plain))


def _plain_name(layer: str) -> str:
    """`conv1` -> `Conv_0`, `bn2` -> `BatchNorm_1`; Flax counts the layers of a kind."""
    names = {"downsample.0": "conv_proj", "downsample.1": "norm_proj", "fc": "Dense_0"}
    if layer in names:
        return names[layer]
    return f"{'Conv' if layer.startswith('conv') else 'BatchNorm'}_{int(layer[-1]) - 1}"
