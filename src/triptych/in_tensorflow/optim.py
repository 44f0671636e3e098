"""SGD and AdamW by PyTorch's formulas (numerics 12-15), with the learning rate an argument of every step.

`keras.optimizers` hold the learning rate in float32 and fold it into the momentum buffer, so that the two agree only while it is
constant (numerics 12, 31). The update rules move one variable and its slots in place; `Optimizer` holds the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from triptych.core import recipe as formulas
from triptych.core.recipe import SGD, AdamW, Clip, Recipe, decays, is_frozen
from triptych.in_tensorflow.weights import Bindings

Slots = tuple[tf.Variable, ...]


def sgd(
    rule: SGD, decay: float, weight: tf.Variable, gradient: tf.Tensor, slots: Slots, learning_rate: tf.Tensor, step: tf.Tensor
) -> list[Any]:
    """g += wd w; v = m v + g; w -= lr (g + m v if nesterov else v), by TensorFlow's kernel, which has no Python API any more.

    `step` counts from 1 and does not matter here. Like every update rule, returns what has to be done before it is over.
    """
    (momentum,) = slots
    gradient = gradient + decay * weight if decay else gradient
    kernel = tf.raw_ops.ResourceApplyMomentum(
        var=weight.handle, accum=momentum.handle, lr=learning_rate, grad=gradient,
        momentum=tf.constant(rule.momentum, weight.dtype), use_nesterov=rule.nesterov,
    )  # fmt: skip
    return [kernel]


def adamw(
    rule: AdamW, decay: float, weight: tf.Variable, gradient: tf.Tensor, slots: Slots, learning_rate: tf.Tensor, step: tf.Tensor
) -> list[Any]:
    """w -= lr wd w; w -= lr m̂ / (sqrt(v̂) + epsilon) (Loshchilov & Hutter 2019); `step` counts from 1.

    Not by TensorFlow's kernel: in float32 its 1 - beta2 is off by 1.3e-5, and its epsilon is Kingma & Ba's (numerics 15).
    """
    mean, square = (tf.convert_to_tensor(slot) for slot in slots)
    mean = mean + (1.0 - rule.beta1) * (gradient - mean)
    square = rule.beta2 * square + (1.0 - rule.beta2) * gradient * gradient
    correction1, correction2 = bias_corrections(rule, step, weight.dtype)
    denominator = tf.sqrt(square) / tf.sqrt(correction2) + rule.epsilon
    decayed = weight * (1.0 - learning_rate * decay) if decay else weight
    return assign(weight, decayed - learning_rate / correction1 * mean / denominator, slots, (mean, square))


def assign(weight: tf.Variable, value: tf.Tensor, slots: Slots, values: Sequence[tf.Tensor]) -> list[Any]:
    """A weight and its slots take these values."""
    return [weight.assign(value), *(slot.assign(new) for slot, new in zip(slots, values, strict=True))]


def bias_corrections(rule: AdamW, step: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """1 - beta1^t and 1 - beta2^t, computed in float64: 1 - 0.999 loses four digits in float32."""
    t = tf.cast(step, tf.float64)
    return tf.cast(1.0 - rule.beta1**t, dtype), tf.cast(1.0 - rule.beta2**t, dtype)


def clip(gradients: Sequence[tf.Tensor], limits: Clip | None) -> list[tf.Tensor]:
    """Each value into [-value, value], or all by their common norm, to which PyTorch adds 1e-6 and Keras nothing (numerics 18)."""
    if limits is None:
        return list(gradients)
    if limits.value is not None:
        return [tf.clip_by_value(gradient, -limits.value, limits.value) for gradient in gradients]
    coefficient = tf.minimum(limits.norm / (tf.linalg.global_norm(gradients) + formulas.CLIP_EPSILON), 1.0)
    return [gradient * coefficient for gradient in gradients]


class Optimizer:
    """The recipe's optimizer over the parameters of a model, in state-dict order.

    `slots` holds, by slot name, one variable a parameter in the parameter's layout, zero at first; `variables` are the parameters
    that move, which leaves out the frozen ones.
    """

    def __init__(self, recipe: Recipe, bindings: Bindings) -> None:
        self.rule = recipe.optimizer
        parameters = [b.variable.value for b in bindings]
        self.slots = {name: [tf.Variable(tf.zeros_like(v), trainable=False) for v in parameters] for name in self.rule.slots}
        moved = [i for i, b in enumerate(bindings) if not is_frozen(recipe, b.tensor.layer)]
        self.variables = [parameters[i] for i in moved]
        self._decay = [self.rule.weight_decay if decays(recipe, bindings[i].tensor) else 0.0 for i in moved]
        self._slots = [tuple(held[i] for held in self.slots.values()) for i in moved]

    def apply(self, gradients: Iterable[tf.Tensor], learning_rate: tf.Tensor, step: tf.Tensor) -> None:
        """Move every variable and its slots along its gradient, weight decay included; `step` counts from 1.

        One variable after the other, the last first, as the backward pass comes to them: free to choose, TensorFlow computes every
        term of every variable before it assigns the first, several times the memory of a model.
        """
        update: Callable[..., list[Any]] = sgd if isinstance(self.rule, SGD) else adamw
        done: list[Any] = []
        for variable, decay, gradient, slots in reversed(list(zip(self.variables, self._decay, gradients, self._slots, strict=True))):
            with tf.control_dependencies(done):
                done = update(self.rule, decay, variable, gradient, slots, learning_rate, step)
