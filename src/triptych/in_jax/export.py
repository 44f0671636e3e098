"""What JAX writes of a model: StableHLO, by `jax.export`, and ONNX. Images are (N, H, W, C)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp

from triptych.core.catalog import fed_by_images
from triptych.core.errors import UsageError
from triptych.in_jax.layers import MaxPool
from triptych.in_jax.model import Model, numerics

OPSET = 18
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(model: Model, target: str, path: Path) -> None:
    """Write the model in eval mode, of any batch size: `images` (N, H, W, C) float32 -> `logits` (N, classes).

    Raises UsageError for a format that JAX does not write.
    """
    if target not in WRITERS:
        raise UsageError(f"JAX writes no {target!r}; choose from {', '.join(WRITERS)}")
    with numerics(model.precision):
        WRITERS[target](model, path)


def function(model: Model) -> Callable[[jax.Array], Any]:
    """Images -> logits, the weights as constants."""
    module, variables = model.native
    return lambda images: module.apply(variables, images)


def exported(model: Model) -> jax.export.Exported:
    """One StableHLO module for every platform, with a batch of any size."""
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *fed_by_images(model.spec).input_shape), jnp.float32)
    return jax.export.export(jax.jit(function(model)), platforms=PLATFORMS)(images)


def stablehlo(model: Model, path: Path) -> None:
    """The module with its signature, as `jax.export.deserialize` reads it: a flatbuffer, no pickle."""
    path.write_bytes(exported(model).serialize())


def call_module(model: Model, path: Path) -> None:
    """A folder with the bare module, in StableHLO's portable bytecode, and `call.json`, what another framework needs to call it."""
    made = exported(model)
    path.mkdir()
    (path / "module.mlir.bc").write_bytes(made.mlir_module_serialized)
    call = {
        "version": made.calling_convention_version,
        "platforms": [name.upper() for name in made.platforms],
        "input_shape": [None, *fed_by_images(model.spec).input_shape],
        "output_shape": [None, model.spec.num_classes],
    }
    (path / "call.json").write_text(json.dumps(call))


def onnx(model: Model, path: Path) -> None:
    """ONNX of opset 18, by jax2onnx."""
    import jax2onnx  # optional (triptych[export]), and it loads half of what is written in JAX

    def padded_first(images: jax.Array) -> Any:
        with nn.intercept_methods(_pads_first):
            return function(model)(images)

    jax2onnx.to_onnx(
        padded_first, [("batch", *fed_by_images(model.spec).input_shape)], model_name=model.spec.name, opset=OPSET, return_mode="file",
        output_path=str(path), input_names=["images"], output_names=["logits"],
    )  # fmt: skip


def _pads_first(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
    """Max pooling as the same pooling of what is padded with minus infinity: jax2onnx 0.17 knows no padding but VALID and SAME."""
    pool = context.module
    if not isinstance(pool, MaxPool):
        return call(*args, **kwargs)
    around, square, strides = (pool.padding, pool.padding), (pool.kernel, pool.kernel), (pool.stride, pool.stride)
    padded = jnp.pad(args[0], ((0, 0), around, around, (0, 0)), constant_values=-jnp.inf)
    return nn.max_pool(padded, window_shape=square, strides=strides, padding="VALID")


WRITERS: dict[str, Callable[[Model, Path], None]] = {"stablehlo": stablehlo, "call_module": call_module, "onnx": onnx}
