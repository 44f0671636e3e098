"""The lanes of JAX: `jit`, and op by op without it; `jax.vmap`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from comparison import hlo
from comparison.setting import BLOCK, LAYERS, Arrays, Lane, Setting
from triptych.core.contender import RATE, RECIPE
from triptych.in_jax import gradients, layers, optim, train
from triptych.in_jax import weights as canonical
from triptych.in_jax.model import Model, numerics
from triptych.in_jax.vit import TransformerBlock

Function = Callable[..., Any]
MODES: dict[str, Callable[[Function], Function]] = {"eager": lambda function: function, "jit": jax.jit}


@dataclass(frozen=True, slots=True)
class Network:
    """A function of parameters and a batch, its loss (a mean over the batch), and the way to canonical names."""

    params: Any
    apply: Function
    loss: Function
    canonical: Callable[[Any], Arrays]

    def one(self, params: Any, x: jax.Array) -> jax.Array:
        """The output of a single example, without a batch dimension."""
        return self.apply(params, x[None])[0]

    def loss_of_one(self, params: Any, x: jax.Array, target: jax.Array) -> jax.Array:
        """The loss of a single example."""
        return self.loss(params, x[None], target[None])


def network(setting: Setting, weights: Mapping[str, np.ndarray], precision: str) -> Network:
    """The workload of a setting."""
    model, tensors = Model(setting.spec, weights, precision, "cpu"), setting.spec.parameters()
    if setting.workload == "vit":
        module = model.module

        def cross_entropy(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
            return train.cross_entropy(module.apply({"params": params}, x), labels, 0.0)

        return Network(
            model.variables["params"], lambda params, x: module.apply({"params": params}, x), cross_entropy,
            lambda tree: canonical.to_canonical(tensors, {"params": tree}),
        )  # fmt: skip
    block = TransformerBlock(setting.spec, {"dtype": None, "param_dtype": np.dtype(precision)})
    inside = [tensor for tensor in tensors if tensor.name.startswith(f"{BLOCK}.")]
    return Network(
        model.variables["params"]["blocks"]["0"],
        lambda params, x: block.apply({"params": params}, x),
        lambda params, x, target: jnp.square(block.apply({"params": params}, x) - target).mean(),
        lambda tree: canonical.to_canonical(inside, {"params": {"blocks": {"0": tree}}}),
    )


def running(precision: str) -> contextlib.AbstractContextManager[None]:
    """x64 for float64, full products."""
    return numerics(precision)


def release() -> None:
    """Forget what was compiled."""
    jax.clear_caches()


def lane(setting: Setting, weights: Mapping[str, np.ndarray], precision: str, mode: str, way: str) -> Lane:
    """One lane, which compiles at its first run if at all."""
    net = network(setting, weights, precision)
    x, target = (jnp.asarray(each if np.issubdtype(each.dtype, np.integer) else each.astype(precision)) for each in setting.inputs())
    makers: dict[str, Function] = {
        "passes": passes,
        "vmap": inference,
        "per_sample": per_sample,
        "layers": layer,
        "gradients": own_gradient,
    }
    made: Lane = makers[setting.part](net, setting, MODES[mode], way, jax.block_until_ready(x), target)
    return made


def passes(net: Network, setting: Setting, compiled: Function, way: str, x: jax.Array, target: jax.Array) -> Lane:
    """Forward; loss and gradients; a whole step."""
    if setting.task == "forward":
        forward = compiled(net.apply)
        return Lane(lambda: jax.block_until_ready(forward(net.params, x)), lambda y: {"output": np.asarray(y)})
    if setting.task == "gradient":
        gradient = compiled(jax.value_and_grad(net.loss))
        return Lane(
            lambda: jax.block_until_ready(gradient(net.params, x, target)),
            lambda found: {"loss": np.asarray(found[0]), **net.canonical(found[1])},
        )
    return training(net, compiled, x, target)


def training(net: Network, compiled: Function, x: jax.Array, target: jax.Array) -> Lane:
    """A step of SGD with momentum, over donated buffers when jitted; each begins where the last one ended."""
    everywhere = jax.tree.map(lambda _: True, net.params)

    def step(params: Any, state: Any) -> Any:
        loss, found = jax.value_and_grad(net.loss)(params, x, target)
        sgd = optim.optimizer(RECIPE, everywhere, {"learning_rate": jnp.asarray(RATE, x.dtype)})
        updates, state = sgd.update(found, state, params)
        return optax.apply_updates(params, updates), state, loss

    function = jax.jit(step, donate_argnums=(0, 1)) if compiled is jax.jit else step
    start = optim.optimizer(RECIPE, everywhere, {"learning_rate": RATE}).init(net.params)
    held = [(jax.tree.map(jnp.copy, net.params), start)]

    def run() -> Any:
        params, state, loss = jax.block_until_ready(function(*held[0]))
        held[0] = params, state
        return params, state, loss

    def read(found: Any) -> Arrays:
        momentum = net.canonical(optax.tree.get(found[1], "trace"))
        weights = {f"{name} after": array for name, array in net.canonical(found[0]).items()}
        return {"loss": np.asarray(found[2]), **weights, **{f"{name} momentum": array for name, array in momentum.items()}}

    return Lane(run, read)


def inference(net: Network, setting: Setting, compiled: Function, way: str, x: jax.Array, target: jax.Array) -> Lane:
    """Outputs of every example: one after the other, mapped, or as the batch that the model was written for."""
    function = compiled({"loop": net.one, "vmap": jax.vmap(net.one, (None, 0)), "batched": net.apply}[way])
    examples = list(x)

    def run() -> jax.Array:
        found = jnp.stack([function(net.params, each) for each in examples]) if way == "loop" else function(net.params, x)
        return jax.block_until_ready(found)

    return Lane(run, lambda y: {"output": np.asarray(y)})


def per_sample(net: Network, setting: Setting, compiled: Function, way: str, x: jax.Array, target: jax.Array) -> Lane:
    """The gradient of every example: one after the other, or mapped; or the one of their mean."""
    one = jax.grad(net.loss_of_one)
    function = compiled({"loop": one, "vmap": jax.vmap(one, (None, 0, 0)), "batched": jax.grad(net.loss)}[way])
    examples = list(zip(x, target, strict=True))

    def run() -> Any:
        if way == "loop":
            return jax.block_until_ready(jax.tree.map(lambda *each: jnp.stack(each), *[function(net.params, *each) for each in examples]))
        return jax.block_until_ready(function(net.params, x, target))

    def read(found: Any) -> Arrays:
        if way == "batched":
            return {f"mean {name}": array for name, array in net.canonical(found).items()}
        each = [net.canonical(jax.tree.map(lambda array, i=i: array[i], found)) for i in range(len(x))]
        return {name: np.stack([one[name] for one in each]) for name in each[0]}

    return Lane(run, read)


def layer(net: Network, setting: Setting, compiled: Function, way: str, x: jax.Array, target: jax.Array) -> Lane:
    """One layer of the block, forward."""
    spec, kinds = setting.spec, {"dtype": None, "param_dtype": x.dtype}
    module = {
        "layer_norm": lambda: layers.LayerNorm(spec.layer_norm_epsilon, **kinds),
        "linear": lambda: layers.Dense(3 * spec.width, **kinds),
        "attention": lambda: layers.ScaledDotProductAttention(spec.heads),
        "gelu": layers.GELU,
    }[setting.task]()
    params = net.params
    for part in LAYERS[setting.task].split("."):
        params = params.get(part, {})
    function = compiled(lambda params, x: module.apply({"params": params}, x))
    return Lane(lambda: jax.block_until_ready(function(params, x)), lambda y: {"output": np.asarray(y)})


def own_gradient(net: Network, setting: Setting, compiled: Function, way: str, x: jax.Array, target: jax.Array) -> Lane:
    """The gradient of one layer by its input: automatic, or the one of `in_jax.gradients`."""
    gradient = compiled(jax.grad(lambda x: (differentiated(setting, way)(x) * target).sum()))
    return Lane(lambda: jax.block_until_ready(gradient(x)), lambda dx: {"gradient": np.asarray(dx)})


def differentiated(setting: Setting, way: str) -> Function:
    """GELU or attention, with a gradient of either kind."""
    heads = setting.spec.heads
    if setting.task == "gelu":
        return gradients.gelu if way == "own" else lambda x: layers.GELU().apply({}, x)
    return (lambda x: gradients.attention(x, heads)) if way == "own" else lambda x: layers.ScaledDotProductAttention(heads).apply({}, x)


def report(setting: Setting, weights: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """What `jit` made of a pass, and how many primitives it is op by op."""
    x, target = (jnp.asarray(each if np.issubdtype(each.dtype, np.integer) else each.astype("float32")) for each in setting.inputs())
    if setting.part == "gradients":
        function, given = lambda way: jax.grad(lambda x: (differentiated(setting, way)(x) * target).sum()), (x,)
        return {
            f"jit {way}": {**compiled_report(function(way), given), **kept(differentiated(setting, way), x)} for way in ("autodiff", "own")
        }
    net = network(setting, weights, "float32")
    whole = setting.task == "gradient"
    function, given = (jax.value_and_grad(net.loss), (net.params, x, target)) if whole else (net.apply, (net.params, x))
    eager = {"operations": equations(jax.make_jaxpr(function)(*given).jaxpr)}
    held = kept(lambda params: net.loss(params, x, target), net.params) if whole else {}
    return {"eager": eager, "jit": {**compiled_report(function, given), **held}}


def compiled_report(function: Function, given: tuple[Any, ...]) -> dict[str, Any]:
    """Counts of the optimized HLO, and XLA's own analyses."""
    lowered = jax.jit(function).lower(*given)
    made = lowered.compile()
    memory, cost = made.memory_analysis(), made.cost_analysis()
    return {
        "operations": hlo.stablehlo_operations(lowered.as_text()),
        **hlo.counts(made.as_text()),
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
    }


def kept(function: Function, x: Any) -> dict[str, int]:
    """Bytes that a forward pass keeps for the backward pass, op by op; the parameters themselves are not counted."""
    given = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(x)}
    _, backward = jax.vjp(function, x)
    found = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves(backward) if isinstance(leaf, jax.Array)}
    return {"kept_bytes": sum(size for pointer, size in found.items() if pointer not in given)}


def equations(jaxpr: Any) -> int:
    """Primitives of a jaxpr, with those of the functions it calls in place of the calls."""
    total = 0
    for equation in jaxpr.eqns:
        called = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inner = [each for each in called if hasattr(each, "eqns")]
        total += sum(map(equations, inner)) if inner else 1
    return total
