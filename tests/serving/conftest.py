"""A small ONNX file with the record that vouches for it, and servers that run it or any function, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract
from triptych.core.spec import to_dict
from triptych.export import record, runtimes
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


def write_artefact(folder: Path, change: Callable[[Path], Any] = lambda path: None, **changes: Any) -> Path:
    """An artefact's directory as `triptych export` leaves it, but for what `change` does to the file and `changes` says of its record."""
    directory = folder / "pytorch-onnx"
    directory.mkdir(parents=True)
    onnx.save(graph(), directory / "model.onnx")
    change(directory / "model.onnx")
    write_record(directory, **changes)
    return directory


def write_record(directory: Path, **changes: Any) -> None:
    """The record of what lies in a directory."""
    told = {"schema": record.SCHEMA, "source": "pytorch", "format": "onnx", "model": "resnet20", "passed": True, "spec": to_dict(SPEC)}
    (directory / record.NAME).write_text(json.dumps({**told, "files": record.listed(directory), **changes}))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact that can be served."""
    return write_artefact(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def written() -> Callable[..., Path]:
    """`write_artefact`, for artefacts that are to be refused."""
    return write_artefact


@pytest.fixture(scope="session")
def served(exported: Path) -> artefact.Artefact:
    """It, verified."""
    return artefact.load(exported)


Run = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="session")
def run(served: artefact.Artefact) -> Run:
    """It, opened."""
    return runtimes.opened(served.runtime, served.path)


class Here:
    """A function in place of the model's process."""

    ready, versions = False, dict[str, str]()

    def __init__(self, run: Run) -> None:
        self._run = run

    async def start(self) -> None:
        self.ready, self.kept = True, asyncio.get_running_loop().create_future()

    async def run(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return await asyncio.to_thread(self._run, np.concatenate(parts))

    async def stop(self) -> None:
        self.ready = False


Serving = Callable[..., contextlib.AbstractContextManager[tuple[Service, int]]]


@pytest.fixture
def serving(served: artefact.Artefact, run: Run) -> Serving:
    """`with serving(run=..., max_queue=...) as (service, port)`: a server in a thread, stopped as SIGTERM would."""
    opened = run

    @contextlib.contextmanager
    def start(run: Run = opened, keeper: Any = None, **options: Any) -> Iterator[tuple[Service, int]]:
        service = Service(served, Options(**options), keeper or (lambda *_: Here(run)))
        running = server(service, "127.0.0.1", 0)
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(running.run)
            try:
                ends = time.monotonic() + 20
                while not running.started and not ended.done() and time.monotonic() < ends:
                    time.sleep(0.01)
                if not ended.done():
                    yield service, running.port
            finally:
                running.handle_exit(15, None)
                ended.result(20)

    return start


@pytest.fixture(scope="session")
def ask() -> Callable[..., tuple[int, dict[str, str], Any]]:
    """`ask(port, method, path, body, headers)`: status, headers and content (JSON where it is) of one request."""

    def ask(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
            told = {key.lower(): value for key, value in response.getheaders()}
            return response.status, told, json.loads(content) if told.get("content-type") == "application/json" else content
        finally:
            connection.close()

    return ask


@pytest.fixture(scope="session")
def images() -> Callable[..., np.ndarray]:
    """`images(count, seed)`: (count, 3, 32, 32)."""
    return lambda count, seed=0: np.random.default_rng(seed).standard_normal((count, 3, 32, 32), dtype=np.float32)


@pytest.fixture(scope="session")
def request_of() -> Callable[[np.ndarray], bytes]:
    """`request_of(images)`: the body of a request, in JSON."""

    def body(given: np.ndarray) -> bytes:
        tensor = {"name": "images", "datatype": "FP32", "shape": list(given.shape), "data": given.ravel().tolist()}
        return json.dumps({"id": "mine", "inputs": [tensor]}).encode()

    return body


@pytest.fixture(scope="session")
def logits() -> Callable[[Any], np.ndarray]:
    """`logits(answer)`: those of an answer in JSON."""

    def read(answer: Any) -> np.ndarray:
        (output,) = answer["outputs"]
        return np.asarray(output["data"], np.float32).reshape(output["shape"])

    return read


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], int]]]:
    """`started(directory, log, *options)`: `triptych serve` in a process of its own, killed at the end, and its port."""
    processes = []

    def start(directory: Path, log: Path, *options: str) -> tuple[subprocess.Popen[bytes], int]:
        command = [sys.executable, "-m", "triptych.cli", "serve", str(directory), "--port", "0", *options]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
        processes.append(process)
        ends = time.monotonic() + 60
        while not (found := re.search(r'"url": "http://127.0.0.1:(\d+)"', log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends
            time.sleep(0.05)
        return process, int(found[1])

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A SavedModel that can be served, with both signatures of ours, and what it computes: (N, 32, 32, 3) -> (N, 10)."""
    contract.check_installed("tensorflow")
    directory = tmp_path_factory.mktemp("saved") / "tensorflow-saved_model"
    directory.mkdir()
    dense = np.random.default_rng(0).standard_normal((3, 10), dtype=np.float32)
    with (directory / "log").open("wb") as log:
        subprocess.run([sys.executable, "-c", SAVED_MODEL, str(directory / "saved_model")], input=dense.tobytes(), stderr=log, check=True)
    (directory / "log").unlink()
    write_record(directory, source="tensorflow", format="saved_model")
    return directory, lambda x: x.mean((1, 2)) @ dense


SAVED_MODEL = """
import sys
import numpy as np
import tensorflow as tf

class Model(tf.Module):
    def __init__(self):
        self.dense = tf.Variable(np.frombuffer(sys.stdin.buffer.read(), np.float32).reshape(3, 10))

    @tf.function(input_signature=[tf.TensorSpec((None, 32, 32, 3), tf.float32, name="images")])
    def serving_default(self, images):
        return {"logits": tf.reduce_mean(images, [1, 2]) @ self.dense}

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="encoded")])
    def serve_images(self, encoded):
        small = lambda each: tf.image.resize(tf.io.decode_image(each, 3, expand_animations=False), (32, 32)) / 255
        pixels = tf.map_fn(small, encoded, fn_output_signature=tf.TensorSpec((32, 32, 3), tf.float32))
        logits = tf.reduce_mean(pixels, [1, 2]) @ self.dense
        shares, classes = tf.math.top_k(tf.nn.softmax(logits), 5)
        return {"classes": classes, "probabilities": shares}

model = Model()
tf.saved_model.save(model, sys.argv[1], signatures={name: getattr(model, name) for name in ("serving_default", "serve_images")})
"""
