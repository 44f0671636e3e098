"""A running server: the protocol by its reference client, uploads, batches, limits, metrics, and the end."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.core.difference import scaled_error

INFER = "/v2/models/resnet20/infer"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def picture(size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_own_client_works_unchanged(serving, served, run, binary, images):
    tritonclient = pytest.importorskip("tritonclient.http")
    with serving() as (_, port):
        client = tritonclient.InferenceServerClient(f"127.0.0.1:{port}")
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("resnet20")
        assert client.is_model_ready("resnet20", "1")
        assert client.get_server_metadata()["name"] == "triptych"
        told = client.get_model_metadata("resnet20")
        assert told == served.metadata()
        given = tritonclient.InferInput(told["inputs"][0]["name"], [5, *told["inputs"][0]["shape"][1:]], told["inputs"][0]["datatype"])
        given.set_data_from_numpy(images(5), binary_data=binary)
        wanted = tritonclient.InferRequestedOutput("logits", binary_data=binary)
        answer = client.infer("resnet20", [given], outputs=[wanted], request_id="7")
        assert answer.get_response()["id"] == "7"
        assert scaled_error(answer.as_numpy("logits"), run(images(5))) <= 1e-6
        assert client.infer("resnet20", [given]).as_numpy("logits").shape == (5, 10), "all outputs, without naming them"
        with pytest.raises(tritonclient.InferenceServerException, match="there is no model 'other'"):
            client.infer("other", [given])
        client.close()


def test_together_is_as_alone(serving, run, ask, images, request_of, logits):
    """Requests of 1 to 3 images that shared batches have the logits that each of them has by itself."""
    with serving(max_delay=0.2, max_batch=16) as (service, port), ThreadPoolExecutor(12) as pool:
        parts = [images(1 + number % 3, number) for number in range(24)]
        answers = list(pool.map(lambda part: ask(port, "POST", INFER, request_of(part)), parts))
        sizes = service.metrics.text().decode()
    assert [status for status, _, _ in answers] == [200] * 24
    for part, (_, _, answer) in zip(parts, answers, strict=True):
        assert answer["id"] == "mine"
        assert scaled_error(logits(answer), run(part)) <= 1e-6
    batches, total = (float(re.search(rf"^triptych_batch_images_{name} (\S+)$", sizes, re.M)[1]) for name in ("count", "sum"))
    assert total == sum(len(part) for part in parts)
    assert batches < 24, "some shared a batch"


def test_an_upload_is_prepared_as_the_model_needs_it(serving, served, run, ask):
    from triptych.serving.images import prepared

    with serving() as (_, port):
        status, _, answer = ask(port, "POST", "/predict", picture())
    assert status == 200
    expected = run(prepared(picture(), served.spec.preprocessing, 10**6).transpose(2, 0, 1)[None])[0].astype(np.float64)
    shares = np.exp(expected - expected.max()) / np.exp(expected - expected.max()).sum()
    assert [row["class"] for row in answer["top"]] == np.argsort(-shares)[:5].tolist()
    assert [row["probability"] for row in answer["top"]] == pytest.approx(np.sort(shares)[::-1][:5].tolist())
    assert set(answer["seconds"]) == {"prepare", "queue", "compute", "total"}


def slow(seconds: float) -> Any:
    """A model that takes its time."""

    def run(batch: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return np.zeros((len(batch), 10), np.float32)

    return run


def test_a_full_queue_says_when_to_come_back(serving, ask, images, request_of):
    with serving(slow(0.4), max_batch=1, max_queue=2, max_delay=0.0) as (_, port), ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: ask(port, "POST", INFER, request_of(images(1))), range(10)))
    statuses = sorted(status for status, _, _ in answers)
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 3, "one computed, two waited"
    for status, headers, answer in answers:
        if status == 503:
            assert int(headers["retry-after"]) >= 1
            assert "wait already" in answer["error"]


def test_who_waits_too_long_is_told(serving, ask, images, request_of):
    with serving(slow(0.5), max_batch=1, request_seconds=0.2) as (service, port):
        assert ask(port, "POST", INFER, request_of(images(1)))[0] == 504
        time.sleep(0.5)
        assert service.batcher._images == 0


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_has_a_limit(serving, declared, ask):
    with serving(max_body=10_000) as (_, port):
        body = b"x" * 10_001
        status, _, answer = ask(port, "POST", INFER, body if declared else (body[i : i + 1000] for i in range(0, len(body), 1000)))
        assert status == 413
        assert "10,000 bytes" in answer["error"]
        assert ask(port, "POST", INFER, body[:-1])[0] == 400, "as long as may be, if only it were JSON"


def test_a_body_that_does_not_come_and_a_head_that_does_not_end(serving):
    with serving(body_seconds=0.3, head_seconds=0.3) as (service, port):
        for sent in (f"POST {INFER} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{{", f"POST {INFER} HTTP/1.1\r\nhost:"):
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                connection.sendall(sent.encode())
                assert connection.recv(12) == b"HTTP/1.1 408"
        assert service.bodies._held == 0


def test_bodies_share_a_limit(serving, ask):
    """One that has begun to arrive holds memory; what others send beyond the rest waits outside."""
    with serving(max_body=30_000) as (service, port):
        service.bodies._held = service.options.max_held - 20_000
        status, headers, _ = ask(port, "POST", "/predict", b"x" * 25_000)
        assert (status, headers["retry-after"]) == (503, "2")
        assert service.bodies._held <= service.options.max_held - 20_000


def test_pixels_have_a_limit(serving, ask):
    with serving(max_pixels=1000) as (_, port):
        status, _, answer = ask(port, "POST", "/predict", picture((40, 30)))
        assert (status, "more than 1,000" in answer["error"]) == (422, True)
        assert ask(port, "POST", "/predict", picture((25, 40)))[0] == 200


@pytest.mark.parametrize("seed", range(2))
def test_malformed_requests_are_answered_4xx(serving, seed, images, request_of):
    spec = importlib.util.spec_from_file_location("serve_fuzz", BENCHMARKS / "serve_fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    with serving() as (_, port):
        counts, wrong = fuzz.run("127.0.0.1", port, fuzz.Fuzz("resnet20", [3, 32, 32], seed), 250)
        assert fuzz.status("127.0.0.1", port, fuzz.request(INFER, request_of(images(1)))) == "200", "it goes on, and this is well formed"
    assert wrong == []
    assert {kind for kind, _ in counts} == {"header", "document", "tensor", "image"}


def test_metrics_count(serving, ask, images, request_of):
    with serving() as (_, port):
        for path, body in (
            (INFER, request_of(images(3))),
            (INFER, request_of(images(1))),
            (INFER, b"{}"),
            ("/none", b""),
            ("/predict", b"x"),
        ):
            ask(port, "POST", path, body)
        text = ask(port, "GET", "/metrics")[2].decode()
    for line in (
        'triptych_requests_total{route="infer",status="200"} 2.0', 'triptych_requests_total{route="infer",status="400"} 1.0',
        'triptych_requests_total{route="other",status="404"} 1.0', 'triptych_requests_total{route="predict",status="422"} 1.0',
        "triptych_batch_images_sum 4.0", "triptych_queue_images 0.0", "triptych_held_bytes 0.0",
    ):  # fmt: skip
        assert f"\n{line}\n" in text


def test_a_failing_model_is_the_servers_fault_and_others_go_on(serving, ask, request_of):
    def run(batch: np.ndarray) -> np.ndarray:
        if batch[0, 0, 0, 0] > 10:
            raise RuntimeError("broken")
        return np.full((len(batch), 10), np.inf if batch[0, 0, 0, 0] > 1 else 0, np.float32)

    with serving(run, max_batch=4) as (_, port):
        assert ask(port, "POST", INFER, request_of(np.full((1, 3, 32, 32), 11, np.float32)))[0] == 500
        assert ask(port, "POST", INFER, request_of(np.full((1, 3, 32, 32), 2, np.float32)))[0] == 422, "logits that JSON cannot say"
        assert ask(port, "POST", INFER, request_of(np.zeros((1, 3, 32, 32), np.float32)))[0] == 200


def test_the_page_asks_predict_and_takes_nothing_from_elsewhere(serving, ask):
    with serving() as (_, port):
        status, headers, page = ask(port, "GET", "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b'fetch("predict"' in page
    assert not re.search(rb"(src|href)=", page), "nothing is loaded"


def test_sigterm_lets_accepted_requests_finish(exported, tmp_path, ask, images, request_of, started):
    log = tmp_path / "log"
    process, port = started(exported, log, "--max-delay", "1500", "--max-batch", "8")
    found: list[int] = []
    clients = [threading.Thread(target=lambda: found.append(ask(port, "POST", INFER, request_of(images(1)))[0])) for _ in range(3)]
    for client in clients:
        client.start()
    while b"triptych_queue_images 3.0" not in ask(port, "GET", "/metrics")[2]:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    for client in clients:
        client.join(30)
    assert process.wait(30) == 0
    assert found == [200, 200, 200]
    with pytest.raises(ConnectionRefusedError):
        ask(port, "GET", "/v2/health/live")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "request"] == ["worker", "ready", "draining", "ended"]
    assert [event["status"] for event in events if event.get("route") == "infer"] == [200, 200, 200]
