"""Where an ONNX file first computes something else than its source: every node's output becomes an output of the graph.

Layers are found by their values, so that no exporter's way of naming matters. A layer that an exporter has merged with the next has no
value of its own in the file; it counts as diverging only if none of the layers behind it is found either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core.difference import NOTHING_IN_COMMON, scaled_error
from triptych.core.tolerance import EXPORTED

AllOutputs = Callable[[Path, np.ndarray], list[tuple[str, str, np.ndarray]]]


def first_divergence(
    artefact: Path, images: np.ndarray, layers: Mapping[str, np.ndarray], all_outputs: AllOutputs
) -> dict[str, Any] | None:
    """`layer`, `node`, `operator` and `error` of the first layer (NHWC values, in execution order) that no node computes; None if all are.

    `all_outputs` gives name, operator and value of every node, in the graph's order.
    """
    nodes = all_outputs(artefact, images)
    nearest = [_nearest(value, nodes) for value in layers.values()]
    found = [number for number, (error, _) in enumerate(nearest) if error <= EXPORTED["float32"]]
    first = max(found, default=-1) + 1
    if first == len(layers):
        return None
    after = max((nearest[number][1] for number in found), default=-1) + 1
    error, place = _nearest(list(layers.values())[first], nodes[after:])
    name, operator, _ = nodes[after + place] if place >= 0 else ("(none of its shape)", "", None)
    return {"layer": list(layers)[first], "node": name, "operator": operator, "error": error}


def _nearest(value: np.ndarray, nodes: list[tuple[str, str, np.ndarray]]) -> tuple[float, int]:
    """The smallest error of a node's output from `value`, in either layout, and that node's place; NOTHING_IN_COMMON and -1 without one."""
    best = NOTHING_IN_COMMON, -1
    layouts = [value, value.transpose(0, 3, 1, 2)] if value.ndim == 4 else [value]
    for place, (_, _, output) in enumerate(nodes):
        for layout in layouts:
            error = scaled_error(output, layout) if output.shape == layout.shape else NOTHING_IN_COMMON
            if error < best[0]:
                best = error, place
    return best
