"""How a model that is only asked runs fastest on a CPU, in full float32: the tuned lanes of inference.

Direct convolutions take as long in oneDNN as in ONNX Runtime and OpenVINO. What is faster has fewer products: Winograd's algorithm for 3x3
convolutions. PyTorch's own operator for it, NNPACK's, takes twice as long as oneDNN's direct one, and one made of other operators would
write to memory between its steps, which takes longer than the products saved; so `winograd.cpp` is compiled where it is used.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

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

    3x3 convolutions are computed by Winograd's algorithm where that gains at this shape. Never two programs are made at once: the switches
    that decide how are the process's.
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


ENOUGH = 48
"""Tiles of a batch below which the transformed kernels, 16/9 of the plain ones, take longer to read than they save: at 1 image 7x7."""
WORTHWHILE = 1 << 18
"""Tiles times channels of both sides below which the 20 products saved of each take no longer than a call of the operator, some 20 µs."""

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
    """A convolution by Winograd's algorithm, with the ReLU after it where `relu`: (N, C, H, W) -> (N, K, H, W), channels last."""

    def __init__(self, convolution: nn.Conv2d, library: ctypes.CDLL, *, relu: bool) -> None:
        super().__init__()
        kernels = transformed(convolution.weight.detach().numpy())  # (16, C, K)
        panels = kernels.reshape(*kernels.shape[:2], -1, library.panel()).transpose(2, 0, 1, 3)
        # Of one axis: four would be reordered by `.to(memory_format=torch.channels_last)`.
        self.kernels = nn.Parameter(torch.from_numpy(panels.ravel()), requires_grad=False)
        self.bias, self.relu = convolution.bias, relu

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.triptych.winograd(x, self.kernels, self.bias, self.relu)
        return y


def with_winograd(native: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """The module with Winograd's algorithm in place of the convolutions that gain by it at the example's size; shares the others.

    A ReLU that alone follows such a convolution is computed with it.
    """
    if not any(map(takes_winograd, native.modules())):
        return native
    library = compiled()
    traced = fx.symbolic_trace(native)
    ShapeProp(traced).propagate(*example)
    modules = {node: traced.get_submodule(str(node.target)) for node in traced.graph.nodes if node.op == "call_module"}

    def skip(node: fx.Node, to: fx.Node) -> None:
        node.replace_all_uses_with(to)
        traced.graph.erase_node(node)

    for node in [node for node, module in modules.items() if isinstance(module, nn.Identity)]:
        skip(node, node.all_input_nodes[0])  # in place of a folded BatchNorm, before a ReLU
    for node, module in modules.items():
        if isinstance(module, nn.Conv2d) and takes_winograd(module) and gains(module, node.meta["tensor_meta"].shape):
            follower, *others = node.users
            relu = not others and isinstance(modules.get(follower), nn.ReLU)
            traced.set_submodule(str(node.target), Winograd(module, library, relu=relu))
            if relu:
                skip(follower, node)
    traced.recompile()
    return traced


def gains(convolution: nn.Conv2d, shape: torch.Size) -> bool:
    """Whether Winograd's algorithm is faster for an output (N, K, H, W)."""
    count, _, height, width = shape
    tiles = count * -(-height // 2) * -(-width // 2)
    return tiles >= ENOUGH and tiles * convolution.in_channels * convolution.out_channels >= WORTHWHILE


@functools.cache
def has_compiler() -> bool:
    """Whether the compiler that inductor would take is here. Microsoft's is no help: it has no vectors."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # importing it loads inductor
    from torch._inductor.exc import InvalidCxxCompiler

    with contextlib.suppress(InvalidCxxCompiler):
        return bool(get_cpp_compiler()) and sys.platform != "win32"
    return False


@functools.cache
def compiled(*flags: str) -> ctypes.CDLL:
    """`winograd.cpp` as a library: compiled by inductor's compiler, kept in inductor's cache."""
    from torch._inductor.codecache import CppCodeCache

    source = resources.files(__package__).joinpath("winograd.cpp").read_text("utf-8")
    # Inductor forbids fused multiplications and additions: this is one long row of them. And it would first try one after the other which
    # of the processor's vectors its own programs may use, for 16 s: `-march=native` is enough here.
    library: ctypes.CDLL = CppCodeCache.load(source, needs_vec_isa=False, extra_flags=["-ffp-contract=fast", *flags])
    library.winograd.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 5 + [ctypes.c_bool, ctypes.c_long]
    return library


def convolve(x: Tensor, kernels: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """The operator `triptych::winograd`: (N, C, H, W) and the kernels of a `Winograd` -> (N, K, H, W), channels last."""
    x = x.contiguous(memory_format=torch.channels_last)
    y = empty(x, kernels, bias, relu)
    count, channels, height, width = x.shape
    pointers = (each.data_ptr() for each in (x, kernels, bias, y))
    compiled().winograd(*pointers, count, height, width, channels, len(bias), relu, torch.get_num_threads())
    return y


def empty(x: Tensor, kernels: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """A tensor like that of `convolve`, without values."""
    shape = (len(x), len(bias), *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# Not by `torch.library.custom_op`, whose guards take 0.2 ms of every call.
OPERATORS = torch.library.Library("triptych", "FRAGMENT")
OPERATORS.define("winograd(Tensor x, Tensor kernels, Tensor bias, bool relu) -> Tensor")
OPERATORS.impl("winograd", convolve, "CPU")
torch.library.register_fake("triptych::winograd", empty, lib=OPERATORS)
