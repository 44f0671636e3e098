"""Hosts: where worker processes run that are not our children, one a framework, in containers of `compose.yaml`. Standard library only.

`TRIPTYCH_HOSTS=pytorch=/hosts/pytorch.sock,jax=/hosts/jax.sock` names them. A host (`core/listen.py`) is handed the worker's standard
streams as open files, through its Unix socket: they are pipes and a log of ours, as a child's would be, and nothing is relayed. What
worker and orchestrator tell each other in files lies in the run directory, which every container mounts at the same path.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait as readable  # not select, which knows no file descriptor above 1,023
from pathlib import Path
from typing import IO, Any

from triptych.core.errors import TriptychError, UsageError

VARIABLE = "TRIPTYCH_HOSTS"
SCHEMA = 1
WAIT_SECONDS = 60.0
"""How long a host may take to listen: containers start together."""
LONGEST_LINE = 2**20


def table() -> dict[str, Path]:
    """The hosts' sockets by framework, {} without TRIPTYCH_HOSTS. UsageError for an entry that is not NAME=/PATH."""
    entries = [entry.strip() for entry in os.environ.get(VARIABLE, "").split(",") if entry.strip()]
    found = {name.strip(): Path(path.strip()) for name, _, path in (entry.partition("=") for entry in entries)}
    for name, path in found.items():
        if not name or not path.is_absolute():
            raise UsageError(f"{VARIABLE} is a comma-separated list of FRAMEWORK=/ABSOLUTE/SOCKET; given {os.environ[VARIABLE]!r}")
    return found


def hello(framework: str) -> dict[str, Any]:
    """What the host of `framework` says of itself: `versions` of its libraries and `code_sha256`. Asked once a process.

    Raises TriptychError when nobody listens within `WAIT_SECONDS`.
    """
    return _hello(framework, table()[framework])


@functools.cache
def _hello(framework: str, path: Path) -> dict[str, Any]:
    with _connect(framework, path) as connection:
        send_line(connection, {"schema": SCHEMA, "do": "hello"})
        return _answer(framework, connection)


def versions() -> dict[str, str]:
    """Library versions of all hosts; of those that several have, the first host's."""
    found: dict[str, str] = {}
    for name in table():
        found = {**hello(name)["versions"], **found}
    return found


def _connect(framework: str, path: Path) -> socket.socket:
    end = time.monotonic() + WAIT_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            if time.monotonic() > end or not isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
                start = f"start it with: triptych worker {framework} --listen {path}"
                raise TriptychError(f"the host of {framework} cannot be reached at {path} ({error.strerror or error}); {start}") from None
            time.sleep(0.1)
        else:
            return connection


def _answer(framework: str, connection: socket.socket) -> dict[str, Any]:
    line = read_line(connection)
    answer: dict[str, Any] = json.loads(line) if line else {"error": "it closed the connection"}
    if "error" in answer:
        raise TriptychError(f"the host of {framework} refused: {answer['error']}")
    return answer


def send_line(connection: socket.socket, data: Mapping[str, Any], files: Sequence[int] = ()) -> None:
    """A JSON object as one line, and open files with it."""
    line = json.dumps(data).encode() + b"\n"
    sent = socket.send_fds(connection, [line], files) if files else 0
    if sent < len(line):  # nothing, sent to a host that has refused already, is an error
        connection.sendall(line[sent:])


def read_line(connection: socket.socket) -> bytes:
    """One line, and not a byte more, so that `readable` still tells whether there is another; b"" at its end."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < LONGEST_LINE:
        try:
            byte = connection.recv(1)
        except ConnectionResetError:  # the other side ended with something of ours unread
            return b""
        if not byte:
            return b""
        line += byte
    return bytes(line)


class Hosted:
    """A worker process at a host, with what of `subprocess.Popen` orchestrators use. It ends when we do: the host sees our socket close."""

    def __init__(self, connection: socket.socket, pid: int, stdin: IO[bytes] | None, stdout: IO[bytes] | None) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None
        self._connection = connection

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.returncode is None and readable([self._connection], 0):
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not readable([self._connection], timeout):
                raise subprocess.TimeoutExpired(f"worker process {self.pid}", timeout or 0.0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def _end(self) -> None:
        line = read_line(self._connection)
        # A host that is gone took its workers with it.
        self.returncode = int(json.loads(line)["code"]) if line else -signal.SIGKILL
        self._connection.close()

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it (SIGKILL)."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            try:
                send_line(self._connection, {"signal": int(number)})
            except BrokenPipeError:
                self.wait()

    def __enter__(self) -> Hosted:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout):
            if stream is not None:
                stream.close()
        self.wait()


def start(
    module: str, framework: str, arguments: Sequence[str], *, settings: Mapping[str, str], log: IO[bytes], stdin: bool, stdout: bool,
    cores: Sequence[int],
) -> Hosted:  # fmt: skip
    """`workers.start` at a host. TriptychError when it cannot be reached or refuses."""
    connection = _connect(framework, table()[framework])
    asked = {
        "schema": SCHEMA, "do": "start", "module": module, "arguments": list(arguments), "settings": dict(settings),
        "cores": list(cores), "directory": os.getcwd(),
    }  # fmt: skip
    ours, theirs = _streams(log, stdin, stdout)
    try:
        send_line(connection, asked, [*theirs, log.fileno()])
        pid = _answer(framework, connection)["pid"]
    except BaseException:
        for resource in (connection, *ours):
            if resource is not None:
                resource.close()
        raise
    finally:
        for descriptor in theirs:
            os.close(descriptor)
    return Hosted(connection, pid, *ours)


def _streams(log: IO[bytes], stdin: bool, stdout: bool) -> tuple[tuple[IO[bytes] | None, IO[bytes] | None], list[int]]:
    """Our ends of the worker's standard input and output, where they are pipes, and its own ends."""
    their_in, our_in = os.pipe() if stdin else (os.open(os.devnull, os.O_RDONLY), None)
    our_out, their_out = os.pipe() if stdout else (None, os.dup(log.fileno()))
    ours = None if our_in is None else os.fdopen(our_in, "wb"), None if our_out is None else os.fdopen(our_out, "rb")
    return ours, [their_in, their_out]
