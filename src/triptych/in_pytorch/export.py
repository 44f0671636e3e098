"""What PyTorch writes of a model: TorchScript, `torch.export`, AOTInductor, ONNX. Images are (N, C, H, W)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from triptych.core import batch as batches
from triptych.core.errors import UsageError
from triptych.in_pytorch.layers import BatchNorm2d
from triptych.in_pytorch.model import Model

OPSET, CHAPTER_OPSET = 18, 11
Example = tuple[torch.Tensor, ...]
"""A batch as the module is called with it."""


def export(model: Model, target: str, path: Path) -> None:
    """Write the model in eval mode, of any batch size: inputs by their names, images (N, C, H, W) -> `logits` float32.

    Raises UsageError for a format that PyTorch does not write.
    """
    if target not in WRITERS:
        raise UsageError(f"PyTorch writes no {target!r}; choose from {', '.join(WRITERS)}")
    # 2, because torch.export takes a size of 1 for a constant.
    example = model.native_inputs(model.check_inputs(batches.random(model.spec, 2, np.random.default_rng(0))))
    with torch.no_grad(), warnings.catch_warnings():
        # What TorchScript and its ONNX exporter say at every call is told in docs/export.md: they are deprecated.
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        WRITERS[target](model, example, path)


def trace(model: Model, example: Example, path: Path) -> None:
    """TorchScript, from the operators that one pass calls."""
    torch.jit.trace(model.native, example).save(str(path))


def script(model: Model, example: Example, path: Path) -> None:
    """TorchScript, compiled from the source of the FX graph: the compiler takes less Python than our modules are written in."""
    graph = _Tracer().trace(model.native)
    for node in graph.nodes:
        node.type = None  # annotations are strings here, which the compiler takes for names that it does not know
    module = torch.fx.GraphModule(model.native, graph)
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


def program(model: Model, example: Example) -> torch.export.ExportedProgram:
    """The graph of aten operators, with a batch of any size."""
    return torch.export.export(model.native, example, dynamic_shapes=sizes(example))


def torch_export(model: Model, example: Example, path: Path) -> None:
    """The graph and its weights in one archive."""
    torch.export.save(program(model, example), path)


def aotinductor(model: Model, example: Example, path: Path) -> None:
    """What `torch.compile` makes of it, compiled ahead of time for this processor: a shared library and its weights in one archive."""
    from torch._inductor import aoti_compile_and_package  # the documented name; importing it loads the compiler

    aoti_compile_and_package(program(model, example), package_path=str(path))


def onnx(model: Model, example: Example, path: Path) -> None:
    """ONNX of opset 18, by the exporter that is built on torch.export."""
    options: dict[str, Any] = {"opset_version": OPSET, "dynamic_shapes": sizes(example), **names(model)}
    made = torch.onnx.export(model.native, example, dynamo=True, verbose=False, **options)
    assert made is not None, "with dynamo=True and no file it is returned"
    made.save(str(path), external_data=False)


def onnx_opset11(model: Model, example: Example, path: Path) -> None:
    """ONNX of opset 11, by the exporter that is built on TorchScript: the newer one has no opset below 18."""
    given = names(model)
    axes = {name: {0: "batch"} for name in (*given["input_names"], *given["output_names"])}
    torch.onnx.export(model.native, example, str(path), dynamo=False, opset_version=CHAPTER_OPSET, dynamic_axes=axes, **given)


def names(model: Model) -> dict[str, Any]:
    """How the inputs and the output of an ONNX file are called."""
    return {"input_names": [each.name for each in model.spec.inputs()], "output_names": ["logits"]}


def sizes(example: Example) -> tuple[dict[int, Any], ...]:
    """The first axis of every input is the batch, of any size."""
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in example)


WRITERS: dict[str, Callable[[Model, Example, Path], None]] = {
    "torchscript": trace,
    "torchscript_script": script,
    "torch_export": torch_export,
    "aotinductor": aotinductor,
    "onnx": onnx,
    "onnx_opset11": onnx_opset11,
}
