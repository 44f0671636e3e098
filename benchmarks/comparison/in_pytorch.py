"""The lanes of PyTorch: eager, and `torch.compile`; `torch.func.vmap`."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from comparison.setting import BLOCK, LAYERS, VMAP_MATH, Arrays, Lane, Setting
from triptych.core.contender import RATE, RECIPE
from triptych.in_pytorch import gradients, train
from triptych.in_pytorch.model import create_model, full_precision

Function = Callable[..., Any]
MODES: dict[str, Callable[[Function], Function]] = {
    "eager": lambda function: function,
    "compiled": functools.partial(torch.compile, dynamic=False, fullgraph=True),
}


@dataclass(frozen=True, slots=True)
class Network:
    """A module of its own, the loss of its outputs (a mean over the batch), and the names in front of its parameters'."""

    module: nn.Module
    criterion: Function
    prefix: str

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters, as functions take them."""
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    def apply(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The output of a batch."""
        return functional_call(self.module, params, (x,))

    def loss(self, params: Mapping[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        """The mean loss of a batch."""
        return self.criterion(self.apply(params, x), target)

    def one(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The output of a single example, without a batch dimension."""
        return self.apply(params, x[None])[0]

    def loss_of_one(self, params: Mapping[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        """The loss of a single example."""
        return self.loss(params, x[None], target[None])

    def canonical(self, tensors: Mapping[str, Tensor]) -> Arrays:
        """Canonical names; the layouts are PyTorch's."""
        return {f"{self.prefix}{name}": np.array(tensor.detach().numpy()) for name, tensor in tensors.items()}


def network(setting: Setting, weights: Mapping[str, np.ndarray], precision: str) -> Network:
    """The workload of a setting."""
    model = create_model(setting.spec, weights, precision=precision, device="cpu").native
    if setting.workload == "vit":
        return Network(model, lambda logits, labels: train.cross_entropy(logits, labels, 0.0), "")
    return Network(model.get_submodule(BLOCK), lambda y, target: (y - target).square().mean(), f"{BLOCK}.")


def running(precision: str) -> contextlib.AbstractContextManager[None]:
    """Full products."""
    return full_precision()


def release() -> None:
    """Forget what was compiled."""
    torch.compiler.reset()


def inputs(setting: Setting, precision: str) -> tuple[Tensor, Tensor]:
    """The setting's inputs, images as (N, C, H, W)."""
    x, target = (torch.from_numpy(each if np.issubdtype(each.dtype, np.integer) else each.astype(precision)) for each in setting.inputs())
    return (x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x), target


def lane(setting: Setting, weights: Mapping[str, np.ndarray], precision: str, mode: str, way: str) -> Lane:
    """One lane, which compiles at its first run if at all."""
    net = network(setting, weights, precision)
    makers: dict[str, Function] = {
        "passes": passes,
        "vmap": inference,
        "per_sample": per_sample,
        "layers": layer,
        "gradients": own_gradient,
    }
    made: Lane = makers[setting.part](net, setting, MODES[mode], way, *inputs(setting, precision))
    return made


def passes(net: Network, setting: Setting, compiled: Function, way: str, x: Tensor, target: Tensor) -> Lane:
    """Forward; loss and gradients; a whole step."""
    if setting.task == "forward":
        return forward(compiled(net.module), x)
    names, parameters = zip(*net.module.named_parameters(), strict=True)
    loss_of = compiled(lambda x, target: net.criterion(net.module(x), target))
    if setting.task == "gradient":

        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = loss_of(x, target)
            return loss, torch.autograd.grad(loss, parameters)

        return Lane(run, lambda found: {"loss": found[0].detach().numpy(), **net.canonical(dict(zip(names, found[1], strict=True)))})
    rule = RECIPE.optimizer
    sgd = torch.optim.SGD(parameters, lr=RATE, momentum=rule.momentum, weight_decay=rule.weight_decay)

    def step() -> Tensor:
        sgd.zero_grad()
        loss = loss_of(x, target)
        loss.backward()
        sgd.step()
        return loss

    def read(loss: Tensor) -> Arrays:
        weights = {f"{name} after": array for name, array in net.canonical(dict(net.module.named_parameters())).items()}
        slots = {name: sgd.state[parameter]["momentum_buffer"] for name, parameter in net.module.named_parameters()}
        return {"loss": loss.detach().numpy(), **weights, **{f"{name} momentum": array for name, array in net.canonical(slots).items()}}

    return Lane(step, read)


def forward(function: Function, x: Tensor) -> Lane:
    """A function of a batch, without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return function(x)

    return Lane(run, lambda y: {"output": y.numpy()})


def inference(net: Network, setting: Setting, compiled: Function, way: str, x: Tensor, target: Tensor) -> Lane:
    """Outputs of every example: one after the other, mapped, or as the batch that the model was written for."""
    params, examples = net.params, list(x)
    mapped = vmap(net.one, (None, 0))
    function = compiled({"loop": net.one, "vmap": mapped, VMAP_MATH: plain_attention(mapped), "batched": net.apply}[way])
    if way == "loop":
        return forward(lambda _: torch.stack([function(params, each) for each in examples]), x)
    return forward(lambda x: function(params, x), x)


def plain_attention(function: Function) -> Function:
    """The same function with attention as products and a softmax, which `vmap` has rules for."""

    def call(*given: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*given)

    return call


def per_sample(net: Network, setting: Setting, compiled: Function, way: str, x: Tensor, target: Tensor) -> Lane:
    """The gradient of every example: one after the other, or mapped; or the one of their mean."""
    params, one = net.params, grad(net.loss_of_one)
    mapped = vmap(one, (None, 0, 0))
    function = compiled({"loop": one, "vmap": mapped, VMAP_MATH: plain_attention(mapped), "batched": grad(net.loss)}[way])
    examples = list(zip(x, target, strict=True))

    def run() -> dict[str, Tensor]:
        if way == "loop":
            found = [function(params, *each) for each in examples]
            return {name: torch.stack([one[name] for one in found]) for name in params}
        return function(params, x, target)

    def read(found: dict[str, Tensor]) -> Arrays:
        return {("mean " if way == "batched" else "") + name: array for name, array in net.canonical(found).items()}

    return Lane(run, read)


def layer(net: Network, setting: Setting, compiled: Function, way: str, x: Tensor, target: Tensor) -> Lane:
    """One layer of the block, forward."""
    return forward(compiled(net.module.get_submodule(LAYERS[setting.task])), x)


def own_gradient(net: Network, setting: Setting, compiled: Function, way: str, x: Tensor, target: Tensor) -> Lane:
    """The gradient of one layer by its input: automatic, or the one of `in_pytorch.gradients`."""
    layer, x = differentiated(net, setting, way), x.requires_grad_()
    objective = compiled(lambda x: (layer(x) * target).sum())
    return Lane(lambda: torch.autograd.grad(objective(x), x)[0], lambda dx: {"gradient": dx.numpy()})


def differentiated(net: Network, setting: Setting, way: str) -> Function:
    """GELU or attention, with a gradient of either kind."""
    if way == "autodiff":
        return net.module.get_submodule(LAYERS[setting.task])
    heads = setting.spec.heads
    return gradients.gelu if setting.task == "gelu" else lambda x: gradients.attention(x, heads)


def report(setting: Setting, weights: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Operations dispatched, kernels that inductor generated and library calls beside them, bytes kept for the backward pass."""
    x, target = inputs(setting, "float32")
    net = network(setting, weights, "float32")
    if setting.part == "gradients":
        found = {}
        for way in ("autodiff", "own"):
            layer, given = differentiated(net, setting, way), x.detach().requires_grad_()
            found[f"eager {way}"] = kept(lambda layer=layer, given=given: (layer(given) * target).sum(), [given, target])
        return found
    run = passes(net, setting, MODES["eager"], "", x, target).run
    loss = kept(lambda: net.criterion(net.module(x), target), net.module.parameters()) if setting.task == "gradient" else {}
    release()
    other = Network(copy.deepcopy(net.module), net.criterion, net.prefix)
    made = generated(passes(other, setting, MODES["compiled"], "", x, target).run)
    return {"eager": {"operations": operations(run), **loss}, "compiled": made}


def operations(run: Function) -> int:
    """Operations that reach a kernel; views, which move no data, are not counted."""
    with _Counted() as counted:
        run()
    return counted.number


class _Counted(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not function.is_view and function is not torch.ops.aten.detach.default
        return function(*args, **(kwargs or {}))


def generated(run: Function) -> dict[str, int]:
    """What inductor made at the first run: kernels of its own in C++, and calls of libraries' kernels."""
    from torch._inductor import metrics
    from torch._inductor.utils import run_and_get_code

    metrics.reset()
    _, sources = run_and_get_code(run)
    calls = [re.findall(r"^\s+(?:\w+ = )?(extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)\(", source, re.M) for source in sources]
    library = sum(map(len, calls))
    return {"kernels": metrics.generated_kernel_count + library, "fusions": metrics.generated_kernel_count, "library_calls": library}


def kept(run: Callable[[], Tensor], given: Iterator[Tensor] | list[Tensor]) -> dict[str, int]:
    """Bytes that a forward pass keeps for the backward pass; the parameters themselves are not counted."""
    ours = {tensor.untyped_storage().data_ptr() for tensor in given}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no later tensor takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    del loss
    return {"kept_bytes": sum(tensor.untyped_storage().nbytes() for pointer, tensor in found.items() if pointer not in ours)}
