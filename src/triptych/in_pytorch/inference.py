"""How a model that is only asked runs fastest on a CPU, in full float32: the tuned lanes of inference."""

from __future__ import annotations

import contextlib
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

    Tuned: channels-last and oneDNN Graph, every thread with its own samples; or, where it compiles, constant weights (inductor's freezing).
    """
    native: Any = model.native
    if execution.tuned:
        native = native.to(memory_format=torch.channels_last)
    if execution.compile:
        native = torch.compile(native, options={"freezing": True} if execution.tuned else None)
    elif execution.tuned:
        native = OneDNNGraph(native)
    layout = torch.channels_last if execution.tuned else torch.contiguous_format

    def run(named: Named) -> np.ndarray:
        with torch.no_grad():  # of this thread
            return np.asarray(native(*model.native_inputs(named, layout)).numpy())

    def share(named: Named) -> np.ndarray:
        with one_thread():
            return run(named)

    whole = run if execution.compile else shared_out(share, run, torch.get_num_threads())

    def checked(inputs: Inputs) -> np.ndarray:
        with full_precision():  # of the process: two threads that set it and put it back would leave each other's setting
            return whole(model.check_inputs(inputs))

    if execution.compile:
        return checked, ("torch.compile", *("channels-last", "folded BatchNorm", "freezing") * execution.tuned)
    return checked, ("channels-last", "folded BatchNorm", "oneDNN Graph through TorchScript", "every thread its own images")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """While open, PyTorch's operations take this thread alone. Others keep their number: it is OpenMP's, one for each thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class OneDNNGraph:
    """A module in eval mode, run by oneDNN Graph: chains of convolution, addition and ReLU as one kernel each, in layouts of its choice.

    Inductor calls the same convolutions with channels-last activations, which costs them a sixth of their speed on AVX-512. TorchScript is
    deprecated, and still PyTorch's only way to oneDNN Graph. A program is made for each shape that comes, with weights of its own.
    """

    def __init__(self, native: nn.Module) -> None:
        self.native = native
        self.programs: dict[tuple[torch.Size, ...], Callable[..., Tensor]] = {}
        self.lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the module returns; the first call of a shape compiles."""
        shapes = tuple(x.shape for x in inputs)
        with self.lock:  # the switch is the process's
            if shapes not in self.programs:
                self.programs[shapes] = self._compiled(inputs)
        return self.programs[shapes](*inputs)

    def _compiled(self, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        with onednn_graph(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of TorchScript's deprecation
            made = torch.jit.freeze(torch.jit.trace(self.native, example, check_trace=False))
            for _ in range(2):  # TorchScript looks at the shapes of a first call, and compiles for them in the second
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
