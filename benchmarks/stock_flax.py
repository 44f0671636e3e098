"""A plain Flax ResNet and its training step, as a user of Flax's ImageNet example writes them: what JAX's room is measured against.

Linen modules, NHWC, batch statistics as a collection, `optax.sgd`, one jitted and donated step. ResNet v1.5, as the example and as ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState


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
        x = nn.relu(norm()(conv(64, (7, 7), strides=2, padding=3)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                x = self.block(64 * 2**stage, 2 if stage and not i else 1)(x, train)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


MODELS = {"resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)), "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3))}


def _layers(train: bool) -> tuple[Any, Any]:
    norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
    return partial(nn.Conv, use_bias=False, padding="SAME"), norm


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


def stepper(name: str, images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """A function that takes one training step on arrays that are on the device already, and waits for it."""
    model = MODELS[name](classes=1000)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros_like(images[:1]))
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.01, momentum=0.9))
    held = [State.create(apply_fn=model.apply, params=variables["params"], tx=optimizer, batch_stats=variables["batch_stats"])]
    batch = jnp.asarray(images), jnp.asarray(labels)

    def step() -> float:
        held[0], loss = train_step(held[0], *batch)
        return float(loss)

    return step
