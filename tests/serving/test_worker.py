"""The model's process: killed under load, hanging, refusing and dying, it is replaced, and nobody is left without an answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from triptych.core.difference import scaled_error
from triptych.core.errors import InputRefused
from triptych.serving import artefact, keeper
from triptych.serving.keeper import Keeper, NoWorker

INFER = "/v2/models/resnet20/infer"

STAND_IN = '''
"""Speaks the protocol of `triptych.serving.worker`; the first value of a batch tells it what to do."""
import json, os, signal, struct, sys, time
def tell(told, values=b""):
    sys.stdout.buffer.write(json.dumps(told).encode() + b"\\n" + values)
    sys.stdout.buffer.flush()
with open("BORN", "a") as born:
    born.write("x")
if os.path.exists("DIE"):
    os.kill(os.getpid(), signal.SIGKILL)
if os.path.exists("REFUSE"):
    tell({"error": {"kind": "InputRefused", "message": "model.onnx is not what was exported"}})
    sys.exit()
tell({"versions": {}, "frameworks_loaded": []})
for line in sys.stdin.buffer:
    count = json.loads(line)["images"]
    first = struct.unpack("<f", sys.stdin.buffer.read(count * 12288)[:4])[0]
    if first == 9 or (first == 8 and not os.path.exists("ONCE")):
        open("ONCE", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if first == 7:
        time.sleep(60)
    if first == 6:
        tell({"error": {"kind": "RuntimeError", "message": "broken"}})
    else:
        tell({"shape": [count, 10]}, struct.pack("<f", first) * (10 * count))
'''


@pytest.fixture
def stand_in(serving, tmp_path, monkeypatch):
    """`with stand_in(...) as (service, port)`: a server that keeps processes of the script above, which look for files in `tmp_path`."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keeper.workers, "command", lambda *_: [sys.executable, "-S", str(script)])
    monkeypatch.setattr(keeper, "PAUSE_SECONDS", 0.01)
    return lambda **options: serving(keeper=Keeper, **options)


def value(first: float, request_of) -> bytes:
    return request_of(np.full((1, 3, 32, 32), first, np.float32))


def until(condition, seconds: float = 20):
    """Wait for what is to become true, and give it."""
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends
        time.sleep(0.01)
    return found


def refuses(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) != 0


def restarts(ask, port: int) -> float:
    return float(re.search(rb"^triptych_worker_restarts_total (\S+)$", ask(port, "GET", "/metrics")[2], re.M)[1])


def test_a_batch_that_a_process_took_with_it_is_computed_by_the_next(stand_in, ask, request_of):
    with stand_in() as (service, port):
        status, _, answer = ask(port, "POST", INFER, value(8, request_of))
        assert (status, answer["outputs"][0]["data"]) == (200, [8.0] * 10)
        assert restarts(ask, port) == 1
        assert service.ready


def test_a_batch_that_kills_is_not_computed_a_third_time(stand_in, ask, request_of, tmp_path):
    with stand_in() as (_, port):
        status, headers, answer = ask(port, "POST", INFER, value(9, request_of))
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert "ended before it had an answer" in answer["error"]
        assert ask(port, "POST", INFER, value(1, request_of))[0] == 200, "others go on"
        assert (tmp_path / "BORN").read_text() == "xxx"


def test_a_batch_that_waits_behind_one_that_kills_is_answered(stand_in, ask, request_of):
    """Each batch meets two processes; the one that was never begun has met none."""
    with stand_in(max_batch=1) as (_, port), ThreadPoolExecutor(9) as clients:
        killer = clients.submit(ask, port, "POST", INFER, value(9, request_of))
        others = [clients.submit(ask, port, "POST", INFER, value(first, request_of)) for first in (1, 2, 3, 4, 5) for _ in range(2)]
        assert killer.result()[0] == 503
        answers = [each.result() for each in others]
        assert [status for status, _, _ in answers] == [200] * 10
        assert [answer["outputs"][0]["data"][0] for _, _, answer in answers] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5], "each its own"


def test_a_process_that_hangs_is_replaced(stand_in, ask, request_of):
    with stand_in(request_seconds=0.4) as (_, port):
        assert ask(port, "POST", INFER, value(7, request_of))[0] == 504
        until(lambda: restarts(ask, port) >= 1)
        until(lambda: ask(port, "POST", INFER, value(1, request_of))[0] == 200)


def test_what_the_runtime_raises_ends_nothing(stand_in, ask, request_of):
    with stand_in() as (_, port):
        assert ask(port, "POST", INFER, value(6, request_of))[0] == 500
        assert ask(port, "POST", INFER, value(1, request_of))[0] == 200
        assert restarts(ask, port) == 0


@pytest.mark.parametrize(("file", "error", "born"), [("DIE", NoWorker, "xxx"), ("REFUSE", InputRefused, "x")])
def test_a_server_whose_model_does_not_start_does_not_start(stand_in, tmp_path, file, error, born):
    (tmp_path / file).touch()
    with pytest.raises(error) as raised, stand_in():
        pass
    assert (tmp_path / "BORN").read_text() == born, "what was refused once would be refused again"
    assert raised.value.exit_code == {"DIE": 1, "REFUSE": 8}[file]


@pytest.mark.parametrize(("file", "error"), [("DIE", NoWorker), ("REFUSE", InputRefused)])
def test_a_server_whose_model_does_not_come_back_answers_and_ends(stand_in, ask, request_of, tmp_path, file, error):
    with contextlib.ExitStack() as stack:
        _, port = stack.enter_context(stand_in())
        (tmp_path / file).touch()
        status, headers, _ = ask(port, "POST", INFER, value(8, request_of))
        assert (status, int(headers["retry-after"])) == (503, 1)
        until(lambda: refuses(port))
        with pytest.raises(error):
            stack.close()


def worker_of(server: subprocess.Popen[bytes]) -> int:
    """The process of the model, or 0."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return int(children[0]) if children else 0


def libraries(pid: int) -> set[str]:
    """Which of these are loaded into a process."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {name for name in ("onnxruntime", "tensorflow", "torch", "jaxlib") if f"/{name}/" in maps}


def test_processes_killed_under_load_are_replaced(exported, started, ask, images, request_of, logits, run, tmp_path):
    """And every request is answered, as if nothing had happened."""
    server, port = started(exported, tmp_path / "log")
    assert (libraries(server.pid), libraries(worker_of(server))) == (set(), {"onnxruntime"})
    statuses, wrong, ends = Counter[int](), [], threading.Event()
    expected = run(images(2))

    def client() -> None:
        while not ends.is_set():
            status, _, answer = ask(port, "POST", INFER, request_of(images(2)))
            statuses[status] += 1
            if status == 200 and scaled_error(logits(answer), expected) > 1e-6:
                wrong.append(answer)

    clients = [threading.Thread(target=client) for _ in range(8)]
    for each in clients:
        each.start()
    for _ in range(3):
        killed, before = until(lambda: worker_of(server)), statuses.total()
        os.kill(killed, signal.SIGKILL)
        until(lambda: ask(port, "GET", "/v2/health/ready")[0] == 503)
        until(lambda: ask(port, "GET", "/v2/health/ready")[0] == 200)
        assert worker_of(server) not in (0, killed)
        until(lambda before=before: statuses.total() > before + 20)
    ends.set()
    for each in clients:
        each.join(30)
    assert (set(statuses), wrong) == ({200}, [])
    assert restarts(ask, port) == 3
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [event["code"] for event in events if event["event"] == "worker_ended"] == [-9] * 3
    last = worker_of(server)
    server.kill()
    server.wait(20)
    until(lambda: not Path(f"/proc/{last}").exists())


def test_a_saved_model_is_served_by_tensorflow_in_the_workers_process_alone(saved_model, started, ask, request_of, logits, tmp_path):
    directory, computed = saved_model
    server, port = started(directory, tmp_path / "log")
    given = np.random.default_rng(3).standard_normal((3, 32, 32, 3), dtype=np.float32)
    status, _, answer = ask(port, "POST", INFER, request_of(given))
    assert status == 200
    assert scaled_error(logits(answer), computed(given)) <= 1e-6
    assert ask(port, "GET", "/v2/models/resnet20")[2]["platform"] == "tensorflow_savedmodel"
    assert libraries(server.pid) == set()
    assert "tensorflow" in libraries(worker_of(server))
    assert artefact.load(directory).shape == (32, 32, 3)
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
