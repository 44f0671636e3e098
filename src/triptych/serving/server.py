"""The server's process: uvicorn around the routes, and a graceful end on SIGTERM and SIGINT."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from triptych.core.errors import UsageError
from triptych.serving import artefact, logs
from triptych.serving.app import Service, application
from triptych.serving.connection import Connection
from triptych.serving.options import Options


class Server(uvicorn.Server):
    """uvicorn's server, which drains on a signal and then ends as if nobody had asked: the process's exit code is 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @property
    def port(self) -> int:
        """The port it listens on, once started."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The requests that are there finish; a second interrupt from the keyboard does not wait for them."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        self._service.open = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    async def serve(self, sockets: list[Any] | None = None) -> None:
        """From the model's start to its end, which is this server's as well. Raises what ended it, if that was not a signal."""
        await self._service.start()
        self._service.model.kept.add_done_callback(lambda _: self.handle_exit(signal.SIGTERM, None))
        try:
            await super().serve(sockets)
        finally:
            await self._service.stop()

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        served, versions = self._service.served, self._service.model.versions
        logs.event("ready", url=f"http://{self.config.host}:{self.port}", model=served.name, source=served.source, versions=versions)

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Stop listening, finish what is there, and say so."""
        logs.event("draining", seconds=self.config.timeout_graceful_shutdown)
        await super().shutdown(sockets)
        logs.event("ended")


def server(service: Service, host: str, port: int) -> Server:
    """A server that has not started."""

    class Connections(Connection):
        """Connections of this server."""

        head_seconds = service.options.head_seconds

    config = uvicorn.Config(
        application(service), host=host, port=port, loop="asyncio", http=Connections, ws="none", lifespan="off", log_config=None,
        access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=service.options.drain_seconds,
    )  # fmt: skip
    return Server(config, service)


def run(directory: Path, host: str, port: int, options: Options) -> None:
    """Serve until a signal ends it.

    Raises what `artefact.load` does, UsageError when the address cannot be had, and NoWorker when the model's process cannot be kept alive.
    """
    logs.configure()
    service = Service(artefact.load(directory), options)
    try:
        server(service, host, port).run()
    except SystemExit:  # uvicorn's word for an address that is taken, which it has logged
        raise UsageError(f"cannot listen on {host}:{port}; choose another --port or --host") from None
