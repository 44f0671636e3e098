"""TensorFlow Serving's file of warm-up requests: records of `tensorflow.serving.PredictionLog`, written and read without TensorFlow.

https://www.tensorflow.org/tfx/serving/saved_model_warmup. Its protocol buffers come with a package that needs TensorFlow and gRPC; the
few fields that a request has stand here instead, as in `tensorflow_serving/apis/{prediction_log,predict,model}.proto` and
`tensorflow/core/framework/tensor.proto`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboard.compat.tensorflow_stub.errors import OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from tensorboard.summary.writer.record_writer import RecordWriter

PLACE = "assets.extra/tf_serving_warmup_requests"
FLOAT, STRING = 1, 7
"""Of `tensorflow.DataType`."""
MESSAGES: dict[str, dict[int, tuple[str, str]]] = {
    "Dim": {1: ("size", "int64")},
    "TensorShapeProto": {2: ("dim", "repeated Dim")},
    "TensorProto": {
        1: ("dtype", "int64"), 2: ("tensor_shape", "TensorShapeProto"), 4: ("tensor_content", "bytes"), 8: ("string_val", "repeated bytes"),
    },
    "Input": {1: ("key", "string"), 2: ("value", "TensorProto")},  # an entry of a map, which is a repeated field of such
    "ModelSpec": {1: ("name", "string"), 3: ("signature_name", "string")},
    "PredictRequest": {1: ("model_spec", "ModelSpec"), 2: ("inputs", "repeated Input")},
    "PredictLog": {1: ("request", "PredictRequest")},
    "PredictionLog": {6: ("predict_log", "PredictLog")},
}  # fmt: skip
"""Message -> number of a field -> its name and type."""


@dataclass(frozen=True, slots=True)
class Request:
    """A call of a signature with one input: floats, or a list of byte strings."""

    model: str
    signature: str
    input: str
    value: np.ndarray | Sequence[bytes]


@functools.cache
def _log() -> Any:
    """The class of PredictionLog, in a pool of its own: the real one may be in the process, too."""
    field = descriptor_pb2.FieldDescriptorProto
    types = {"int64": field.TYPE_INT64, "bytes": field.TYPE_BYTES, "string": field.TYPE_STRING}
    file = descriptor_pb2.FileDescriptorProto(name="prediction_log.proto", package="triptych", syntax="proto3")
    for message, fields in MESSAGES.items():
        made = file.message_type.add(name=message)
        for number, (name, told) in fields.items():
            kind = told.removeprefix("repeated ")
            label = field.LABEL_OPTIONAL if kind == told else field.LABEL_REPEATED
            named = {} if kind in types else {"type_name": f".triptych.{kind}"}
            made.field.add(name=name, number=number, label=label, type=types.get(kind, field.TYPE_MESSAGE), **named)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("triptych.PredictionLog"))


def encoded(request: Request) -> bytes:
    """A PredictionLog."""
    log = _log()()
    asked = log.predict_log.request
    asked.model_spec.name, asked.model_spec.signature_name = request.model, request.signature
    given = asked.inputs.add(key=request.input)
    if isinstance(request.value, np.ndarray):
        given.value.dtype, shape = FLOAT, request.value.shape
        given.value.tensor_content = np.ascontiguousarray(request.value, "<f4").tobytes()
    else:
        given.value.dtype, shape = STRING, (len(request.value),)
        given.value.string_val.extend(request.value)
    for size in shape:
        given.value.tensor_shape.dim.add(size=size)
    data: bytes = log.SerializeToString(deterministic=True)
    return data


def decoded(data: bytes) -> Request:
    """What `encoded` wrote."""
    asked = _log().FromString(data).predict_log.request
    (given,) = asked.inputs
    value, shape = given.value, [dim.size for dim in given.value.tensor_shape.dim]
    found = list(value.string_val) if value.dtype == STRING else np.frombuffer(value.tensor_content, "<f4").reshape(shape)
    return Request(asked.model_spec.name, asked.model_spec.signature_name, given.key, found)


def write(path: Path, requests: Sequence[Request]) -> None:
    """The file, in a folder that is made where it is missing."""
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        records = RecordWriter(file)
        for request in requests:
            records.write(encoded(request))


def read(path: Path) -> Iterator[Request]:
    """The requests of a file, their checksums held up. DataLossError for a damaged record."""
    reader = PyRecordReader_New(str(path))
    with contextlib.suppress(OutOfRangeError):
        while True:
            reader.GetNext()
            yield decoded(reader.record())
