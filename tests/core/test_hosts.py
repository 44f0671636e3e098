"""Workers at a host: the streams, exit code and signals of a child; refusals by name; a proof, turns and a training through hosts."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from triptych.core import catalog, contract, environment, hosts, listen, workers
from triptych.core.conversation import Process
from triptych.core.errors import FrameworkMissing, StorageError, TriptychError, UsageError
from triptych.parity.certify import certify
from triptych.training.job import Job, standard_recipe
from triptych.training.worker import run_worker

# Modules of the standard library stand in for workers: one runs a statement, one reads its input to the end.
STAND_INS = ("timeit", "json.tool")
PROGRAM = """
import sys
from triptych import cli
from triptych.core import listen
listen.MODULES = (*listen.MODULES, {stand_ins})
cli.main(["worker", sys.argv[1], "--listen", sys.argv[2]])
"""


class Hosts:
    """Hosts that are started, and stopped at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, []

    def start(self, framework: str) -> Path:
        """A host of `framework` that listens; its socket."""
        path = self.folder / f"{framework}-{len(self.running)}.sock"
        program = PROGRAM.format(stand_ins=", ".join(map(repr, STAND_INS)))
        host = subprocess.Popen([sys.executable, "-c", program, framework, str(path)], stdout=subprocess.PIPE, text=True)
        self.running.append(host)
        assert host.stdout is not None
        assert host.stdout.readline() == f"{framework}: listening at {path}\n"
        return path


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Starts hosts that live as long as this file's tests."""
    kept = Hosts(tmp_path_factory.mktemp("hosts"))
    yield kept
    for host in kept.running:
        host.terminate()
        host.wait(60)
        assert host.stdout is not None
        host.stdout.close()


@pytest.fixture(scope="module")
def sockets(started: Hosts) -> dict[str, Path]:
    """A host of each of two installed frameworks."""
    return {name: started.start(name) for name in contract.installed()[:2]}


@pytest.fixture
def framework(sockets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """The first of those frameworks; TRIPTYCH_HOSTS names the hosts."""
    monkeypatch.setenv(hosts.VARIABLE, ",".join(f"{name}={path}" for name, path in sockets.items()))
    return next(iter(sockets))


@pytest.fixture
def start(framework: str, tmp_path: Path) -> Iterator[Callable[..., hosts.Hosted]]:
    """Start a stand-in at the host; its log is `log` in the test's folder."""
    begun: list[hosts.Hosted] = []

    def run(module: str, *arguments: str, **given: object) -> hosts.Hosted:
        with (tmp_path / "log").open("wb") as log:
            process = workers.start(module, framework, arguments, log=log, **{"settings": {}, **given})
        assert isinstance(process, hosts.Hosted)
        begun.append(process)
        return process

    yield run
    for process in begun:
        process.kill()
        process.__exit__()


def gone(pid: int) -> bool:
    """Whether a process has ended within a few seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_streams_and_exit_code_are_those_of_a_child(start, tmp_path):
    process = start("json.tool", "--compact", stdin=True, stdout=True)
    assert process.poll() is None
    process.stdin.write(b'{ "a": 1 }')
    process.stdin.close()
    assert process.stdout.read() == b'{"a":1}\n'
    assert process.wait() == process.poll() == 0
    failed = start("json.tool", stdin=True)
    failed.stdin.write(b"{")
    failed.stdin.close()
    assert failed.wait() == 1
    assert b"Expecting property name" in (tmp_path / "log").read_bytes(), "without a pipe the log takes both"


def test_settings_cores_and_folder_are_the_orchestrators(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    statement = "import os; print(os.environ['SET'], os.getcwd(), sorted(os.sched_getaffinity(0)))"
    core = sorted(os.sched_getaffinity(0))[-1]
    process = start("timeit", "-n1", "-r1", statement, settings={"SET": "here"}, cores=[core], stdout=True)
    assert process.stdout.readline().decode() == f"here {tmp_path} [{core}]\n"
    unbound = start("timeit", "-n1", "-r1", statement, settings={"SET": "x"}, stdout=True)
    assert unbound.stdout.readline().decode().endswith(f"{sorted(os.sched_getaffinity(0))}\n"), "one process' cores are not the next one's"


def test_signals_reach_it_and_a_wait_may_end_first(start):
    process = start("json.tool", stdin=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    process.kill()  # of no effect any more, and no error
    killed = start("json.tool", stdin=True)
    killed.kill()
    assert killed.wait(60) == -signal.SIGKILL


def test_it_ends_when_nobody_waits_for_it(start):
    process = start("json.tool", stdin=True)
    os.kill(process.pid, 0)
    process._connection.close()
    process.returncode = 0
    assert gone(process.pid)


def test_when_the_host_is_gone_so_is_the_worker(started, monkeypatch, tmp_path):
    name = contract.installed()[0]
    monkeypatch.setenv(hosts.VARIABLE, f"{name}={started.start(name)}")
    with (tmp_path / "log").open("wb") as log:
        process = workers.start("json.tool", name, [], settings={}, log=log, stdin=True)
    started.running[-1].terminate()
    with process:
        assert process.wait(60) == -signal.SIGKILL
    assert gone(process.pid)


def test_an_end_with_something_unread_is_an_end():
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(b"a signal")
        theirs.close()
        assert hosts.read_line(ours) == b""


# Refusals


def test_a_host_starts_workers_and_nothing_else(framework, tmp_path):
    with (
        (tmp_path / "log").open("wb") as log,
        pytest.raises(TriptychError, match=r"a host starts triptych\.parity\.worker.*'http\.server'"),
    ):
        workers.start("http.server", framework, [], settings={}, log=log)


def test_a_run_directory_that_is_not_shared_is_named(framework, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/not/mounted")
    with (tmp_path / "log").open("wb") as log, pytest.raises(TriptychError, match="no /not/mounted here; mount the run directory"):
        workers.start("timeit", framework, [], settings={}, log=log)


@pytest.mark.parametrize("line", ["{}", "[]", "no JSON", '{"schema": 2, "do": "hello"}', '{"schema": 1, "do": "start"}'])
def test_a_strange_request_is_answered_and_the_host_goes_on(sockets, framework, line):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(sockets[framework]))
        connection.sendall(line.encode() + b"\n")
        assert "error" in json.loads(hosts.read_line(connection))
    assert hosts._hello.__wrapped__(framework, sockets[framework])["code_sha256"] == environment.code_hash()


def test_other_code_at_a_host_is_refused(framework, monkeypatch):
    workers._check_code.cache_clear()
    monkeypatch.setattr(environment, "code_hash", lambda: "other")
    with pytest.raises(UsageError, match=f"the host of {framework} has other code"):
        workers.available()


def test_a_silent_host_is_named_with_what_starts_it(monkeypatch, tmp_path):
    monkeypatch.setattr(hosts, "WAIT_SECONDS", 0.0)
    monkeypatch.setenv(hosts.VARIABLE, f"jax={tmp_path}/none.sock")
    with pytest.raises(TriptychError, match=r"cannot be reached at .* start it with: triptych worker jax --listen"):
        workers.available()


@pytest.mark.parametrize("text", ["jax", "jax=relative.sock", "=/x.sock"])
def test_a_table_of_hosts_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(hosts.VARIABLE, text)
    with pytest.raises(UsageError, match="FRAMEWORK=/ABSOLUTE/SOCKET"):
        workers.available()


def test_where_a_host_may_listen(sockets, framework, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="another host listens"):
        listen.serve(framework, sockets[framework])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="no socket"):
        listen.serve(framework, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UsageError, match="too long"):
        listen.serve(framework, tmp_path / ("x" * 200))
    with pytest.raises(StorageError, match="cannot listen"):
        listen.serve(framework, tmp_path / "file" / "x.sock")
    monkeypatch.setattr(contract, "check_installed", lambda name: (_ for _ in ()).throw(FrameworkMissing(name)))
    with pytest.raises(FrameworkMissing):
        listen.serve(framework, tmp_path / "x.sock")


def test_a_socket_that_a_killed_host_left_is_replaced(tmp_path):
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listen._listener(path):
        assert path.stat().st_mode & 0o777 == 0o600


# The workers themselves


def test_hosts_count_as_installed_and_tell_their_versions(framework, sockets, monkeypatch):
    monkeypatch.setattr(contract, "installed", list)
    monkeypatch.setattr(environment, "_version", lambda names: None)
    assert workers.available() == list(sockets)
    assert environment.versions()["numpy"], "the host's, for what is reused rests on it"
    with pytest.raises(UsageError, match="unknown framework"):
        workers.check_available("theano")


def test_a_proof_through_hosts(framework, sockets, tmp_path, monkeypatch):
    if len(sockets) < 2:
        pytest.skip("a proof needs two frameworks")
    monkeypatch.setattr(workers, "command", None)  # no worker is a child of ours
    spec = catalog.get_spec("mlp", hidden=[8], image_size=8)
    made = certify("mlp", spec, None, tuple(sockets), ("float64",), "cpu", tmp_path / "run", lambda text: None, {"float64": (1, 3, 6)})
    assert (made["verdict"], [row["number"] for row in made["rungs"]]) == ("pass", [1, 3, 6])
    assert set(made["versions"]) == set(sockets)


def test_turns_and_training_through_a_host(framework, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "command", None)
    timed = Process(framework, tmp_path / "log", {}, sorted(os.sched_getaffinity(0))[:1], 60.0)
    assert 0.0 < timed.ask("kernel")["seconds"] < 60.0
    timed.stop()
    assert timed.ended
    recipe, _ = standard_recipe(samples=899, epochs=1, batch_size=64, peak=0.1)
    told: list[dict[str, object]] = []
    result = run_worker(Job("mlp", "digits", recipe, 3), framework, tmp_path / "run", told.append)
    assert len(result["losses"]) == 3
    assert [each["step"] for each in told if "step" in each][-1] == 3


def test_a_process_with_many_open_files_waits_for_its_worker_all_the_same() -> None:
    """`select` knows no descriptor above 1,023, and a report had more than that open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this system allows fewer open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048) if soft != resource.RLIM_INFINITY else soft, hard))
    ours, theirs = socket.socketpair()
    try:
        with ours, theirs:
            high = socket.socket(fileno=fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD_CLOEXEC, 1500))
            worker = hosts.Hosted(high, 1, None, None)
            assert worker.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                worker.wait(0.01)
            theirs.sendall(b'{"code": 7}\n')
            assert worker.wait(5) == 7
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
