"""A host: listens on a Unix socket and starts worker processes of one framework for whoever may open it (`triptych worker`).

It starts modules of `workers.MODULES` and nothing else. Each connection is one process: a line that asks for it, with three open files
that become its standard streams; then signals one way and the exit code the other. When the connection closes, the process is killed.
Between requests the host sleeps in `poll`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait as readable  # not select, which knows no file descriptor above 1,023
from pathlib import Path
from typing import Any

from triptych.core import contract, environment
from triptych.core.errors import StorageError, UsageError
from triptych.core.hosts import LONGEST_LINE, SCHEMA, read_line, send_line
from triptych.core.workers import MODULES, command

SIGNALS = (signal.SIGTERM, signal.SIGKILL)


def serve(framework: str, path: Path, ready: Callable[[], None] = lambda: None) -> None:
    """Listen at `path` until the process is ended; the socket is then removed, and every worker killed. `ready` is called once it listens.

    Raises FrameworkMissing, UsageError when another host listens there or the path is too long, StorageError when it cannot be made.
    """
    contract.check_installed(framework)
    running: set[subprocess.Popen[bytes]] = set()
    with _listener(path) as listener, _woken() as signalled:
        try:
            ready()
            while signalled not in readable([listener, signalled]):
                connection, _ = listener.accept()
                threading.Thread(target=_attend, args=(connection, running), daemon=True).start()
        finally:
            path.unlink(missing_ok=True)
            for process in running.copy():
                process.kill()


@contextlib.contextmanager
def _woken() -> Iterator[socket.socket]:
    """A socket that can be read once a signal came: one that arrives just before a system call does not interrupt it."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno())
    with ours, theirs:
        try:
            yield ours
        finally:
            signal.set_wakeup_fd(before)


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)  # who can open it runs processes as this user
        listener.listen()
    except BaseException as error:
        listener.close()
        if not isinstance(error, OSError):
            raise
        if error.errno is None:  # "AF_UNIX path too long"
            raise UsageError(f"--listen {path}: {error}; name a path of at most some 100 bytes") from None
        raise StorageError(
            f"cannot listen at {path}: {(error.strerror or str(error)).lower()}; name another place with --listen"
        ) from error
    return listener


def _remove_stale(path: Path) -> None:
    """Remove a socket at which nobody listens any more: a container that was killed left it."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise UsageError(f"--listen {path} exists and is no socket; name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.connect(str(path))
        raise UsageError(f"another host listens at {path} already; stop it, or name another path")
    path.unlink(missing_ok=True)


def _attend(connection: socket.socket, running: set[subprocess.Popen[bytes]]) -> None:
    """One connection, to its end."""
    with connection, contextlib.suppress(ConnectionError):
        try:
            asked, files = _request(connection)
            answer = _hello() if asked["do"] == "hello" else None
            process = None if answer else _started(asked, files)
        except (OSError, KeyError, TypeError, ValueError, UsageError) as error:
            send_line(connection, {"error": f"{type(error).__name__}: {error}"})
            return
        if process is None:
            send_line(connection, answer or {})
            return
        running.add(process)
        send_line(connection, {"pid": process.pid})
        threading.Thread(target=_obey, args=(connection, process), daemon=True).start()
        code = process.wait()
        running.discard(process)
        send_line(connection, {"code": code})
        connection.shutdown(socket.SHUT_RDWR)  # ends `_obey`, which a mere close would leave in its read


def _request(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The first line, and the open files that came with it."""
    data, files, _, _ = socket.recv_fds(connection, LONGEST_LINE, 3)
    while data and not data.endswith(b"\n") and len(data) < LONGEST_LINE:
        data += connection.recv(LONGEST_LINE)
    asked = json.loads(data)
    if asked["schema"] != SCHEMA:
        raise UsageError(f"schema {asked['schema']!r} of a request; this host speaks schema {SCHEMA}: build all images from one checkout")
    return asked, list(files)


def _hello() -> dict[str, Any]:
    return {"versions": environment.versions(), "code_sha256": environment.code_hash()}


def _started(asked: dict[str, Any], files: list[int]) -> subprocess.Popen[bytes]:
    try:
        if asked["module"] not in MODULES:
            raise UsageError(f"a host starts {', '.join(MODULES)}; asked for {asked['module']!r}")
        if len(files) != 3:
            raise UsageError(f"a worker needs three open files; given {len(files)}")
        if not Path(asked["directory"]).is_dir():
            raise UsageError(f"there is no {asked['directory']} here; mount the run directory at the same path in every container")
        if asked["cores"]:
            # Of this thread, which exists for this one process: a child inherits it.
            os.sched_setaffinity(0, asked["cores"])
        return subprocess.Popen(
            command(asked["module"], asked["arguments"]), stdin=files[0], stdout=files[1], stderr=files[2], cwd=asked["directory"],
            env=environment.inherited() | asked["settings"],
        )  # fmt: skip
    finally:
        for descriptor in files:
            os.close(descriptor)


def _obey(connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """Pass signals on, until the connection closes: then nobody waits for the process any more."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        while line := read_line(connection):
            number = json.loads(line)["signal"]
            if number in SIGNALS:
                process.send_signal(number)
    process.kill()
