"""The model's process, from the server's side: it is replaced when it ends, and a batch that it took with it is computed again."""

from __future__ import annotations

import asyncio
import contextlib
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Sequence
from time import perf_counter
from typing import Any, Protocol, TypeVar

import numpy as np

from triptych.core import environment, errors, workers
from triptych.core.conversation import Failed, available_threads, numerics
from triptych.core.errors import TriptychError
from triptych.serving import logs
from triptych.serving.artefact import Artefact
from triptych.serving.metrics import Metrics
from triptych.serving.options import Options, busy

STARTS = 3
"""How many processes in a row may end before they have computed anything; then the server ends, too."""
PAUSE_SECONDS = 1.0
"""Before the second of them; before the third twice as much."""
TRIES = 2
"""How many processes a batch may meet: inference changes nothing, so that it can be done again, but a batch may be what kills."""

Result = TypeVar("Result")


class Ended(Exception):
    """The model's process is gone, at the batch that it had `begun` or while that waited for the one before."""

    def __init__(self, reason: str, *, begun: bool = True) -> None:
        super().__init__(reason)
        self.begun = begun


class NoWorker(TriptychError):
    """The model's process cannot be kept alive."""


class Model(Protocol):
    """What computes batches. `kept` is done when it never will again; its exception says why."""

    kept: asyncio.Future[None]

    @property
    def ready(self) -> bool:
        """Whether it would compute now."""
        ...

    @property
    def versions(self) -> dict[str, str]:
        """Of the runtime."""
        ...

    async def start(self) -> None:
        """Be ready to compute."""

    def run(self, parts: Sequence[np.ndarray]) -> Awaitable[np.ndarray]:
        """Begin on arrays of images that make one batch of N; its logits (N, classes) are awaited."""

    async def stop(self) -> None:
        """End."""


class Worker:
    """One process, `triptych.serving.worker`. It computes one batch after the other."""

    def __init__(self, process: Process, seconds: float) -> None:
        self.process, self._seconds = process, seconds
        self.told: dict[str, Any] = {}
        self._listening = asyncio.create_task(self._listen())
        self._last: asyncio.Task[np.ndarray] | None = None

    @classmethod
    async def start(cls, served: Artefact, options: Options) -> Worker:
        """A process that has opened the artefact and has computed the smallest and the largest batch.

        What a runtime allocates and compiles first is there before the first request. Raises Ended, and what the process refused.
        """
        line = workers.command("triptych.serving.worker", [str(served.directory)])
        env = environment.inherited() | numerics(available_threads())
        worker = cls(await asyncio.create_subprocess_exec(*line, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=env), options.start_seconds)
        try:
            worker.told = await worker._in_time(worker._answer())
            for size in (1, options.max_batch):
                await worker.send([np.zeros((size, *served.shape), np.float32)])
        except BaseException:
            await worker.stop()
            raise
        worker._seconds = options.hung_seconds
        return worker

    def send(self, parts: Sequence[np.ndarray]) -> Awaitable[np.ndarray]:
        """Have it compute a batch after those before; its logits are awaited. Raises Ended when they do not come, Failed for what the
        runtime raised.
        """
        assert self.process.stdin is not None
        head = json.dumps({"images": sum(map(len, parts))}).encode() + b"\n"
        self.process.stdin.writelines([head, *(np.ascontiguousarray(part, np.float32).data for part in parts)])
        self._last = asyncio.create_task(self._logits_after(self._last))
        return self._last

    async def _logits_after(self, before: asyncio.Task[np.ndarray] | None) -> np.ndarray:
        if before is not None:  # answers come in the order of the batches
            await asyncio.wait([before])
            if not before.cancelled() and isinstance(before.exception(), Ended):
                raise Ended("it ended at the batch before", begun=False)
        return await self._in_time(self._logits())

    async def _logits(self) -> np.ndarray:
        assert self.process.stdout is not None
        shape = (await self._answer())["shape"]
        values = await self.process.stdout.readexactly(4 * shape[0] * shape[1])
        return np.frombuffer(values, np.float32).reshape(shape)

    async def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(await self.process.stdout.readuntil())
        if "error" in answer:
            raise _error(**answer["error"])
        return answer

    async def _in_time(self, answer: Awaitable[Result]) -> Result:
        """An answer of the process. Raises Ended when that ends instead, or when it takes too long, which ends it."""
        try:
            async with asyncio.timeout(self._seconds):
                return await answer
        except TimeoutError:
            self._kill()
            raise Ended(f"it had no answer within {self._seconds:g} s, and was killed") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Ended(f"it ended with code {await self.process.wait()}") from None

    async def _listen(self) -> None:
        """Put what it prints into the log."""
        assert self.process.stderr is not None
        while said := await self.process.stderr.read(4096):
            logs.event("worker_said", pid=self.process.pid, text=said.decode(errors="replace"))

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def stop(self) -> None:
        """End the process; it has nothing to save."""
        self._kill()
        await self.process.wait()
        await self._listening


def _error(kind: str, message: str) -> TriptychError:
    """What the process raised: one of our own errors with its exit code, or Failed."""
    known = getattr(errors, kind, None)
    return known(message) if isinstance(known, type) and issubclass(known, TriptychError) else Failed(kind, message)


class Keeper:
    """Keeps one worker alive. All methods belong to one event loop."""

    def __init__(self, served: Artefact, options: Options, metrics: Metrics) -> None:
        self._served, self._options, self._metrics = served, options, metrics
        self._up = asyncio.Event()
        self._worker: Worker
        self._start_seconds = 0.0
        self.kept: asyncio.Future[None]

    @property
    def ready(self) -> bool:
        """Whether a worker is there."""
        return self._up.is_set() and not self.kept.done()

    @property
    def versions(self) -> dict[str, str]:
        """Of the runtime."""
        versions: dict[str, str] = self._worker.told["versions"]
        return versions

    async def start(self) -> None:
        """Start a worker, and keep one. Raises what the worker refused, or NoWorker when it ends time and again."""
        await self._begin()
        self.kept = asyncio.create_task(self._keep())

    def run(self, parts: Sequence[np.ndarray]) -> Awaitable[np.ndarray]:
        """As `Model.run`, in the next process if this one ends. Raises Failed for what the runtime raised, and Refused (503) when no
        process gives an answer.
        """
        return self._logits(parts, self._sent(parts) if self.ready else None)

    def _sent(self, parts: Sequence[np.ndarray]) -> tuple[Worker, Awaitable[np.ndarray]]:
        return self._worker, self._worker.send(parts)

    async def _logits(self, parts: Sequence[np.ndarray], sent: tuple[Worker, Awaitable[np.ndarray]] | None) -> np.ndarray:
        tries = 0
        while tries < TRIES:
            if sent is None:
                await self._up.wait()
                if self.kept.done():
                    break
                sent = self._sent(parts)
            worker, logits = sent
            try:
                return await logits
            except Ended as error:
                tries += error.begun
                if worker is self._worker:
                    self._up.clear()
                sent = None
        raise busy("the process of the model ended before it had an answer", self._start_seconds)

    async def stop(self) -> None:
        """End the worker. Raises NoWorker, or what a worker refused, when that has ended the keeping."""
        self.kept.cancel()
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await self.kept
        finally:
            await self._worker.stop()

    async def _keep(self) -> None:
        try:
            while True:
                code = await self._worker.process.wait()
                self._up.clear()
                self._metrics.restarts.inc()
                logs.event("worker_ended", pid=self._worker.process.pid, code=code)
                await self._worker.stop()
                await self._begin()
        finally:
            self._up.set()  # nobody waits for a worker that will not come

    async def _begin(self) -> None:
        """A new worker, after some attempts. What one refuses, the next would refuse as well."""
        for attempt in range(1, STARTS + 1):
            began = perf_counter()
            try:
                self._worker = await Worker.start(self._served, self._options)
            except Ended as error:
                logs.event("worker_failed", attempt=attempt, of=STARTS, reason=str(error))
                if attempt == STARTS:
                    raise NoWorker(f"the process of the model did not start, {STARTS} times: {error}; the log has its words") from None
            else:
                self._start_seconds = perf_counter() - began
                logs.event("worker", pid=self._worker.process.pid, seconds=round(self._start_seconds, 3), **self._worker.told)
                self._up.set()
                return
            await asyncio.sleep(attempt * PAUSE_SECONDS)
