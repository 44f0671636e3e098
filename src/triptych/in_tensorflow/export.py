"""What TensorFlow writes of a model: SavedModel, `.keras`, LiteRT, ONNX. Images are (N, H, W, C)."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from triptych.core.catalog import fed_by_images
from triptych.core.errors import UsageError
from triptych.core.spec import Preprocessing
from triptych.in_tensorflow.data import decode_image, normalize, resize_bilinear
from triptych.in_tensorflow.layers import PaddedMaxPooling2D
from triptych.in_tensorflow.model import Model

OPSET, CHAPTER_OPSET = 18, 11
TOP = 5


def export(model: Model, target: str, path: Path, calibration: np.ndarray | None = None) -> None:
    """Write the model in eval mode, of any batch size: `images` (N, H, W, C) float32 -> `logits` (N, classes).

    `calibration` is images (N, H, W, C), preprocessed, from which `tflite_int8` takes its ranges. Raises UsageError for a format that
    TensorFlow does not write, or that lacks them.
    """
    if target not in WRITERS:
        raise UsageError(f"TensorFlow writes no {target!r}; choose from {', '.join(WRITERS)}")
    if target in CALIBRATED and calibration is None:
        raise UsageError(f"{target!r} takes the ranges of its activations from images: give `calibration`")
    with model.running(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Keras asks its own variables for a numpy 1 way of copying
        WRITERS[target](model, path, *([calibration] if target in CALIBRATED else []))


# --- SavedModel -------------------------------------------------------------------------------------------------------------------


class Served(tf.Module):
    """A model and its serving signatures."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        # Keras's variables wrap those that a SavedModel stores.
        self.kept = [variable.value for variable in model.native.variables]
        self.logits, self.spec = functools.partial(model.native, training=False), fed_by_images(model.spec)

    def signatures(self) -> dict[str, Any]:
        """`serving_default` on preprocessed floats; `serve_images` on the bytes of JPEG and PNG files."""
        images = tf.TensorSpec((None, *self.spec.input_shape), tf.float32, name="images")
        encoded = tf.TensorSpec((None,), tf.string, name="encoded")
        floats, files = tf.function(self.serving_default, autograph=False), tf.function(self.serve_images, autograph=False)
        return {"serving_default": floats.get_concrete_function(images), "serve_images": files.get_concrete_function(encoded)}

    def serving_default(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """(N, H, W, C) -> `logits` (N, classes)."""
        return {"logits": self.logits(images)}

    def serve_images(self, encoded: tf.Tensor) -> dict[str, tf.Tensor]:
        """(N,) encoded images -> the likeliest `classes` and their `probabilities`, (N, k) each, falling."""
        prepare = functools.partial(prepared, preprocessing=self.spec.preprocessing)
        images = tf.map_fn(prepare, encoded, fn_output_signature=tf.TensorSpec(self.spec.input_shape, tf.float32))
        shares, classes = tf.math.top_k(tf.nn.softmax(self.logits(images)), min(TOP, self.spec.num_classes))
        return {"classes": classes, "probabilities": shares}


def prepared(encoded: tf.Tensor, preprocessing: Preprocessing) -> tf.Tensor:
    """The bytes of one JPEG or PNG -> (crop, crop, C) float32, as `data.preprocess` prepares an image, all of it in the graph."""
    pixels = tf.cast(decode_image(encoded, preprocessing.channels), tf.float32)
    height, width, top, left = boxes(preprocessing, tf.shape(pixels))
    same = tf.reduce_all(tf.shape(pixels)[:2] == tf.stack([height, width]))
    resized = tf.cond(same, lambda: pixels, lambda: resize_bilinear(pixels, height, width))
    crop = preprocessing.crop
    return normalize(tf.ensure_shape(resized[top : top + crop, left : left + crop], (crop, crop, preprocessing.channels)), preprocessing)


def boxes(preprocessing: Preprocessing, shape: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Height and width to resize to, top and left of the crop: `core.preprocess.geometry` of a size that is known when the graph runs."""
    height, width = tf.cast(shape[0], tf.float64), tf.cast(shape[1], tf.float64)
    short = tf.constant(preprocessing.resize_short_side or preprocessing.crop, tf.float64)
    upright = height > width
    resized = tf.stack([tf.where(upright, short * height / width, short), tf.where(upright, short, short * width / height)])
    resized = tf.cast(resized, tf.int32)
    # Rounded half to even, as Python rounds.
    corner = tf.cast(tf.round(tf.cast(resized - preprocessing.crop, tf.float64) / 2.0), tf.int32)
    return resized[0], resized[1], corner[0], corner[1]


def saved_model(model: Model, path: Path) -> None:
    """A SavedModel with both signatures."""
    served = Served(model)
    tf.saved_model.save(served, str(path), signatures=served.signatures())


def saved_model_of_module(folder: Path, path: Path) -> None:
    """A SavedModel that calls the StableHLO module in `folder`, as `in_jax.export.call_module` wrote it; JAX is not needed to run it."""
    # No public name: imported here, so that a version without it costs this format and not the room.
    from tensorflow.compiler.tf2xla.python import xla

    call, module = json.loads((folder / "call.json").read_text()), (folder / "module.mlir.bc").read_bytes()

    def serving_default(images: tf.Tensor) -> dict[str, tf.Tensor]:
        (logits,) = xla.call_module(
            [images], version=call["version"], module=module, Tout=[tf.float32], Sout=[call["output_shape"]], platforms=call["platforms"]
        )
        return {"logits": tf.ensure_shape(logits, call["output_shape"])}

    images = tf.TensorSpec(call["input_shape"], tf.float32, name="images")
    function = tf.function(serving_default, autograph=False).get_concrete_function(images)
    tf.saved_model.save(tf.Module(), str(path), signatures={"serving_default": function})


# --- One file ---------------------------------------------------------------------------------------------------------------------


def keras(model: Model, path: Path) -> None:
    """Keras's own archive: the architecture as JSON and the weights as HDF5."""
    model.native.save(path)


def tflite(model: Model, path: Path) -> None:
    """LiteRT in float32."""
    path.write_bytes(_converted(model, optimize=False))


def tflite_float16(model: Model, path: Path) -> None:
    """LiteRT with weights in half precision; what is computed with them is float32."""
    path.write_bytes(_converted(model, optimize=True, weights=[tf.float16]))


def tflite_dynamic_int8(model: Model, path: Path) -> None:
    """LiteRT with weights in 8 bits, and activations that are rounded to 8 bits as they come: dynamic range, nothing is calibrated."""
    path.write_bytes(_converted(model, optimize=True))


def tflite_int8(model: Model, path: Path, images: np.ndarray) -> None:
    """LiteRT in 8 bits, weights and activations, whose ranges are those of `images`; only what goes in and comes out is float32."""
    with finite_padding(model):
        path.write_bytes(_converted(model, optimize=True, images=images))


@contextlib.contextmanager
def finite_padding(model: Model) -> Iterator[None]:
    """Max-pools padded with zeros for a while: behind a ReLU they win as little as minus infinity, which leaves 8 bits no range."""
    pools = [layer for layer in model.native.layers if isinstance(layer, PaddedMaxPooling2D)]
    for pool in pools:
        pool.fill = 0.0
    try:
        yield
    finally:
        for pool in pools:
            pool.fill = float("-inf")


def _converted(model: Model, optimize: bool, weights: Sequence[tf.DType] = (), images: np.ndarray | None = None) -> bytes:
    """From a SavedModel, which has the weights: a concrete function of a Keras 3 model does not tell the converter of them."""
    with tempfile.TemporaryDirectory() as folder:
        served = Served(model)
        tf.saved_model.save(served, folder, signatures=served.signatures()["serving_default"])
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.optimizations = [tf.lite.Optimize.DEFAULT] if optimize else []
        converter.target_spec.supported_types = list(weights)
        if images is not None:
            converter.representative_dataset = lambda: ({"images": image[None]} for image in images)
        made: bytes = converter.convert()
        return made


def onnx(model: Model, path: Path, opset: int = OPSET) -> None:
    """ONNX of opset 18, by tf2onnx."""
    import tf2onnx  # optional: triptych[export]

    signature = [tf.TensorSpec((None, *fed_by_images(model.spec).input_shape), tf.float32, name="images")]
    function = tf.function(Served(model).serving_default, input_signature=signature, autograph=False)
    tf2onnx.convert.from_function(function, input_signature=signature, opset=opset, output_path=str(path))


WRITERS: dict[str, Callable[..., None]] = {
    "saved_model": saved_model,
    "keras": keras,
    "tflite": tflite,
    "tflite_float16": tflite_float16,
    "tflite_int8": tflite_int8,
    "tflite_dynamic_int8": tflite_dynamic_int8,
    "onnx": onnx,
    "onnx_opset11": functools.partial(onnx, opset=CHAPTER_OPSET),
}
CALIBRATED = ("tflite_int8",)
"""What is written from images, too."""
