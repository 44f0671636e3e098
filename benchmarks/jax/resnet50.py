"""Train a ResNet-50 of the zoo in JAX: Grain, optax, one jitted step over a donated state, products in bfloat16.

    python benchmarks/jax/resnet50.py --data IMAGENET/train --batch-size 32 --precision bfloat16 --steps 20

Without --data it trains on the embedded digits. Prints images/s (median and quartiles), loss, time to the first step and memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from PIL import Image

import triptych
from triptych.bench import script


class State(TrainState):
    """Parameters, optimizer state and what the layers keep, such as batch statistics."""

    kept: Any


class Augment(grain.transforms.RandomMap):
    """ImageNet's usual training transforms: ((H, W, 3) uint8, class) -> ((size, size, 3) uint8, class)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def random_map(self, element: tuple[np.ndarray, int], rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """A random window of the image, resized, and flipped or not."""
        image, label = element
        height, width = image.shape[:2]
        area, ratio = height * width * rng.uniform(0.08, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = (min(round(side), most) for side, most in ((np.sqrt(area * ratio), width), (np.sqrt(area / ratio), height)))
        left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
        window = (left, top, left + max(1, w), top + max(1, h))
        resized = np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BILINEAR, window))
        return (resized[:, ::-1] if rng.random() < 0.5 else resized), label


def batches(images: script.Images, given: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled, augmented and batched, prepared by threads, without end."""
    made = grain.MapDataset.source(images).seed(0).shuffle().repeat().random_map(Augment(given.image_size))
    reading = grain.ReadOptions(num_threads=given.workers, prefetch_buffer_size=2 * given.batch_size * bool(given.workers))
    return iter(made.to_iter_dataset(reading).batch(given.batch_size, drop_remainder=True))


@partial(jax.jit, donate_argnums=0)
def train_step(state: State, pixels: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
    """One step: (N, H, W, 3) uint8 and (N,) classes -> the new state, and the loss before it."""
    images = (pixels / 255.0 - jnp.array(script.MEAN)) / jnp.array(script.STD)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, **state.kept}
        logits, kept = state.apply_fn(variables, images, train=True, mutable=list(state.kept))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()
        return loss, kept

    (loss, kept), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, kept=kept), loss


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train for a few steps."""
    given = script.options(__doc__ or "", arguments)
    module, variables = triptych.create_model(given.model, framework="jax", image_size=given.image_size).native
    if given.precision == "bfloat16":
        module = module.clone(dtype=jnp.bfloat16)
    kept = {name: tree for name, tree in variables.items() if name != "params"}
    optimizer = optax.chain(optax.add_decayed_weights(5e-5), optax.sgd(given.learning_rate, momentum=0.9, nesterov=True))
    state = State.create(apply_fn=module.apply, params=variables["params"], tx=optimizer, kept=kept)
    # As later steps have it: for a Python 0, and for arrays that are bound to no device, the step would be compiled once more.
    state = jax.device_put(state.replace(step=jnp.zeros((), jnp.int32)), jax.local_devices()[0])

    made, progress = batches(given.images, given), script.Progress(given, "jax")
    for _ in range(given.steps):
        state, loss = train_step(state, *next(made))
        jax.block_until_ready(state)
        progress.step(float(loss))
    device = jax.local_devices()[0]
    memory = device.memory_stats()
    return progress.finish(device.platform, memory["peak_bytes_in_use"] if memory else None)


if __name__ == "__main__":
    main()
