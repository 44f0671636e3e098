"""A SavedModel in TensorFlow, by its signatures alone: Keras is not needed, and neither is whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from triptych.core import storage
from triptych.core.errors import InputRefused

LARGEST = 2**31
"""Bytes: protobuf's own limit."""


REACHES_OUT = frozenset({
    "DebugIdentityV2", "EagerPyFunc", "MatchingFiles", "PrintV2", "PyFunc", "PyFuncStateless", "ReadFile", "RpcCall", "TextLineReaderV2",
    "WholeFileReaderV2", "WriteFile",
})  # fmt: skip
"""Operators with which a graph reads and writes files, or calls Python. Saving and restoring variables is not among them."""


def check(artefact: Path) -> None:
    """InputRefused for what is not a SavedModel, or has an operator of `REACHES_OUT`: a TensorFlow graph is a program."""
    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString(storage.read_regular(artefact / "saved_model.pb", LARGEST))
    except DecodeError:
        raise InputRefused(f"{artefact} is not a SavedModel: its saved_model.pb cannot be read") from None
    graphs = [meta.graph_def for meta in proto.meta_graphs]
    functions = [function for graph in graphs for function in graph.library.function]
    nodes = [node for graph in graphs for node in graph.node] + [node for function in functions for node in function.node_def]
    found = sorted({node.op for node in nodes if node.op in REACHES_OUT or "Dataset" in node.op})
    if found:
        raise InputRefused(f"{artefact} has the operator(s) {', '.join(found)}, which reach files or Python; a classifier needs none")


def opened(artefact: Path) -> Callable[[np.ndarray], np.ndarray]:
    """(N, H, W, C) -> logits (N, classes), by `serving_default`."""
    check(artefact)
    loaded = tf.saved_model.load(str(artefact))
    signature = loaded.signatures["serving_default"]

    def run(x: np.ndarray, loaded: Any = loaded) -> np.ndarray:  # a signature without its model loses the variables
        return np.asarray(signature(images=tf.constant(x))["logits"].numpy())

    return run


def served_images(artefact: Path, encoded: list[bytes]) -> dict[str, np.ndarray]:
    """`classes` and `probabilities` of encoded images, (N, k) each, by `serve_images`."""
    check(artefact)
    loaded = tf.saved_model.load(str(artefact))
    answer = loaded.signatures["serve_images"](encoded=tf.constant(encoded))
    return {name: np.asarray(value.numpy()) for name, value in answer.items()}


def versions() -> dict[str, str]:
    """The runtime's version."""
    return {"tensorflow": tf.__version__}
