"""What PyTorch writes of a model: TorchScript, `torch.export`, AOTInductor, ONNX. Images are (N, C, H, W)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triptych.core.errors import UsageError
from triptych.in_pytorch.layers import BatchNorm2d
from triptych.in_pytorch.model import Model

OPSET, CHAPTER_OPSET = 18, 11
NAMES: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}


def export(model: Model, target: str, path: Path) -> None:
    """Write the model in eval mode, of any batch size: `images` (N, C, H, W) float32 -> `logits` (N, classes).

    Raises UsageError for a format that PyTorch does not write.
    """
    if target not in WRITERS:
        raise UsageError(f"PyTorch writes no {target!r}; choose from {', '.join(WRITERS)}")
    height, width, channels = model.spec.input_shape
    example = torch.zeros(2, channels, height, width)  # 2, because torch.export takes a size of 1 for a constant
    with torch.no_grad(), warnings.catch_warnings():
        # What TorchScript and its ONNX exporter say at every call is told in docs/export.md: they are deprecated.
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        WRITERS[target](model.native.cpu(), example, path)


def trace(native: nn.Module, example: torch.Tensor, path: Path) -> None:
    """TorchScript, from the operators that one pass calls."""
    torch.jit.trace(native, example).save(str(path))


def script(native: nn.Module, example: torch.Tensor, path: Path) -> None:
    """TorchScript, compiled from the source of the FX graph: the compiler takes less Python than our modules are written in."""
    graph = _Tracer().trace(native)
    for node in graph.nodes:
        node.type = None  # annotations are strings here, which the compiler takes for names that it does not know
    module = torch.fx.GraphModule(native, graph)
    for name, child in list(module.named_modules()):
        if isinstance(child, BatchNorm2d):
            module.set_submodule(name, _plain(child))
    torch.jit.script(module).save(str(path))


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _plain(layer: BatchNorm2d) -> nn.BatchNorm2d:
    """PyTorch's own BatchNorm, which computes the same in eval mode and can be compiled."""
    plain = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum)
    plain.load_state_dict(layer.state_dict())
    return plain.eval()


def program(native: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    """The graph of aten operators, with a batch of any size."""
    return torch.export.export(native, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def torch_export(native: nn.Module, example: torch.Tensor, path: Path) -> None:
    """The graph and its weights in one archive."""
    torch.export.save(program(native, example), path)


def aotinductor(native: nn.Module, example: torch.Tensor, path: Path) -> None:
    """What `torch.compile` makes of it, compiled ahead of time for this processor: a shared library and its weights in one archive."""
    from torch._inductor import aoti_compile_and_package  # the documented name; importing it loads the compiler

    aoti_compile_and_package(program(native, example), package_path=str(path))


def onnx(native: nn.Module, example: torch.Tensor, path: Path) -> None:
    """ONNX of opset 18, by the exporter that is built on torch.export."""
    batch = ({0: torch.export.Dim("batch")},)
    made = torch.onnx.export(native, (example,), dynamo=True, verbose=False, opset_version=OPSET, dynamic_shapes=batch, **NAMES)
    assert made is not None, "with dynamo=True and no file it is returned"
    made.save(str(path), external_data=False)


def onnx_opset11(native: nn.Module, example: torch.Tensor, path: Path) -> None:
    """ONNX of opset 11, by the exporter that is built on TorchScript: the newer one has no opset below 18."""
    axes = {name: {0: "batch"} for name in ("images", "logits")}
    torch.onnx.export(native, (example,), str(path), dynamo=False, opset_version=CHAPTER_OPSET, dynamic_axes=axes, **NAMES)


WRITERS: dict[str, Callable[[nn.Module, torch.Tensor, Path], None]] = {
    "torchscript": trace,
    "torchscript_script": script,
    "torch_export": torch_export,
    "aotinductor": aotinductor,
    "onnx": onnx,
    "onnx_opset11": onnx_opset11,
}
