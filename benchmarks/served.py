"""Servers under load: `triptych serve` in a process of its own, and what it and its model's process spend."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

EVERY = 5.0
"""Seconds from one reading of memory to the next, and from one kill to the next."""


class Served:
    """A server in a process of its own, and the process of its model."""

    def __init__(self, directory: Path, log: Path, options: list[str]) -> None:
        command = [sys.executable, "-m", "triptych.cli", "serve", str(directory), "--port", "0", *options]
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr)
        ends = time.monotonic() + 120
        while not (found := re.search(r'"url": "http://127\.0\.0\.1:(\d+)"', log.read_text())):
            if self.process.poll() is not None or time.monotonic() > ends:
                raise SystemExit(f"the server did not start: {log.read_text()[-500:]}")
            time.sleep(0.1)
        self.port = int(found[1])

    @property
    def worker(self) -> int:
        """The process that computes now; 0 while there is none."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def memory(self) -> dict[str, int]:
        """Bytes that are resident now, of the server and of its worker."""
        return {"server": resident(self.process.pid), "worker": resident(self.worker)}

    def cpu_seconds(self) -> dict[str, float]:
        """What each of the two has computed since it started; how busy the machine is beside them hardly matters for that."""
        return {"server": computed_by(self.process.pid), "worker": computed_by(self.worker)}

    def ready(self) -> bool:
        """Whether its model's process is there."""
        with (
            contextlib.suppress(urllib.error.HTTPError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/health/ready", timeout=60),
        ):
            return True
        return False

    def metric(self, name: str) -> float:
        """One of its metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.M)
        return float(found[1]) if found else float("nan")

    def end(self) -> int:
        """Drain it; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def resident(pid: int) -> int:
    """Bytes of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def computed_by(pid: int) -> float:
    """Seconds of processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(directory: Path, kinds: dict[str, list[str]]) -> Iterator[dict[str, Served]]:
    """Servers of one artefact, drained at the end; one that does not end with code 0 is an error."""
    with tempfile.TemporaryDirectory(prefix="triptych-serve-") as folder:
        servers = {kind: Served(directory, Path(folder, f"{kind}.log"), options) for kind, options in kinds.items()}
        try:
            yield servers
        finally:
            codes = {kind: served.end() for kind, served in servers.items()}
    if any(codes.values()):
        raise SystemExit(f"a server ended with an error: {codes}")


@contextlib.contextmanager
def repeatedly(act: Callable[[float], None]) -> Iterator[None]:
    """Call `act` with the seconds since the start, every few seconds, until the block ends."""
    done, began = threading.Event(), time.perf_counter()

    def loop() -> None:
        while not done.wait(EVERY):
            act(time.perf_counter() - began)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def busy_seconds(servers: dict[str, Served]) -> float:
    """What the machine's cores have computed for others than these servers and this script, since it started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ours = sum(sum(served.cpu_seconds().values()) for served in servers.values()) + time.process_time()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - ours
