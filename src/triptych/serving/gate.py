"""What every request passes: it is counted, timed and logged."""

from __future__ import annotations

from time import perf_counter

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triptych.serving.logs import event
from triptych.serving.metrics import Metrics

GONE = 499
"""The status in log and metrics of a request whose client went away before it was read; nobody gets it as an answer."""


class Gate:
    """ASGI middleware around the routes. A request that matches no route counts as `other`, so that nobody can invent metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, noted)
        except ClientDisconnect:
            status = GONE
        finally:
            self._metrics.in_flight.dec()
            self._done(scope, status, perf_counter() - began)

    def _done(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route_name", "other")
        self._metrics.request(route, status, seconds)
        client = scope.get("client") or (None,)
        event(
            "request",
            method=scope["method"][:20],
            path=scope["path"][:200],
            route=route,
            status=status,
            seconds=round(seconds, 6),
            client=client[0],
        )
