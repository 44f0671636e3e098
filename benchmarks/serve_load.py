"""What batching brings under load: concurrent clients, batched and unbatched servers in turns.

    .venv/bin/python benchmarks/serve_load.py DIR [--clients 32] [--rounds 6] [--seconds 8]

DIR is an artefact of `triptych export ... --to onnx`. Two servers run all the time; in a turn every client sends one image at a time to one
of them, as a binary tensor, and waits for its answer. The ratio of throughputs is by pairs of turns of one round; the order changes from
round to round. Clients and servers share the machine's cores.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from measuring import RESULTS, head, write_json
from serve_fuzz import request

from triptych.bench.script import at_least
from triptych.bench.statistics import PERCENTILES, paired_interval, percentiles
from triptych.serving import artefact

KINDS = {"batched": [], "unbatched": ["--max-batch", "1"]}
COMMAND = "benchmarks/serve_load.py"


class Served:
    """A server in a process of its own."""

    def __init__(self, directory: Path, log: Path, options: list[str]) -> None:
        command = [sys.executable, "-m", "triptych.cli", "serve", str(directory), "--port", "0", *options]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr)
        ends = time.monotonic() + 120
        while not (found := re.search(r'"url": "http://127\.0\.0\.1:(\d+)"', log.read_text())):
            if self.process.poll() is not None or time.monotonic() > ends:
                raise SystemExit(f"the server did not start: {log.read_text()[-500:]}")
            time.sleep(0.1)
        self.port = int(found[1])

    def memory(self) -> int | None:
        """Bytes that are resident now; None where the system does not tell."""
        status = Path(f"/proc/{self.process.pid}/status")
        found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
        return int(found[1]) * 1024 if found else None

    def cpu_seconds(self) -> float:
        """What its threads have computed since it started; how busy the machine is beside it hardly matters for that."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> int:
        """Drain it; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def answered(connection: socket.socket, sent: bytes) -> int:
    """Send a request on a connection that stays open; the status of its answer, which is read whole; 0 without one."""
    connection.sendall(sent)
    answer = b""
    while b"\r\n\r\n" not in answer:
        more = connection.recv(65536)
        if not more:
            return 0
        answer += more
    start, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", start, re.I)
    left = int(length[1]) - len(body) if length else 0
    while left > 0:
        more = connection.recv(left)
        if not more:
            return 0
        left -= len(more)
    return int(start[9:12])


def client(port: int, sent: bytes, ends: float, seconds: list[float], statuses: collections.Counter[int]) -> None:
    """Ask until the time is up."""
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        while time.perf_counter() < ends:
            began = time.perf_counter()
            statuses[answered(connection, sent)] += 1
            seconds.append(time.perf_counter() - began)


def turn(port: int, sent: bytes, clients: int, seconds: float) -> tuple[float, list[float], collections.Counter[int]]:
    """Answers a second of all clients together, seconds of each answer, and statuses."""
    found: list[tuple[list[float], collections.Counter[int]]] = [([], collections.Counter()) for _ in range(clients)]
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client, port, sent, began + seconds, *each) for each in found]:
            done.result()
    passed = time.perf_counter() - began
    latencies = [value for each, _ in found for value in each]
    return len(latencies) / passed, latencies, sum((each for _, each in found), collections.Counter())


def body_of(served: artefact.Served) -> bytes:
    """A request for one image, with binary tensors both ways."""
    image = np.random.default_rng(0).standard_normal((1, *served.shape), dtype=np.float32).tobytes()
    tensor = {"name": "images", "datatype": "FP32", "shape": [1, *served.shape], "parameters": {"binary_data_size": len(image)}}
    start = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return request(f"/v2/models/{served.name}/infer", start + image, {"inference-header-content-length": str(len(start))})


def told(rates: list[float], latencies: list[float], statuses: collections.Counter[int]) -> dict[str, Any]:
    """Of one kind of server, over all turns; a percentile is null below the samples that it needs."""
    values = {"p50": float(np.median(latencies)), **percentiles(latencies)}
    return {
        "answers_per_second": rates, "median_answers_per_second": statistics.median(rates), "samples": len(latencies),
        "seconds": values, "samples_needed": {name: needed for name, (_, needed) in PERCENTILES.items()},
        "statuses": {str(status): count for status, count in statuses.items()},
    }  # fmt: skip


def computed(model: artefact.Served) -> dict[str, float]:
    """Seconds an image in the runtime alone, the fastest of 15 calls, by the size of the batch: what batching can win there."""
    found = {}
    for size in (1, 2, 4, 8, 16, 32):
        batch, seconds = np.zeros((size, *model.shape), np.float32), []
        for _ in range(16):
            began = time.perf_counter()
            model.run(batch)
            seconds.append(time.perf_counter() - began)
        found[str(size)] = min(seconds[1:]) / size
    return found


def busy_seconds(servers: dict[str, Served]) -> float:
    """What the machine's cores have computed for others than these servers and this script, since it started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ours = sum(served.cpu_seconds() for served in servers.values()) + time.process_time()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - ours


def measured(servers: dict[str, Served], sent: bytes, given: argparse.Namespace) -> dict[str, Any]:
    """The turns, and what they come to."""
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    latencies: dict[str, list[float]] = {kind: [] for kind in KINDS}
    statuses: dict[str, collections.Counter[int]] = {kind: collections.Counter() for kind in KINDS}
    spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for served in servers.values():
        turn(served.port, sent, given.clients, min(2.0, given.seconds))
    before = {kind: served.memory() for kind, served in servers.items()}
    others, started = busy_seconds(servers), time.perf_counter()
    for number in range(given.rounds):
        for kind in list(KINDS)[:: 1 if number % 2 else -1]:
            began = servers[kind].cpu_seconds()
            rate, seconds, found = turn(servers[kind].port, sent, given.clients, given.seconds)
            spent[kind].append((servers[kind].cpu_seconds() - began) / len(seconds))
            rates[kind].append(rate)
            latencies[kind] += seconds
            statuses[kind] += found
            sys.stdout.write(
                f"round {number + 1}: {kind:<10}{rate:8.1f} answers/s, {spent[kind][-1] * 1e3:.2f} ms of processor an answer\n"
            )
    others = (busy_seconds(servers) - others) / (time.perf_counter() - started) / (os.cpu_count() or 1)
    ratio, interval = paired_interval(rates["batched"], rates["unbatched"])
    rows = {kind: told(rates[kind], latencies[kind], statuses[kind]) | {"cpu_seconds_an_answer": spent[kind]} for kind in KINDS}
    memory = {kind: {"before": before[kind], "after": served.memory()} for kind, served in servers.items()}
    return {"batched_over_unbatched": ratio, "interval": interval, "rows": rows, "resident_bytes": memory, "others_share_of_cores": others}


def main() -> None:
    """Start both, load them in turns, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--clients", type=at_least(1), default=32)
    parser.add_argument("--rounds", type=at_least(2), default=6)
    parser.add_argument("--seconds", type=float, default=8.0, help="Of a turn.")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve" / "load.json")
    given = parser.parse_args()
    model = artefact.load(given.directory)
    alone, load_before = computed(model), os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="triptych-serve-") as folder:
        servers = {kind: Served(given.directory, Path(folder, f"{kind}.log"), options) for kind, options in KINDS.items()}
        try:
            found = measured(servers, body_of(model), given)
        finally:
            ended = {kind: served.end() for kind, served in servers.items()}
    command = f"{COMMAND} {given.directory.name} --clients {given.clients} --rounds {given.rounds} --seconds {given.seconds:g}"
    what = {"model": model.name, "source": model.source, "clients": given.clients, "options": KINDS, "exit_codes": ended}
    load = {"load_average_before": load_before, "load_average": os.getloadavg()}
    write_json(
        given.out,
        {**head(command), **what, **load, "threads": os.environ.get("OMP_NUM_THREADS"), "runtime_seconds_an_image": alone, **found},
    )
    sys.stdout.write(f"batched over unbatched: {found['batched_over_unbatched']:.2f} {found['interval']}\n")


if __name__ == "__main__":
    main()
