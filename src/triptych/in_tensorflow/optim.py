"""SGD and AdamW by PyTorch's formulas (numerics 12-15), with the learning rate an argument of every step.

`keras.optimizers` hold the learning rate in float32 and fold it into the momentum buffer, so that the two agree only while it is
constant (numerics 12, 31). The update rules are pure functions of tensors; `Optimizer` holds the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from triptych.core.recipe import SGD, AdamW, Recipe, decays
from triptych.in_tensorflow.weights import Bindings

Tensors = tuple[tf.Tensor, ...]


def sgd(
    rule: SGD, decay: float, weight: tf.Tensor, gradient: tf.Tensor, slots: Tensors, learning_rate: tf.Tensor, step: tf.Tensor
) -> tuple[tf.Tensor, Tensors]:
    """g += wd w; v = m v + g; w -= lr (g + m v if nesterov else v). `step` counts from 1 and does not matter here."""
    (momentum,) = slots
    gradient = gradient + decay * weight if decay else gradient
    momentum = rule.momentum * momentum + gradient
    direction = gradient + rule.momentum * momentum if rule.nesterov else momentum
    return weight - learning_rate * direction, (momentum,)


def adamw(
    rule: AdamW, decay: float, weight: tf.Tensor, gradient: tf.Tensor, slots: Tensors, learning_rate: tf.Tensor, step: tf.Tensor
) -> tuple[tf.Tensor, Tensors]:
    """w -= lr wd w; w -= lr m̂ / (sqrt(v̂) + epsilon) (Loshchilov & Hutter 2019); `step` counts from 1."""
    mean, square = slots
    mean = mean + (1.0 - rule.beta1) * (gradient - mean)
    square = rule.beta2 * square + (1.0 - rule.beta2) * gradient * gradient
    correction1, correction2 = bias_corrections(rule, step, weight.dtype)
    denominator = tf.sqrt(square) / tf.sqrt(correction2) + rule.epsilon
    weight = weight * (1.0 - learning_rate * decay) if decay else weight
    return weight - learning_rate / correction1 * mean / denominator, (mean, square)


def bias_corrections(rule: AdamW, step: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """1 - beta1^t and 1 - beta2^t, computed in float64: 1 - 0.999 loses four digits in float32."""
    t = tf.cast(step, tf.float64)
    return tf.cast(1.0 - rule.beta1**t, dtype), tf.cast(1.0 - rule.beta2**t, dtype)


class Optimizer:
    """The recipe's optimizer over the trainable variables of a model, in state-dict order.

    `slots` holds, by slot name, one variable a parameter in the parameter's layout, zero at first.
    """

    def __init__(self, recipe: Recipe, bindings: Bindings) -> None:
        self.rule = recipe.optimizer
        self.variables = [b.variable.value for b in bindings]
        self.decay = [self.rule.weight_decay if decays(recipe, b.tensor) else 0.0 for b in bindings]
        self.slots = {name: [tf.Variable(tf.zeros_like(v), trainable=False) for v in self.variables] for name in self.rule.slots}

    def apply(self, gradients: Iterable[tf.Tensor], learning_rate: tf.Tensor, step: tf.Tensor) -> None:
        """Move every variable and its slots; `step` counts from 1.

        One variable after the other, the last first, as the backward pass comes to them: free to choose, TensorFlow computes every
        term of every variable before it assigns the first, several times the memory of a model.
        """
        update: Callable[..., tuple[tf.Tensor, Tensors]] = sgd if isinstance(self.rule, SGD) else adamw
        slots = zip(*self.slots.values(), strict=True)
        assigned: list[Any] = []
        for variable, decay, gradient, held in reversed(list(zip(self.variables, self.decay, gradients, slots, strict=True))):
            with tf.control_dependencies(assigned):
                before = tuple(tf.convert_to_tensor(slot) for slot in held)
                weight, after = update(self.rule, decay, tf.convert_to_tensor(variable), gradient, before, learning_rate, step)
                assigned = [variable.assign(weight), *(slot.assign(value) for slot, value in zip(held, after, strict=True))]
