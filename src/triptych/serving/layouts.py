"""Model repositories of other servers, written from an exported artefact: TensorFlow Serving, Triton, OpenVINO Model Server.

A repository is `MODEL/1/` with the artefact's files and what the server wants to know beside them. Before it takes its name, what lies in
it is opened by its runtime in a fresh process, and has to compute what the artefact does.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from triptych.core import storage
from triptych.core.difference import scaled_error
from triptych.core.errors import ExportFailed, InputRefused
from triptych.core.tolerance import EXPORTED
from triptych.export import images, matrix, record, session
from triptych.serving import artefact, prediction_log
from triptych.serving.artefact import INPUT, OUTPUT, VERSION, Artefact
from triptych.serving.images import prepared
from triptych.serving.options import Options
from triptych.serving.prediction_log import Request


@dataclass(frozen=True, slots=True)
class Given:
    """What a layout is written from: a verified artefact, images to warm up with, as files and as the model takes them, and batching."""

    served: Artefact
    encoded: list[bytes]
    images: np.ndarray
    options: Options


@dataclass(frozen=True, slots=True)
class Layout:
    """A server, the formats that it takes, and what its repository has beside the artefact's files."""

    name: str
    server: str
    formats: tuple[str, ...]
    complete: Callable[[Path, Given], None]


def _tf_serving(repository: Path, given: Given) -> None:
    """Warm-up requests for each signature, in the batches that an artefact is verified with."""
    name, (several, one), requests = given.served.name, images.BATCHES, []
    for start, end in ((0, several), (several, several + one)):
        requests.append(Request(name, "serving_default", INPUT, given.images[start:end]))
        if given.served.cell.takes_files:
            requests.append(Request(name, "serve_images", "encoded", given.encoded[start:end]))
    prediction_log.write(repository / name / VERSION / prediction_log.PLACE, requests)


def _triton(repository: Path, given: Given) -> None:
    """`config.pbtxt`, with names and dimensions as the ONNX file itself has them, and our own way of batching."""
    model = repository / given.served.name
    (taken,), (made,) = _onnx_tensors(model / VERSION / given.served.path.name)
    delay = round(given.options.max_delay * 1e6)
    batching = f"dynamic_batching {{ max_queue_delay_microseconds: {delay} }}\n" if given.options.max_batch > 1 else ""
    text = (
        f'name: "{given.served.name}"\nbackend: "onnxruntime"\nmax_batch_size: {given.options.max_batch}\n'
        f"input [ {_tensor(*taken)} ]\noutput [ {_tensor(*made)} ]\n{batching}"
    )
    storage.write_file(model / "config.pbtxt", text.encode())


def _tensor(name: str, dims: list[int]) -> str:
    return f'{{ name: "{name}", data_type: TYPE_FP32, dims: [ {", ".join(map(str, dims))} ] }}'


def _onnx_tensors(path: Path) -> list[list[tuple[str, list[int]]]]:
    """Name and dimensions, but for the batch's, of inputs and of outputs. InputRefused unless these are ours, with a dynamic batch."""
    import onnx  # only here: reading a file's own description takes no runtime

    graph, found = onnx.load(path, load_external_data=False).graph, []
    for values, name in ((graph.input, INPUT), (graph.output, OUTPUT)):
        types = [(value.name, value.type.tensor_type) for value in values]
        fixed = [each for each, kind in types if not kind.shape.dim or kind.shape.dim[0].HasField("dim_value")]
        if [each for each, _ in types] != [name] or fixed or types[0][1].elem_type != onnx.TensorProto.FLOAT:
            raise InputRefused(f"{path.name}: {', '.join(each for each, _ in types)} is not {name!r} in float32 with a dynamic batch")
        found.append([(name, [dim.dim_value for dim in types[0][1].shape.dim[1:]])])
    return found


def _ovms(repository: Path, given: Given) -> None:
    """`config.json`, which names the model's folder beside it."""
    config = {"model_config_list": [{"config": {"name": given.served.name, "base_path": given.served.name}}]}
    storage.write_file(repository / "config.json", json.dumps(config, indent=2).encode() + b"\n")


LAYOUTS = {
    row.name: row
    for row in (
        Layout("tf-serving", "TensorFlow Serving", matrix.run_by("saved_model"), _tf_serving),
        Layout("triton", "Triton Inference Server", matrix.run_by("onnxruntime"), _triton),
        Layout("ovms", "OpenVINO Model Server", matrix.run_by("openvino"), _ovms),
    )
}


def write(layout: Layout, directory: Path, out: Path, options: Options, overwrite: bool = False) -> dict[str, Any]:
    """Write the repository `out` from the artefact in `directory`; what was written, and how far it is from the artefact.

    Raises what `artefact.load` does, StorageError where `out` exists or cannot be written, and ExportFailed (nothing is left) when what
    was written does not compute what the artefact does.
    """
    served = artefact.load(directory, layout.formats)
    _, encoded = images.encoded(None, served.spec.in_channels, sum(images.BATCHES))
    pixels = np.stack([prepared(each, served.spec.preprocessing, options.max_pixels) for each in encoded])
    replaceable = frozenset({served.name, "config.json"})
    with storage.new_directory(out, overwrite=overwrite, replaceable=replaceable) as partial:
        version = partial / served.name / VERSION
        _copy(served, version)
        layout.complete(partial, Given(served, encoded, pixels, options))
        errors = _errors(served, version, pixels, encoded)
        files = record.listed(partial)
    told = {"layout": layout.name, "server": layout.server, "server_was_run": False, "model": served.name, "version": VERSION}
    return {**told, "source": served.source, "format": served.format, "errors": errors, "files": files}


def _copy(served: Artefact, version: Path) -> None:
    """The artefact's files: a SavedModel's own folder becomes the version's."""
    root = served.path if served.path.is_dir() else served.directory
    for name, entry in served.files.items():
        target = version / (served.directory / name).relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(served.directory / name, target)
        if record.sha256(target) != entry["sha256"]:
            raise InputRefused(f"{served.directory / name} was altered while it was copied; export it again")


def _errors(served: Artefact, version: Path, pixels: np.ndarray, encoded: list[bytes]) -> dict[str, float]:
    """How far the copy is from the artefact, by signature; the requests of a warm-up file are those it is called with."""
    warm_up = version / prediction_log.PLACE
    requests = list(prediction_log.read(warm_up)) if warm_up.exists() else []
    if requests:
        pixels = np.concatenate([each.value for each in requests if each.signature == "serving_default"])
        encoded = [data for each in requests if each.signature == "serve_images" for data in each.value]
    with tempfile.TemporaryDirectory(prefix="triptych-layout-") as folder:
        desk = session.Desk(Path(folder), session.process)
        save_file({"images": np.ascontiguousarray(pixels, np.float32)}, desk.path("inputs"))
        for number, data in enumerate(encoded if served.cell.takes_files else []):
            desk.path(f"{number:02d}.image").write_bytes(data)
        copy = version if served.path.is_dir() else version / served.path.name
        answers = [_answers(desk, served, path) for path in (served.path, copy)]
    errors = {name: _error(*(answer[name] for answer in answers)) for name in answers[0]}
    if max(errors.values()) > EXPORTED["float32"]:
        raise ExportFailed(f"{errors}: so far is what was written from {served.path}, in {served.runtime}; nothing was left")
    return errors


def _answers(desk: session.Desk, served: Artefact, path: Path) -> dict[str, dict[str, np.ndarray]]:
    """What each signature of an artefact gives, in a fresh process of its runtime."""
    outputs, files = str(desk.path("outputs")), sorted(map(str, desk.folder.glob("*.image")))
    with desk.fresh(served.runtime) as runtime:
        runtime.ask("open", key="layout", artefact=str(path), channels_first=served.channels_first)
        runtime.ask("run", key="layout", inputs=str(desk.path("inputs")), outputs=outputs)
        found = {"serving_default" if served.format == "saved_model" else OUTPUT: load_file(outputs)}
        if files:
            runtime.ask("serve", artefact=str(path), encoded=files, outputs=outputs)
            found["serve_images"] = load_file(outputs)
    return found


def _error(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """The largest scaled error of a signature's outputs."""
    return max(scaled_error(found[name], expected[name]) for name in expected)
