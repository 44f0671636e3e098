"""Request bodies: read up to a limit, in a limited time, and in limited memory for all of them together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from triptych.serving.metrics import Metrics
from triptych.serving.options import Options, Refused, busy

DISCARD_SECONDS = 1.0
"""How long what is sent beyond the limit is thrown away before the answer: a client that still sends would not read it."""


class Bodies:
    """What request bodies hold at the moment."""

    def __init__(self, options: Options, metrics: Metrics) -> None:
        self._options, self._metrics, self._held = options, metrics, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, counted as held until the block ends.

        Raises Refused: 413 too large, 408 too slow, 415 compressed, 503 when other bodies fill what may be held.
        """
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "compressed bodies are not taken; send it as it is")
        parts = bytearray()
        try:
            await self._fill_in_time(request, parts)
            yield bytes(parts)
        finally:
            self._hold(-len(parts))

    async def _fill_in_time(self, request: Request, parts: bytearray) -> None:
        try:
            async with asyncio.timeout(self._options.body_seconds):
                await self._fill(request, parts)
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self._options.body_seconds:g} s") from None

    async def _fill(self, request: Request, parts: bytearray) -> None:
        limit, told = self._options.max_body, request.headers.get("content-length", "0")
        stream = request.stream()
        if told.isdigit() and int(told) > limit:
            await self._too_large(stream)
        async for chunk in stream:
            if len(parts) + len(chunk) > limit:
                await self._too_large(stream)
            if self._held + len(chunk) > self._options.max_held:
                raise busy(f"the bodies of other requests fill {self._options.max_held:,} bytes", 1)
            parts += chunk
            self._hold(len(chunk))

    async def _too_large(self, stream: AsyncIterator[bytes]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                async for _ in stream:
                    pass
        raise Refused(413, f"the body is larger than {self._options.max_body:,} bytes")

    def _hold(self, size: int) -> None:
        self._held += size
        self._metrics.held.set(self._held)
