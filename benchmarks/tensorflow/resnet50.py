"""Train a ResNet-50 of the zoo in TensorFlow: tf.data, compile and fit, a mixed-precision policy, optionally XLA.

    python benchmarks/tensorflow/resnet50.py --data IMAGENET/train --batch-size 32 --precision bfloat16 --steps 20

Without --data it trains on the embedded digits. Prints images/s (median and quartiles), loss, time to the first step and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import triptych
from triptych.bench import script


def dataset(images: script.Images, given: Any) -> tf.data.Dataset:
    """Shuffled, augmented, batched and prefetched, without end."""

    def read(index: np.ndarray) -> tuple[np.ndarray, np.int64]:
        image, label = images[int(index)]
        return image, np.int64(label)

    def load(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image, label = tf.numpy_function(read, [index], (tf.uint8, tf.int64))
        image.set_shape((None, None, 3))
        label.set_shape(())
        return augmented(image, given.image_size), label

    numbers = tf.data.Dataset.range(len(images)).shuffle(len(images), seed=0).repeat()
    loaded = numbers.map(load, num_parallel_calls=max(1, given.workers))
    return loaded.batch(given.batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def augmented(image: tf.Tensor, size: int) -> tf.Tensor:
    """ImageNet's usual training transforms: (H, W, 3) uint8 -> (size, size, 3) float32."""
    begin, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.shape(image), tf.zeros([1, 0, 4]), min_object_covered=0.0, area_range=(0.08, 1.0), aspect_ratio_range=(3 / 4, 4 / 3),
        use_image_if_no_bounding_boxes=True,
    )  # fmt: skip
    cropped = tf.image.resize(tf.slice(image, begin, extent), (size, size), antialias=True)
    return (tf.image.random_flip_left_right(cropped) / 255.0 - script.MEAN) / script.STD


class Steps(keras.callbacks.Callback):
    """Tells the progress of each batch."""

    def __init__(self, progress: script.Progress) -> None:
        super().__init__()
        self.progress = progress

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Keras gives the mean loss so far; a batch's own is the difference of the sums."""
        mean = float((logs or {})["loss"])
        self.progress.step(mean * (batch + 1) - sum(self.progress.losses))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train for a few steps."""
    given = script.options(__doc__ or "", arguments)
    keras.utils.set_random_seed(0)
    model = triptych.create_model(given.model, framework="tensorflow", image_size=given.image_size).native
    if given.precision == "bfloat16":
        for layer in model.layers[1:]:  # of this model alone, its input not: a global policy would be everybody's
            layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")
    logits = keras.layers.Activation("linear", dtype="float32", name="logits")(model(model.inputs[0]))
    model = keras.Model(model.inputs[0], logits)
    optimizer = keras.optimizers.SGD(given.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=given.compile)

    made = dataset(given.images, given)
    progress = script.Progress(given, "tensorflow")
    model.fit(made, epochs=1, steps_per_epoch=given.steps, shuffle=False, callbacks=[Steps(progress)], verbose=0)
    gpus = tf.config.list_logical_devices("GPU")
    memory = tf.config.experimental.get_memory_info(gpus[0].name)["peak"] if gpus else None
    return progress.finish("cuda" if gpus else "cpu", memory)


if __name__ == "__main__":
    main()
