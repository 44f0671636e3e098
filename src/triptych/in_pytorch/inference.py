"""How a model that is only asked runs fastest on a CPU, in full float32: the tuned lanes of inference."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from triptych.core.batch import Inputs, Named
from triptych.core.contract import Execution
from triptych.core.threads import shared_out
from triptych.in_pytorch.model import Model, full_precision


def program(model: Model, execution: Execution) -> tuple[Callable[[Inputs], np.ndarray], tuple[str, ...]]:
    """Inputs -> logits, (N, classes), of a model whose BatchNorm is folded where it is `tuned`, and the levers it pulls.

    Tuned: channels-last, every thread with its own samples, through oneDNN Graph or, where it compiles, inductor with constant weights.
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
    return checked, (*way, "channels-last", "folded BatchNorm", "every thread its own images")


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

    Never two are made at once: the switches that decide how are the process's.
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
                self.made[key] = self.make(self.native, inputs)
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
