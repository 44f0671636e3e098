"""A small ONNX file with the record that vouches for it, and servers that run it or any function, in a thread."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog
from triptych.core.spec import to_dict
from triptych.export import record
from triptych.serving import artefact
from triptych.serving.app import Service
from triptych.serving.options import Options
from triptych.serving.server import server

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SPEC = catalog.get_spec("resnet20")


def graph() -> Any:
    """Convolution, ReLU, mean over space, a dense layer: (N, 3, 32, 32) -> (N, 10), as torch names its inputs and outputs."""
    helper, random = onnx.helper, np.random.default_rng(0)
    weights = {"kernel": (16, 3, 3, 3), "dense": (16, 10)}
    initializers = [onnx.numpy_helper.from_array(random.standard_normal(shape, dtype=np.float32), name) for name, shape in weights.items()]
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "dense"], ["logits"]),
    ]
    floats = onnx.TensorProto.FLOAT
    given = [helper.make_tensor_value_info("images", floats, ["batch", 3, 32, 32])]
    made = [helper.make_tensor_value_info("logits", floats, ["batch", 10])]
    body = helper.make_graph(nodes, "model", given, made, initializers)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def write_artefact(folder: Path, **changes: Any) -> Path:
    """An artefact's directory as `triptych export` leaves it, but for what `changes` says of its record."""
    directory = folder / "pytorch-onnx"
    directory.mkdir(parents=True)
    onnx.save(graph(), directory / "model.onnx")
    told = {"schema": record.SCHEMA, "source": "pytorch", "format": "onnx", "model": "resnet20", "passed": True, "spec": to_dict(SPEC)}
    (directory / record.NAME).write_text(json.dumps({**told, "files": record.listed(directory), **changes}))
    return directory


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact that can be served."""
    return write_artefact(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def written() -> Callable[..., Path]:
    """`write_artefact`, for artefacts that are to be refused."""
    return write_artefact


@pytest.fixture(scope="session")
def served(exported: Path) -> artefact.Served:
    """It, opened."""
    return artefact.load(exported)


Serving = Callable[..., contextlib.AbstractContextManager[tuple[Service, int]]]


@pytest.fixture
def serving(served: artefact.Served) -> Serving:
    """`with serving(run=..., max_queue=...) as (service, port)`: a server in a thread, stopped as SIGTERM would."""

    @contextlib.contextmanager
    def start(run: Callable[[np.ndarray], np.ndarray] | None = None, **options: Any) -> Iterator[tuple[Service, int]]:
        names = ("name", "spec", "source", "shape", "labels", "run", "versions")
        given = {name: getattr(served, name) for name in names} | ({} if run is None else {"run": run})
        service = Service(artefact.Served(**given), Options(**options))
        running = server(service, "127.0.0.1", 0)
        thread = threading.Thread(target=running.run)
        thread.start()
        try:
            ends = time.monotonic() + 20
            while not running.started and time.monotonic() < ends:
                time.sleep(0.01)
            yield service, running.port
        finally:
            running.handle_exit(15, None)
            thread.join(20)
            assert not thread.is_alive(), "it ends when it is asked to"

    return start
