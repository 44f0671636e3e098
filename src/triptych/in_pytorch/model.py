"""A native `nn.Module` behind the numpy boundary: batches as numpy in, numpy out."""

from __future__ import annotations

import contextlib
import copy
import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from triptych.core import batch as batches
from triptych.core.batch import Inputs, Named
from triptych.core.contract import Forward, check_device, check_precision
from triptych.core.errors import UsageError
from triptych.core.spec import Spec
from triptych.in_pytorch import weights as canonical
from triptych.in_pytorch.mlp import MLP
from triptych.in_pytorch.resnet import ResNet
from triptych.in_pytorch.text_image import TextImage
from triptych.in_pytorch.vit import BareTransformerBlock, VisionTransformer
from triptych.in_pytorch.weights import Arrays

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResNet, "mlp": MLP, "vit": VisionTransformer, "transformer_block": BareTransformerBlock, "text_image": TextImage,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def create_model(spec: Spec, weights: Mapping[str, np.ndarray], *, precision: str = "float32", device: str = "auto") -> Model:
    """The native model with these canonical weights, in eval mode.

    Raises UsageError for a precision or device that does not exist here, InputRefused for weights that do not fit.
    """
    check_precision(precision)
    model = Model(spec, empty_module(spec, DTYPES[precision], find_device(device, precision)), precision)
    model.load_weights(weights)
    return model


def empty_module(spec: Spec, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module without values: built on the meta device, so that nobody's random numbers are drawn for weights to be overwritten."""
    with torch.device("meta"):
        native = FAMILIES[spec.family](spec)
    return native.to(dtype).to_empty(device=device).eval()


def find_device(name: str, precision: str) -> torch.device:
    """The torch device called `name`; `auto` is cuda, else mps, else cpu. Raises UsageError for one that is not here."""
    check_device(name)
    available = available_devices(precision)
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise UsageError(f"PyTorch has no device {name!r} for {precision} here; available: {', '.join(reversed(available))} (or auto)")
    return torch.device(name)


def available_devices(precision: str) -> list[str]:
    """Devices of this machine that compute in `precision`, fastest first."""
    cuda = ["cuda"] if torch.cuda.is_available() else []
    # Metal has no float64.
    mps = ["mps"] if torch.backends.mps.is_available() and precision == "float32" else []
    return [*cuda, *mps, "cpu"]


class Model:
    """Fulfils `core.contract.Model`. `native` is yours to use: an `nn.Module` over (N, C, H, W) tensors."""

    framework = "pytorch"

    def __init__(self, spec: Spec, native: nn.Module, precision: str) -> None:
        self.spec, self.native, self.precision = spec, native, precision

    @property
    def device(self) -> str:
        """Where the parameters are: `cpu`, `cuda` or `mps`."""
        return next(self.native.parameters()).device.type

    def predict(self, inputs: Inputs, batch_size: int | None = None) -> np.ndarray:
        """A batch, images preprocessed -> logits (N, *spec.output_shape) in the model's precision, `batch_size` at a time.

        Raises UsageError for inputs of another name, kind or shape, such as integers (images not yet preprocessed).
        """
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size={batch_size} must be a positive integer, or None for all samples at once")
        named = self.check_inputs(inputs)
        count = max(1, batches.samples(named))
        size = batch_size or count
        with full_precision(), mode(self.native, training=False), torch.inference_mode():
            parts = (batches.part(named, slice(start, start + size)) for start in range(0, count, size))
            return np.concatenate([canonical.to_array(self.native(*self.native_inputs(part))) for part in parts])

    def predict_channels_last(self, inputs: Inputs) -> np.ndarray:
        """`predict` with NHWC kernels in place of NCHW ones: what a change of layout alone does to the last bits (numerics 34)."""
        other = copy.deepcopy(self.native).to(memory_format=torch.channels_last)
        x = self.native_inputs(self.check_inputs(inputs), torch.channels_last)
        with full_precision(), mode(other, training=False), torch.inference_mode():
            return canonical.to_array(other(*x))

    def forward(self, inputs: Inputs, *, training: bool = False, layer_inputs: Mapping[str, np.ndarray] | None = None) -> Forward:
        """One pass with every intermediate, NHWC, in execution order. Dropout is off; the model stays as it was.

        In training mode BatchNorm normalizes with batch statistics, and `state` holds the running state after the pass.
        `layer_inputs` shows the named layers these inputs (NHWC, (N, tokens, width) or (N, C)) in place of their own.
        """
        given = self.native_inputs(self.check_inputs(inputs))
        seen: dict[str, Tensor] = {}
        # In train mode BatchNorm overwrites its buffers in place: let it overwrite copies.
        buffers = {name: buffer.clone() for name, buffer in self.native.named_buffers()}
        with full_precision(), mode(self.native, training=training), torch.no_grad(), contextlib.ExitStack() as hooks:
            for name, array in (layer_inputs or {}).items():
                hooks.enter_context(self._replaced_input(name, self.to_native(array)))
            for name in self.spec.intermediates():
                hooks.enter_context(self.layer(name).register_forward_hook(partial(_record, seen, name)))
            functional_call(self.native, buffers, given)
        intermediates = {name: from_native(seen[name]) for name in self.spec.intermediates()}
        return Forward(intermediates, canonical.to_arrays(buffers) if training else {})

    def weights(self) -> Arrays:
        """The canonical state, bit for bit: a copy of `native.state_dict()` as numpy."""
        return canonical.to_arrays(self.native.state_dict())

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Take a canonical state, in place; bit for bit when it has the model's precision. Raises InputRefused if it does not fit."""
        canonical.load(self.native, weights)

    @contextlib.contextmanager
    def intercept(self, layer: str, wrapper: Callable[..., Any]) -> Iterator[None]:
        """While open, the module `layer` computes `wrapper(module, call, x)` in place of `call(x)`.

        It holds for every way to run the module: `predict`, `forward`, a trainer, and `native` itself.
        """
        module = self.layer(layer)
        # An attribute of the instance shadows the method of its class; interceptions nest.
        attributes, call = vars(module), module.forward
        before = attributes.get("forward")
        attributes["forward"] = partial(_intercepted, wrapper, module, call)  # of a partial, a copy of the module has a copy, too
        try:
            yield
        finally:
            del attributes["forward"]
            if before is not None:
                attributes["forward"] = before

    def layer(self, name: str) -> nn.Module:
        """The module called `name`; UsageError, with the nearest name, when there is none."""
        modules = dict(self.native.named_modules())
        if name not in modules or not name:
            close = difflib.get_close_matches(name, modules, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"{self.spec.name} has no layer {name!r}{hint} `spec.layers()` lists them")
        return modules[name]

    def check_inputs(self, inputs: Inputs) -> Named:
        """The batch by name; UsageError unless these are inputs of the spec's kinds and shapes."""
        return batches.checked(self.spec, inputs)

    def native_inputs(self, named: Named, layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, ...]:
        """What the module is called with: images (N, C, H, W) in this memory format and features, in its precision; ids as int64."""
        found = []
        for each in self.spec.inputs():
            array = named[each.name]
            if each.kind == "tokens":
                found.append(torch.from_numpy(array.astype(np.int64)).to(self.device))
            elif each.kind == "image":
                found.append(self.to_native(array).contiguous(memory_format=layout))
            else:
                found.append(self.to_native(array))
        return tuple(found)

    def to_native(self, array: np.ndarray) -> Tensor:
        """(N, H, W, C) numpy -> (N, C, H, W) tensor of the model's precision, on its device; other shapes stay.

        Images are transposed there: in channels-last memory for nothing. What needs no conversion shares the array's memory.
        """
        like = next(self.native.parameters())
        tensor = torch.from_numpy(np.require(array, self.precision, ["C", "W"])).to(like.device, non_blocking=True)
        return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor

    def _replaced_input(self, name: str, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        return self.layer(name).register_forward_pre_hook(lambda module, inputs: (x,))


def _intercepted(wrapper: Callable[..., Any], module: nn.Module, call: Callable[..., Any], x: Tensor, **options: Any) -> Any:
    return wrapper(module, partial(call, **options), x)


def _record(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    seen[name] = output


def from_native(tensor: Tensor) -> np.ndarray:
    """(N, C, H, W) or (N, C) tensor -> (N, H, W, C) or (N, C) numpy."""
    return canonical.to_array(tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor)


@contextlib.contextmanager
def mode(native: nn.Module, *, training: bool, dropout: bool = False, frozen: Collection[str] = ()) -> Iterator[None]:
    """Train or eval mode for a while, dropout apart, modules named in `frozen` in eval mode; every module gets its own flag back."""
    before = {module: module.training for module in native.modules()}
    for name, module in native.named_modules():
        module.training = (dropout if isinstance(module, nn.Dropout) else training) and name not in frozen
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 means float32 for a while: no TF32, no bfloat16 inside products, whatever the caller has set (numerics 28)."""
    backends: Any = torch.backends  # its stubs know only some of these switches
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
