"""The lanes of TensorFlow: eager, `tf.function`, and XLA by `jit_compile`; `tf.vectorized_map`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from comparison import hlo
from comparison.setting import BLOCK, LAYERS, Arrays, Lane, Setting
from triptych.core.contender import RATE, RECIPE
from triptych.in_tensorflow import gradients, optim, train
from triptych.in_tensorflow import weights as canonical
from triptych.in_tensorflow.model import Model, create_model, segments
from triptych.in_tensorflow.weights import Bindings

Function = Callable[..., Any]
MODES: dict[str, Callable[[Function], Function]] = {
    "eager": lambda function: function,
    "function": functools.partial(tf.function, autograph=False),
    "xla": functools.partial(tf.function, autograph=False, jit_compile=True),
}


@dataclass(frozen=True, slots=True)
class Network:
    """A Keras model, the loss of its outputs (a mean over the batch), and its variables by canonical name."""

    model: Model
    native: keras.Model
    criterion: Function
    bindings: Bindings

    @property
    def variables(self) -> list[tf.Variable]:
        """What is trained."""
        return [binding.variable.value for binding in self.bindings]

    def apply(self, x: tf.Tensor) -> tf.Tensor:
        """The output of a batch."""
        return self.native(x, training=False)

    def one(self, x: tf.Tensor) -> tf.Tensor:
        """The output of a single example, without a batch dimension."""
        return self.apply(x[None])[0]

    def loss_and_gradients(self, x: tf.Tensor, target: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The mean loss of a batch, and its gradient by every variable."""
        variables = self.variables
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            loss = self.criterion(self.apply(x), target)
        return loss, tape.gradient(loss, variables)

    def gradients_of_one(self, example: tuple[tf.Tensor, tf.Tensor]) -> list[tf.Tensor]:
        """The gradient of the loss of a single example."""
        x, target = example
        return self.loss_and_gradients(x[None], target[None])[1]

    def canonical(self, tensors: Sequence[tf.Tensor]) -> Arrays:
        """Canonical names and layouts."""
        return canonical.read(self.bindings, tensors)


def network(setting: Setting, weights: Mapping[str, np.ndarray], precision: str) -> Network:
    """The workload of a setting."""
    model = create_model(setting.spec, weights, precision=precision, device="cpu")
    if setting.workload == "vit":
        return Network(model, model.native, lambda logits, labels: train.cross_entropy(logits, labels, 0.0), model.bindings)
    block = segments(model.native, setting.spec)[1]
    inside = tuple(binding for binding in model.bindings if binding.name.startswith(f"{BLOCK}."))
    return Network(model, block, lambda y, target: tf.reduce_mean(tf.square(y - target)), inside)


@contextlib.contextmanager
def running(precision: str) -> Iterator[None]:
    """On the CPU, where products are in full anyway."""
    with tf.device("CPU"):
        yield


def release() -> None:
    """Forget what was compiled, and what Keras holds of its models."""
    keras.utils.clear_session()


def lane(setting: Setting, weights: Mapping[str, np.ndarray], precision: str, mode: str, way: str) -> Lane:
    """One lane, which traces and compiles at its first run if at all."""
    net = network(setting, weights, precision)
    x, target = (tf.constant(each if np.issubdtype(each.dtype, np.integer) else each.astype(precision)) for each in setting.inputs())
    makers: dict[str, Function] = {
        "passes": passes,
        "vmap": inference,
        "per_sample": per_sample,
        "layers": layer,
        "gradients": own_gradient,
    }
    made: Lane = makers[setting.part](net, setting, MODES[mode], way, x, target)
    return made


def passes(net: Network, setting: Setting, compiled: Function, way: str, x: tf.Tensor, target: tf.Tensor) -> Lane:
    """Forward; loss and gradients; a whole step."""
    if setting.task == "forward":
        return forward(compiled(net.apply), x)
    if setting.task == "gradient":
        gradient = compiled(net.loss_and_gradients)
        return Lane(lambda: gradient(x, target), lambda found: {"loss": found[0].numpy(), **net.canonical(found[1])})
    velocities = [tf.Variable(tf.zeros_like(variable), trainable=False) for variable in net.variables]
    rate, rule = tf.constant(RATE, x.dtype), RECIPE.optimizer

    def step(x: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        loss, found = net.loss_and_gradients(x, target)
        for variable, gradient, velocity in zip(net.variables, found, velocities, strict=True):
            optim.sgd(rule, rule.weight_decay, variable, gradient, (velocity,), rate, None)
        return loss

    function = compiled(step)

    def read(loss: tf.Tensor) -> Arrays:
        weights = {f"{name} after": array for name, array in net.canonical(net.variables).items()}
        momentum = {f"{name} momentum": array for name, array in net.canonical(velocities).items()}
        return {"loss": loss.numpy(), **weights, **momentum}

    return Lane(lambda: function(x, target), read)


def forward(function: Function, x: tf.Tensor) -> Lane:
    """A function of a batch."""
    return Lane(lambda: function(x), lambda y: {"output": y.numpy()})


def inference(net: Network, setting: Setting, compiled: Function, way: str, x: tf.Tensor, target: tf.Tensor) -> Lane:
    """Outputs of every example: one after the other, mapped, or as the batch that the model was written for."""
    function = compiled({"loop": net.one, "vmap": lambda x: tf.vectorized_map(net.one, x), "batched": net.apply}[way])
    examples = tf.unstack(x)
    return forward((lambda _: tf.stack([function(each) for each in examples])) if way == "loop" else function, x)


def per_sample(net: Network, setting: Setting, compiled: Function, way: str, x: tf.Tensor, target: tf.Tensor) -> Lane:
    """The gradient of every example: one after the other, or mapped; or the one of their mean."""
    ways: dict[str, Function] = {
        "loop": lambda x, target: net.gradients_of_one((x, target)),
        "vmap": lambda x, target: tf.vectorized_map(net.gradients_of_one, (x, target)),
        "batched": lambda x, target: net.loss_and_gradients(x, target)[1],
    }
    function, examples = compiled(ways[way]), list(zip(tf.unstack(x), tf.unstack(target), strict=True))

    def run() -> list[tf.Tensor]:
        if way == "loop":
            return [tf.stack(each) for each in zip(*[function(*each) for each in examples], strict=True)]
        return function(x, target)

    def read(found: list[tf.Tensor]) -> Arrays:
        if way == "batched":
            return {f"mean {name}": array for name, array in net.canonical(found).items()}
        each = [net.canonical([tensor[i] for tensor in found]) for i in range(len(examples))]
        return {name: np.stack([one[name] for one in each]) for name in each[0]}

    return Lane(run, read)


def layer(net: Network, setting: Setting, compiled: Function, way: str, x: tf.Tensor, target: tf.Tensor) -> Lane:
    """One layer of the block, forward."""
    return forward(compiled(net.model.native.get_layer(f"{BLOCK}.{LAYERS[setting.task]}")), x)


def own_gradient(net: Network, setting: Setting, compiled: Function, way: str, x: tf.Tensor, target: tf.Tensor) -> Lane:
    """The gradient of one layer by its input: automatic, or the one of `in_tensorflow.gradients`."""
    function = compiled(gradient_by_input(net, setting, way, target))
    return Lane(lambda: function(x), lambda dx: {"gradient": dx.numpy()})


def gradient_by_input(net: Network, setting: Setting, way: str, target: tf.Tensor) -> Function:
    """GELU or attention, differentiated in either way."""
    layer = net.model.native.get_layer(f"{BLOCK}.{LAYERS[setting.task]}")
    heads = setting.spec.heads
    own = gradients.gelu if setting.task == "gelu" else lambda x: gradients.attention(x, heads)

    def gradient(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum((own if way == "own" else layer)(x) * target)
        return tape.gradient(y, x)

    return gradient


def report(setting: Setting, weights: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Nodes of the graph, and what XLA made of it."""
    net = network(setting, weights, "float32")
    x, target = (tf.constant(each if np.issubdtype(each.dtype, np.integer) else each.astype("float32")) for each in setting.inputs())
    if setting.part == "gradients":
        return {f"xla {way}": compiled_report(gradient_by_input(net, setting, way, target), (x,)) for way in ("autodiff", "own")}
    function, given = (net.loss_and_gradients, (x, target)) if setting.task == "gradient" else (net.apply, (x,))
    graph = MODES["function"](function).get_concrete_function(*given).graph
    return {"function": {"operations": nodes(graph)}, "xla": compiled_report(function, given)}


def compiled_report(function: Function, given: tuple[tf.Tensor, ...]) -> dict[str, Any]:
    """Counts of the HLO before and after optimization."""
    text = MODES["xla"](function).experimental_get_compiler_ir(*given)
    return {"operations": hlo.instructions(text(stage="hlo")), **hlo.counts(text(stage="optimized_hlo"))}


def nodes(graph: Any) -> int:
    """Operations of a graph and of the functions it calls, constants, inputs and identities left out."""
    definition = graph.as_graph_def()
    every = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    return sum(node.op not in {"Const", "Placeholder", "Identity", "NoOp", "ReadVariableOp"} for node in every)
