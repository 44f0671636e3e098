"""Which format each framework exports to, and what runs it: one table. Standard library only.

An impossible cell says why. `triptych export --list` prints the table, docs/export.md shows it, and a test holds them together.
"""

from __future__ import annotations

from dataclasses import dataclass

from triptych.core import contract
from triptych.core.contract import not_installed
from triptych.core.errors import UsageError
from triptych.export import converters, runtimes

SOURCES = tuple(contract.FRAMEWORKS)
EXTRA = "export"


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of artefact: the name of its file or folder, and the bound on its error, a key of `core.tolerance.EXPORTED`.

    `calibration` tells how the ranges of activations are taken from images, where they are; "" where no images are needed.
    """

    name: str
    title: str
    file: str
    bound: str = "float32"
    calibration: str = ""


_RANGES = "smallest and largest value over all images, per tensor"
_WEIGHTS = "int8 weights per channel, symmetric"


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("torchscript", "TorchScript, traced", "model.pt"),
        Format("torchscript_script", "TorchScript, compiled from source", "model.pt"),
        Format("torch_export", "torch.export", "model.pt2"),
        Format("aotinductor", "AOTInductor package", "model.pt2"),
        Format("saved_model", "SavedModel", "saved_model"),
        Format("keras", "Keras archive", "model.keras"),
        Format("tflite", "LiteRT (TFLite)", "model.tflite"),
        Format("tflite_float16", "LiteRT, float16 weights", "model.tflite", "float16"),
        Format("tflite_int8", "LiteRT, int8", "model.tflite", "int8", f"{_WEIGHTS}; int8 activations, asymmetric: {_RANGES}"),
        Format("tflite_dynamic_int8", "LiteRT, int8 weights (dynamic range)", "model.tflite", "int8"),
        Format("stablehlo", "StableHLO (jax.export)", "model.stablehlo"),
        Format("onnx", "ONNX, opset 18", "model.onnx"),
        Format("onnx_opset11", "ONNX, opset 11", "model.onnx"),
        Format("onnx_int8", "ONNX, int8 (QDQ)", "model.onnx", "int8", f"{_WEIGHTS}, of 7 bits; uint8 activations, asymmetric: {_RANGES}"),
        Format("openvino", "OpenVINO IR", "model.xml"),
        Format("openvino_int8", "OpenVINO IR, int8", "model.xml", "int8", f"{_WEIGHTS}; 8-bit activations, symmetric: {_RANGES}"),
    )
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One source framework and one format: how it is written and which runtime verifies it, or why it is impossible.

    What is not written in one go goes `via` another format of the same source, which the worker called `by` converts: a runtime, another
    framework, or a converter in its own environment. `needs` are libraries beyond the framework and the runtime.
    """

    source: str
    format: str
    runtime: str | None
    how: str
    via: str | None = None
    by: str | None = None
    needs: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        """Whether there is a way."""
        return self.runtime is not None

    @property
    def name(self) -> str:
        """`pytorch-onnx`, which is also the name of the artefact's directory."""
        return f"{self.source}-{self.format}"

    @property
    def layout(self) -> str:
        """How the artefact takes images: as its source does, but that TensorFlow computes in NHWC whoever wrote the model."""
        return "NCHW" if self.source == "pytorch" and self.format != "saved_model" else "NHWC"

    @property
    def takes_files(self) -> bool:
        """Whether the artefact has the signature `serve_images`, too."""
        return (self.source, self.format) == ("tensorflow", "saved_model")

    def missing(self) -> str | None:
        """Why this machine cannot make or verify it, with the exact pip line; None when it can."""
        assert self.runtime is not None, self.name
        frameworks = (self.source, *((self.by,) if self.by in contract.FRAMEWORKS else ()))
        reasons = [contract.missing(name) for name in frameworks] + [runtimes.missing(self.runtime)]
        reasons.append(not_installed(f"{FORMATS[self.format].title} from {self.source}", self.needs, EXTRA))
        reasons += [converters.missing(self.by)] if self.by in converters.CONVERTERS else []
        return next((reason for reason in reasons if reason), None)


def _cells() -> tuple[Cell, ...]:
    torch_onnx, via_onnx = ("onnx", "onnxscript"), "OpenVINO's converter reads the ONNX file"
    no_torch = "TorchScript and torch.export are programs of torch operators, which only torch writes"
    no_keras = "a Keras archive names Keras layers; load our checkpoint into the Keras model instead: every framework reads it"
    no_lite = "LiteRT is written from TensorFlow, and our checkpoint loads there: --from tensorflow writes the same model"
    no_hlo = "only JAX writes it here; --from jax writes the same model from the same checkpoint"
    no_int8 = (
        "quantised from PyTorch's ONNX file, which has BatchNorm folded into the convolutions and max-pooling in one operator: the padding "
        "with minus infinity that others write leaves 8 bits no range; --from pytorch writes the same model from the same checkpoint"
    )
    by_onnx2tf = "onnx2tf, in an environment of its own (make converters), reads the ONNX file"
    old = "asked for opset 11, jax2onnx 0.17 writes operators of later ones under its number, and ONNX Runtime refuses the file"
    torch_only = ("torchscript", "torchscript_script", "torch_export", "aotinductor")
    lite = ("tflite", "tflite_float16", "tflite_int8", "tflite_dynamic_int8")
    int8 = ("onnx_int8", "openvino_int8")
    return (
        Cell("pytorch", "torchscript", "torchscript", "torch.jit.trace; deprecated by PyTorch in favour of torch.export"),
        Cell("pytorch", "torchscript_script", "torchscript", "torch.jit.script of the FX graph; deprecated as well"),
        Cell("pytorch", "torch_export", "torch_export", "torch.export.save"),
        Cell("pytorch", "aotinductor", "aotinductor", "torch._inductor.aoti_compile_and_package, which needs a C++ compiler"),
        Cell("pytorch", "saved_model", "saved_model", by_onnx2tf, "onnx", "onnx2tf", torch_onnx),
        Cell("pytorch", "keras", None, no_keras),
        *(Cell("pytorch", name, None, no_lite) for name in lite),
        Cell("pytorch", "stablehlo", None, no_hlo),
        Cell("pytorch", "onnx", "onnxruntime", "torch.onnx.export(dynamo=True)", needs=torch_onnx),
        Cell("pytorch", "onnx_opset11", "onnxruntime", "torch.onnx.export(dynamo=False), deprecated with TorchScript", needs=torch_onnx),
        Cell("pytorch", "onnx_int8", "onnxruntime", "ONNX Runtime's quantize_static of the ONNX file", "onnx", "onnxruntime", torch_onnx),
        Cell("pytorch", "openvino", "openvino", via_onnx, "onnx", "openvino", torch_onnx),
        Cell("pytorch", "openvino_int8", "openvino", "NNCF's quantize of the ONNX file", "onnx", "openvino", (*torch_onnx, "nncf")),
        *(Cell("tensorflow", name, None, no_torch) for name in torch_only),
        Cell("tensorflow", "saved_model", "saved_model", "tf.saved_model.save with serving_default (floats) and serve_images (JPEG, PNG)"),
        Cell("tensorflow", "keras", "keras", "keras.Model.save"),
        Cell("tensorflow", "tflite", "litert", "tf.lite.TFLiteConverter"),
        Cell("tensorflow", "tflite_float16", "litert", "tf.lite.TFLiteConverter, weights in half precision"),
        Cell("tensorflow", "tflite_int8", "litert", "tf.lite.TFLiteConverter, with images as representative data set"),
        Cell("tensorflow", "tflite_dynamic_int8", "litert", "tf.lite.TFLiteConverter, weights in 8 bits and activations as they come"),
        Cell("tensorflow", "stablehlo", None, no_hlo),
        Cell("tensorflow", "onnx", "onnxruntime", "tf2onnx", needs=("tf2onnx", "onnx")),
        Cell("tensorflow", "onnx_opset11", "onnxruntime", "tf2onnx", needs=("tf2onnx", "onnx")),
        Cell("tensorflow", "openvino", "openvino", via_onnx, "onnx", "openvino", ("tf2onnx", "onnx")),
        *(Cell("tensorflow", name, None, no_int8) for name in int8),
        *(Cell("jax", name, None, no_torch) for name in torch_only),
        Cell("jax", "saved_model", "saved_model", "jax.export's StableHLO, called by a TensorFlow graph", "call_module", "tensorflow"),
        Cell("jax", "keras", None, no_keras),
        *(Cell("jax", name, None, no_lite) for name in lite),
        Cell("jax", "stablehlo", "stablehlo", "jax.export for CPU, CUDA, ROCm and TPU, with a symbolic batch"),
        Cell("jax", "onnx", "onnxruntime", "jax2onnx", needs=("jax2onnx", "onnx")),
        Cell("jax", "onnx_opset11", None, f"{old}; --from pytorch or tensorflow writes it"),
        Cell("jax", "openvino", "openvino", via_onnx, "onnx", "openvino", ("jax2onnx", "onnx")),
        *(Cell("jax", name, None, no_int8) for name in int8),
    )  # fmt: skip


CELLS = _cells()


def run_by(*names: str) -> tuple[str, ...]:
    """The formats that the runtimes of these names run."""
    return tuple(dict.fromkeys(cell.format for cell in CELLS if cell.runtime in names))


BACKWARD = {
    "onnx -> pytorch": "onnx2torch, released last in 2024, knows no Pad, ReduceMean or ReduceSumSquare of opset 18, which tf2onnx and "
    "jax2onnx write of our models; what it reads (ResNets and MLP of opset 11 from TensorFlow) becomes TorchScript alone, as torch.export "
    "refuses shapes that depend on data; our own models load their checkpoint in PyTorch without a detour",
}
"""Ways from a file to a framework that are not taken, and why."""


def chosen(sources: list[str], formats: list[str]) -> list[Cell]:
    """The cells asked for; `all` stands for every possible one. UsageError, with the reason, for one that is impossible or unknown."""
    for name in sources:
        contract.framework(name)
    unknown = [name for name in formats if name not in (*FORMATS, "all")]
    if unknown:
        raise UsageError(f"unknown format {unknown[0]!r}; choose from all, {', '.join(FORMATS)}")
    found = [cell for cell in CELLS if cell.source in sources and (cell.format in formats or ("all" in formats and cell.possible))]
    if len(sources) == 1 and not all(cell.possible for cell in found):
        impossible = next(cell for cell in found if not cell.possible)
        raise UsageError(f"{impossible.source} does not export to {impossible.format}: {impossible.how}")
    possible = [cell for cell in found if cell.possible]
    if not possible:
        raise UsageError(f"none of {', '.join(sources)} exports to {', '.join(formats)}: `triptych export --list` says why")
    return possible


def table() -> list[dict[str, str | None]]:
    """Every cell as plain data."""
    return [{"source": cell.source, "format": cell.format, "runtime": cell.runtime, "how": cell.how} for cell in CELLS]


def markdown() -> str:
    """The table of docs/export.md: a row a format, a column a source."""
    by = {(cell.source, cell.format): cell for cell in CELLS}
    lines = [f"| format | {' | '.join(contract.FRAMEWORKS[name].title for name in SOURCES)} |", "|---" * (len(SOURCES) + 1) + "|"]
    for name, row in FORMATS.items():
        cells = [by[source, name] for source in SOURCES]
        shown = [f"{cell.how}; run in {runtimes.ADAPTERS[cell.runtime].title}" if cell.runtime else "no" for cell in cells]
        lines.append(f"| `{name}`: {row.title} | {' | '.join(shown)} |")
    reasons = dict.fromkeys((f"`{cell.format}` from {cell.source}", cell.how) for cell in CELLS if not cell.possible)
    grouped: dict[str, list[str]] = {}
    for what, why in reasons:
        grouped.setdefault(why, []).append(what)
    lines += ["", *(f"- {', '.join(what)}: {why}." for why, what in grouped.items())]
    return "\n".join([*lines, *(f"- {way}: {why}." for way, why in BACKWARD.items())])
