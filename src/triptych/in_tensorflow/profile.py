"""TensorFlow's own profiler: a trace of what runs, and its operators by the kind of work they do.

A graph's operator is called by the scope in which it was made, `gradient_tape/resnet50/layer1.0.bn1/mul:Mul`: the layer tells the kind of
work, and where there is no layer the type of the operator does.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from triptych.core import trace
from triptych.core.spec import Spec
from triptych.core.trace import DATA, OPTIMIZER, STEP, Event

OPERATOR = re.compile(r"^(?P<name>[^:]+):(?P<type>\w+)$")
HANDED_OVER = re.compile(r"^(EagerCopyToDevice|EagerLocalExecute: _EagerConst|tf\.constant)$")
KINDS = tuple(
    (re.compile(pattern), category)
    for pattern, category in (
        (r"Conv2D", "convolution"),
        (r"MatMul|Einsum", "matrix_product"),
        (r"BatchNorm|LayerNorm", "normalization"),
        (r"Relu|Gelu|Pool|^AddN$|^Pad", "elementwise"),
        (r"^ResourceApply", "optimizer"),
    )
)


@contextlib.contextmanager
def profile(directory: Path) -> Iterator[None]:
    """Trace what runs while open: `directory/plugins/profile/`, which TensorBoard's profiler shows."""
    with tf.profiler.experimental.Profile(str(directory)):
        yield


def annotate(name: str) -> contextlib.AbstractContextManager[Any]:
    """A region of this name in the trace."""
    region: contextlib.AbstractContextManager[Any] = tf.profiler.experimental.Trace(name)
    return region


def operators(directory: Path, spec: Spec) -> list[Event]:
    """The operators and regions of the trace under `directory`."""
    (file,) = directory.glob("plugins/profile/*/*.xplane.pb")
    space, known = xplane_pb2.XSpace.FromString(file.read_bytes()), trace.layers(spec)
    planes = [plane for plane in space.planes if plane.name == "/host:CPU"]
    return [event for plane in planes for line in plane.lines for event in _events(plane, line, known)]


def _events(plane: Any, line: Any, known: Mapping[str, str]) -> Iterator[Event]:
    track = f"{line.name} {line.id}"
    for each in line.events:
        name = plane.event_metadata[each.metadata_id].name
        start = line.timestamp_ns / 1e3 + each.offset_ps / 1e6
        stop = start + each.duration_ps / 1e6
        found = OPERATOR.match(name)
        if name in (STEP, DATA):
            yield Event(name, start, stop, track, DATA if name == DATA else None, region=True)
        elif HANDED_OVER.match(name):
            yield Event(name, start, stop, track, DATA)
        elif found is not None:
            layer = trace.layer_of(found["name"], known)
            yield Event(found["type"], start, stop, track, known.get(layer) or category(found["name"], found["type"]), layer)


def category(name: str, kind: str) -> str | None:
    """The kind of work of an operator outside of all layers, by its scoped name and its type; None when they do not tell."""
    if OPTIMIZER in name.split("/"):
        return "optimizer"
    return next((category for pattern, category in KINDS if pattern.search(kind)), None)
