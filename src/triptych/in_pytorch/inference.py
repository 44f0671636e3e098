"""How a model that is only asked runs fastest on a CPU, in full float32: the tuned lanes of inference.

Direct convolutions take as long in oneDNN as in ONNX Runtime and OpenVINO. What is faster has fewer products: Winograd's algorithm for 3x3
convolutions. PyTorch's own operator for it, NNPACK's, takes twice as long as oneDNN's direct one, and one made of other operators would
write to memory between its steps, which takes longer than the products saved; so `winograd.cpp` is compiled where it is used.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from triptych.core.batch import Inputs, Named
from triptych.core.contract import Execution
from triptych.core.threads import shared_out
from triptych.core.winograd import transformed
from triptych.in_pytorch.model import Model, full_precision


def program(model: Model, execution: Execution) -> tuple[Callable[[Inputs], np.ndarray], tuple[str, ...]]:
    """Inputs -> logits, (N, classes), of a model whose BatchNorm is folded where it is `tuned`, and the levers it pulls.

    Tuned: channels-last, every thread with its own samples, through oneDNN Graph or, where it compiles, inductor with constant weights;
    3x3 convolutions by Winograd's algorithm where there is a C++ compiler.
    """
    native: Any = model.native
    if execution.tuned:
        native = native.to(memory_format=torch.channels_last)
    if execution.compile:
        native = Programs(native, by_inductor) if execution.tuned else torch.compile(native)
    elif execution.tuned:
        native = Programs(native, by_onednn_graph)
    layout = torch.channels_last if execution.tuned else torch.contiguous_format

    def run(named: Named) -> np.ndarray:
        with torch.no_grad():  # of this thread
            return np.asarray(native(*model.native_inputs(named, layout)).numpy())

    def share(named: Named) -> np.ndarray:
        with one_thread():
            return run(named)

    whole = shared_out(share, run, torch.get_num_threads()) if execution.tuned else run

    def checked(inputs: Inputs) -> np.ndarray:
        with full_precision():  # of the process: two threads that set it and put it back would leave each other's setting
            return whole(model.check_inputs(inputs))

    if not execution.tuned:
        return checked, ("torch.compile",)
    way = ("torch.compile", "freezing") if execution.compile else ("oneDNN Graph through TorchScript",)
    fewer = ("3x3 convolutions by Winograd's algorithm",) if any(map(takes_winograd, model.native.modules())) else ()
    return checked, (*way, "channels-last", "folded BatchNorm", *fewer, "every thread its own images")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """While open, PyTorch's operations take this thread alone. Others keep their number: it is OpenMP's, one for each thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Programs:
    """A module in eval mode as one program for each shape and number of threads; `make` makes it of the module and an example.

    3x3 convolutions are computed by Winograd's algorithm. Never two programs are made at once: the switches that decide how are the
    process's.
    """

    def __init__(self, native: nn.Module, make: Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., Tensor]]) -> None:
        self.native, self.make = native, make
        self.made: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self.lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the module returns; the first call of a shape, and of a number of threads, compiles."""
        key = (torch.get_num_threads(), *(x.shape for x in inputs))
        with self.lock:
            if key not in self.made:
                self.made[key] = self.make(with_winograd(self.native, inputs), inputs)
        return self.made[key](*inputs)


def by_onednn_graph(native: nn.Module, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """A program of oneDNN Graph: chains of convolution, addition and ReLU as one kernel each, in layouts of its choice.

    TorchScript is deprecated, and still PyTorch's only way to oneDNN Graph. Traced, frozen, and called until it is compiled.
    """
    with onednn_graph(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of TorchScript's deprecation
        made = torch.jit.freeze(torch.jit.trace(native, example, check_trace=False))
        for _ in range(2):  # TorchScript looks at the shapes of a first call, and compiles for them in the second
            made(*example)
    return made


def by_inductor(native: nn.Module, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """Compiled with its weights as constants: convolutions have theirs packed once, and take ReLU and addition in.

    The switch is inductor's configuration, not an option of `torch.compile`: that one reaches inductor, but Dynamo, which decides whether
    parameters become constants, asks the configuration, and the program is then compiled as if nobody had asked (torch 2.14).
    Of a copy of the module, because inductor writes the number of threads into its loops.
    """
    from torch._inductor import config as inductor_config  # importing it loads the compiler

    made: Callable[..., Tensor] = torch.compile(copy.deepcopy(native), dynamic=False)
    with inductor_config.patch({"freezing": True, "cpp.threads": torch.get_num_threads()}):
        made(*example)
    return made


@contextlib.contextmanager
def onednn_graph() -> Iterator[None]:
    """While open, TorchScript programs are compiled for oneDNN Graph; those that were stay so."""
    before = torch.jit.onednn_fusion_enabled()
    torch.jit.enable_onednn_fusion(True)
    try:
        yield
    finally:
        torch.jit.enable_onednn_fusion(before)


PANEL = 32
"""Channels come in multiples of it. The panels of `winograd.cpp` are as many, or half of it where vectors are shorter."""


def takes_winograd(module: nn.Module) -> bool:
    """Whether it is a convolution that `winograd.cpp` computes, and there is a compiler for it."""
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.padding, module.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (module.groups, module.padding_mode) == (1, "zeros")
        and module.bias is not None
        and (module.weight.dtype, module.weight.device.type) == (torch.float32, "cpu")
        and module.in_channels % PANEL == module.out_channels % PANEL == 0
        and has_compiler()
    )


class Winograd(nn.Module):
    """A convolution by Winograd's algorithm, with the addition and the ReLU after it: (N, C, H, W) -> (N, K, H, W), channels last."""

    def __init__(self, convolution: nn.Conv2d, library: Library, *, relu: bool) -> None:
        super().__init__()
        kernels = transformed(convolution.weight.detach().numpy())  # (16, C, K)
        panels = kernels.reshape(*kernels.shape[:2], -1, library.panel).transpose(2, 0, 1, 3)
        # Of one axis: four would be reordered by `.to(memory_format=torch.channels_last)`.
        self.kernels = nn.Parameter(torch.from_numpy(panels.ravel()), requires_grad=False)
        self.bias, self.relu, self.operator = convolution.bias, relu, library.operators.winograd

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """With a shortcut, (N, K, H, W), added before the ReLU."""
        y: Tensor = self.operator(x, self.kernels, self.bias, shortcut, self.relu)
        return y


def with_winograd(native: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """The module with Winograd's algorithm in place of the convolutions it is for; shares the others.

    An addition and a ReLU that alone follow such a convolution are computed with it. Of `example` only shapes matter.
    """
    if not any(map(takes_winograd, native.modules())):
        return native
    traced = fx.symbolic_trace(native)
    ShapeProp(traced).propagate(*example)
    modules = {node: traced.get_submodule(str(node.target)) for node in traced.graph.nodes if node.op == "call_module"}
    for node in [node for node, module in modules.items() if isinstance(module, nn.Identity)]:
        node.replace_all_uses_with(node.all_input_nodes[0])  # in place of a folded BatchNorm, before a ReLU
        traced.graph.erase_node(node)
    relus = {node for node, module in modules.items() if isinstance(module, nn.ReLU)}
    for node, module in modules.items():
        if isinstance(module, nn.Conv2d) and takes_winograd(module):
            place(node, module, relus)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def place(node: fx.Node, convolution: nn.Conv2d, relus: Collection[fx.Node]) -> None:
    """Puts Winograd's algorithm in place of the convolution called at `node`, and of what alone follows it."""
    traced: Any = node.graph.owning_module
    last, inputs = node, node.args
    follower = alone_after(last)
    if follower.target is operator.add:
        others = tuple(each for each in follower.all_input_nodes if each is not node)
        if [shape(each) for each in others] == [shape(node)]:
            last, inputs = follower, (*inputs, *others)
    follower = alone_after(last)
    if follower in relus:
        last = follower
    traced.add_submodule(node.name, Winograd(convolution, library(), relu=last in relus))
    with node.graph.inserting_after(last):
        last.replace_all_uses_with(node.graph.call_module(node.name, inputs), propagate_meta=True)


def alone_after(node: fx.Node) -> fx.Node:
    """The one node that takes this one's value; itself if there are others."""
    return next(iter(node.users)) if len(node.users) == 1 else node


def shape(node: fx.Node) -> tuple[int, ...]:
    """Of the value at the example's size."""
    return tuple(node.meta["tensor_meta"].shape)


@functools.cache
def has_compiler() -> bool:
    """Whether the compiler that inductor would take is here. Microsoft's is no help: it has no vectors."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # importing it loads inductor
    from torch._inductor.exc import InvalidCxxCompiler

    with contextlib.suppress(InvalidCxxCompiler):
        return bool(get_cpp_compiler()) and sys.platform != "win32"
    return False


class Library(NamedTuple):
    """`winograd.cpp`, compiled: how many output channels a panel of its kernels has, and its namespace of `torch.ops`."""

    panel: int
    operators: Any
    registered: torch.library.Library
    """The operator is gone when it is."""


@functools.cache
def library(namespace: str = "triptych", *flags: str) -> Library:
    """`winograd.cpp` as an operator of `torch.ops`: compiled by inductor's compiler, kept in inductor's cache."""
    from torch._inductor.codecache import CppCodeCache

    registered = torch.library.Library(namespace, "FRAGMENT")
    registered.define("winograd(Tensor x, Tensor kernels, Tensor bias, Tensor? shortcut, bool relu) -> Tensor")
    torch.library.register_fake(f"{namespace}::winograd", empty, lib=registered)
    source = resources.files(__package__).joinpath("winograd.cpp").read_text("utf-8")
    # Inductor forbids fused multiplications and additions: this is one long row of them. And it would first try one after the other which
    # of the processor's vectors its own programs may use, for 16 s: `-march=native` is enough here.
    options = ["-ffp-contract=fast", f"-DOPERATORS={namespace}", *flags]
    made: Any = CppCodeCache.load(source, needs_vec_isa=False, extra_flags=options)
    return Library(made.panel(), getattr(torch.ops, namespace), registered)


def empty(x: Tensor, kernels: Tensor, bias: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """A tensor like that of the operator, without values: (N, C, H, W) -> (N, K, H, W), channels last."""
    shape = (len(x), len(bias), *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
