"""The Open Inference Protocol, version 2: a request's bytes to an array, and logits to a response. JSON and binary tensors.

https://github.com/kserve/open-inference-protocol, and Triton's extension for binary tensor data: a JSON head whose length is told by
`Inference-Header-Content-Length`, then raw little-endian values.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from triptych.serving.artefact import INPUT, OUTPUT, VERSION
from triptych.serving.options import Refused

HEAD_LENGTH = "inference-header-content-length"
DATATYPE, WIDTH = "FP32", 4
LONGEST_ID = 256


@dataclass(frozen=True, slots=True)
class Asked:
    """An inference request: images (N, *shape) float32 and finite, the client's own id, and whether it wants binary logits."""

    images: np.ndarray
    id: str | None
    binary: bool


def refuse(message: str) -> NoReturn:
    """The request is malformed: status 400."""
    raise Refused(400, message)


def parsed(body: bytes, head_length: str | None, shape: tuple[int, ...], max_batch: int) -> Asked:
    """A request's body. Raises Refused (400), saying what is wrong, for anything but up to `max_batch` images of `shape`."""
    head, tail = _split(body, head_length)
    request = _json(head)
    identity = request.get("id")
    if identity is not None and (not isinstance(identity, str) or len(identity) > LONGEST_ID):
        refuse(f"id must be a string of at most {LONGEST_ID} characters")
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        refuse(f"inputs must be a list of one tensor, {INPUT!r}")
    return Asked(_tensor(inputs[0], tail, shape, max_batch), identity, _wants_binary(request))


def _split(body: bytes, head_length: str | None) -> tuple[bytes, bytes | None]:
    """The JSON head and the binary tail; no tail where no length is told."""
    if head_length is None:
        return body, None
    if not (head_length.isascii() and head_length.isdigit() and len(head_length) < 12) or int(head_length) > len(body):
        refuse(f"{HEAD_LENGTH} must be a number of bytes, not more than the body's {len(body)}")
    return body[: int(head_length)], body[int(head_length) :]


def _json(head: bytes) -> dict[str, Any]:
    try:
        found = json.loads(head.decode(), parse_constant=lambda name: refuse(f"{name} is not JSON; every value must be finite"))
    except (ValueError, RecursionError) as error:
        refuse(f"the body is not JSON: {str(error)[:200]}")
    if not isinstance(found, dict):
        refuse("the body must be a JSON object with inputs")
    return found


def _parameters(owner: dict[str, Any], name: str) -> dict[str, Any]:
    found = owner.get("parameters", {})
    if not isinstance(found, dict):
        refuse(f"the parameters of {name} must be an object")
    if any(key.startswith("shared_memory") for key in found):
        refuse("shared memory is not offered; send the tensor in the body")
    return found


def _tensor(given: dict[str, Any], tail: bytes | None, shape: tuple[int, ...], max_batch: int) -> np.ndarray:
    if given.get("name") != INPUT or given.get("datatype") != DATATYPE:
        refuse(f"the input must be {INPUT!r} of datatype {DATATYPE}, not {_short(given.get('name'))} of {_short(given.get('datatype'))}")
    told = given.get("shape")
    if not isinstance(told, list) or not all(type(size) is int for size in told) or tuple(told[1:]) != shape or len(told) != len(shape) + 1:
        refuse(f"the shape of {INPUT!r} must be [N, {', '.join(map(str, shape))}], not {_short(told)}")
    if not 1 <= told[0] <= max_batch:
        refuse(f"a request may have 1 to {max_batch} images, not {_short(told[0])}; send several")
    values = _binary_values(given, tail, math.prod(told)) if tail is not None else _json_values(given, math.prod(told))
    if not np.isfinite(values).all():
        refuse(f"a value of {INPUT!r} is not a finite {DATATYPE}")
    return values.reshape(told)


def _binary_values(given: dict[str, Any], tail: bytes, count: int) -> np.ndarray:
    size = _parameters(given, INPUT).get("binary_data_size")
    if "data" in given or type(size) is not int:
        refuse(f"with {HEAD_LENGTH} the tensor is binary: its parameters must have binary_data_size, and data must be left out")
    if not size == len(tail) == WIDTH * count:
        refuse(f"{INPUT!r} has {count} values, {WIDTH * count} bytes; binary_data_size is {_short(size)}, and {len(tail)} bytes were sent")
    return np.frombuffer(tail, "<f4")


def _json_values(given: dict[str, Any], count: int) -> np.ndarray:
    if "binary_data_size" in _parameters(given, INPUT):
        refuse(f"a binary tensor needs {HEAD_LENGTH}, the length of the JSON before it")
    try:
        data = np.asarray(given.get("data"))
    except (ValueError, OverflowError, TypeError):
        refuse("data must be a list of numbers, flat or nested as the shape is")
    if data.dtype.kind not in "iuf" or data.size != count:
        refuse(f"data must be {count} numbers, flat or nested as the shape is")
    with np.errstate(over="ignore"):
        return data.astype(np.float32).reshape(-1)


def _wants_binary(request: dict[str, Any]) -> bool:
    """As the one output asks, or the request for all outputs."""
    default = _parameters(request, "the request").get("binary_data_output", False)
    outputs = request.get("outputs", [])
    if (
        not isinstance(outputs, list)
        or len(outputs) > 1
        or not all(isinstance(each, dict) and each.get("name") == OUTPUT for each in outputs)
    ):
        refuse(f"outputs may name {OUTPUT!r}, once, or be left out")
    asked = _parameters(outputs[0], OUTPUT) if outputs else {}
    if "classification" in asked:
        refuse("the classification extension is not offered; the output is the logits")
    wanted = asked.get("binary_data", default)
    if not isinstance(wanted, bool):
        refuse("binary_data and binary_data_output must be true or false")
    return wanted


def _short(value: Any) -> str:
    return repr(value)[:80]


def response(model: str, asked: Asked, logits: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """The body and headers of the answer. Raises Refused (422) for logits that are not finite: the input led out of float32."""
    if not np.isfinite(logits).all():
        raise Refused(422, f"the values of {INPUT!r} are so large that the model's own leave the range of {DATATYPE}")
    output: dict[str, Any] = {"name": OUTPUT, "datatype": DATATYPE, "shape": list(logits.shape)}
    told = {"model_name": model, "model_version": VERSION, **({} if asked.id is None else {"id": asked.id}), "outputs": [output]}
    if not asked.binary:
        output["data"] = [float(value) for value in logits.ravel()]
        return json.dumps(told, allow_nan=False).encode(), {"content-type": "application/json"}
    raw = np.ascontiguousarray(logits, "<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps(told, allow_nan=False).encode()
    return head + raw, {"content-type": "application/octet-stream", HEAD_LENGTH: str(len(head))}
