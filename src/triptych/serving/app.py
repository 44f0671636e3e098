"""The routes: the Open Inference Protocol, an upload of images, a page, and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from time import perf_counter
from typing import Any, TypeVar, TypeVarTuple

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from triptych import __version__
from triptych.core.errors import InputRefused
from triptych.serving import protocol
from triptych.serving.artefact import VERSION, Artefact
from triptych.serving.batching import Answer, Batcher
from triptych.serving.bodies import Bodies
from triptych.serving.gate import Gate
from triptych.serving.images import prepared
from triptych.serving.keeper import Keeper, Model
from triptych.serving.metrics import Metrics
from triptych.serving.options import Options, Refused, busy

TOP = 5
AT_ONCE = 2**16
"""Bytes of a body that are parsed at once; to hand it to a thread would take longer."""
Result = TypeVar("Result")
Given = TypeVarTuple("Given")
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob:; connect-src 'self'",
    "x-content-type-options": "nosniff",
}


class Service:
    """One model and everything that its routes need; who computes it is made by `keeper`. It is `open` until it is asked to end."""

    def __init__(self, served: Artefact, options: Options, keeper: Callable[[Artefact, Options, Metrics], Model] = Keeper) -> None:
        self.served, self.options, self.metrics = served, options, Metrics(served.name)
        self.labels = served.labels
        self.model = keeper(served, options, self.metrics)
        self.batcher = Batcher(self.model.run, options, self.metrics)
        self.bodies = Bodies(options, self.metrics)
        self.open = True
        self._decoders = ThreadPoolExecutor(options.decoders, thread_name_prefix="decoder")
        self._uploads = 0

    @property
    def ready(self) -> bool:
        """Whether to send requests here."""
        return self.open and self.model.ready

    async def start(self) -> None:
        """From here on requests are answered. Raises what `Model.start` does."""
        await self.model.start()

    async def stop(self) -> None:
        """End. Raises what ended the model before."""
        await self.batcher.stop()
        self._decoders.shutdown(wait=False)
        await self.model.stop()

    async def logits(self, images: np.ndarray) -> Answer:
        """Through the queue. Raises Refused: 503 when it is full, 504 when the answer took too long."""
        return await self._in_time(self.batcher.submit(images))

    async def _in_time(self, result: asyncio.Future[Result]) -> Result:
        try:
            async with asyncio.timeout(self.options.request_seconds):
                return await result
        except TimeoutError:
            raise Refused(504, f"no answer within {self.options.request_seconds:g} s", 1) from None

    async def image(self, data: bytes) -> np.ndarray:
        """An upload, decoded in a thread: (1, *shape). Raises Refused (503) when too many wait for that, InputRefused for a bad one."""
        if self._uploads >= self.options.max_queue:
            raise busy(f"{self._uploads} uploads wait for their decoding", 1)
        self._uploads += 1
        try:
            given = data, self.served.spec.preprocessing, self.options.max_pixels
            image = await self._in_time(self.aside(prepared, *given))
        finally:
            self._uploads -= 1
        return (image.transpose(2, 0, 1) if self.served.channels_first else image)[None]

    def aside(self, work: Callable[[*Given], Result], *given: *Given) -> asyncio.Future[Result]:
        """What takes long, in one of few threads: their number bounds the memory of what is unpacked."""
        return asyncio.get_running_loop().run_in_executor(self._decoders, work, *given)

    def check_model(self, request: Request) -> None:
        """Raises Refused (404) for another model or version than the one that is served."""
        name, version = request.path_params["model"], request.path_params.get("version", VERSION)
        if (name, version) != (self.served.name, VERSION):
            raise Refused(404, f"there is no model {name!r} of version {version!r}; served is {self.served.name!r}, version {VERSION!r}")


Endpoint = Callable[[Service, Request], Any]


async def live(service: Service, request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"live": True})


async def ready(service: Service, request: Request) -> Response:
    """Requests are welcome: 200, else 503."""
    return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)


async def server(service: Service, request: Request) -> Response:
    """The server's metadata."""
    return JSONResponse({"name": "triptych", "version": __version__, "extensions": ["binary_tensor_data"]})


async def model(service: Service, request: Request) -> Response:
    """The model's metadata."""
    service.check_model(request)
    return JSONResponse(service.served.metadata())


async def model_ready(service: Service, request: Request) -> Response:
    """As `ready`, of the model."""
    service.check_model(request)
    return JSONResponse({"name": service.served.name, "ready": service.ready}, 200 if service.ready else 503)


async def infer(service: Service, request: Request) -> Response:
    """Inference on preprocessed images."""
    service.check_model(request)
    async with service.bodies.read(request) as body:
        given = body, request.headers.get(protocol.HEAD_LENGTH), service.served.shape, service.options.max_batch
        asked = protocol.parsed(*given) if len(body) <= AT_ONCE else await service.aside(protocol.parsed, *given)
        answer = await service.logits(asked.images)
    content, headers = protocol.response(service.served.name, asked, answer.logits)
    return Response(content, headers=headers)


async def predict(service: Service, request: Request) -> Response:
    """The likeliest classes of an uploaded image: the body is the JPEG or PNG file itself."""
    began = perf_counter()
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise Refused(415, "send the file itself as the body, not a form: curl --data-binary @image.jpg URL/predict")
    async with service.bodies.read(request) as body:
        started = perf_counter()
        image = await service.image(body)
        prepared_seconds = perf_counter() - started
    answer = await service.logits(image)
    seconds = {"prepare": prepared_seconds, "queue": answer.queue_seconds, "compute": answer.compute_seconds}
    told = {"model": service.served.name, "top": top(answer.logits[0], service.labels), "batch": answer.batch}
    return JSONResponse({**told, "seconds": {**seconds, "total": perf_counter() - began}})


def top(logits: np.ndarray, labels: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """The likeliest classes of logits (classes,), at most five, by falling probability."""
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares, kind="stable")[:TOP]
    return [{"class": int(i), "label": labels[i] if labels else None, "probability": float(shares[i])} for i in best]


async def metrics(service: Service, request: Request) -> Response:
    """For Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def page(service: Service, request: Request) -> Response:
    """A page to drop an image on."""
    return HTMLResponse((resources.files("triptych.serving") / "page.html").read_text(encoding="utf-8"), headers=PAGE_HEADERS)


_MODEL, _VERSIONED = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    *(("POST", f"{path}/infer", infer) for path in (_MODEL, _VERSIONED)),  # they are tried in this order
    ("POST", "/predict", predict), ("GET", "/", page), ("GET", "/metrics", metrics), ("GET", "/v2", server),
    ("GET", "/v2/health/live", live), ("GET", "/v2/health/ready", ready),
    *(("GET", path, model) for path in (_MODEL, _VERSIONED)),
    *(("GET", f"{path}/ready", model_ready) for path in (_MODEL, _VERSIONED)),
)  # fmt: skip


def application(service: Service) -> Starlette:
    """The routes of a service, behind its gate."""

    def bound(endpoint: Endpoint) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            request.scope["route_name"] = endpoint.__name__
            response: Response = await endpoint(service, request)
            return response

        return answer

    return Starlette(
        routes=[Route(path, bound(endpoint), methods=[method]) for method, path, endpoint in ROUTES],
        middleware=[Middleware(Gate, metrics=service.metrics)],
        exception_handlers={Refused: _refused, InputRefused: _bad_image, HTTPException: _no_route, Exception: _broken},
    )


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status in (408, 413):
        headers["connection"] = "close"  # what is still being sent is not the next request
    return _error(error.status, str(error), headers)


async def _bad_image(_: Request, error: Exception) -> Response:
    return _error(422, str(error))


async def _no_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


async def _broken(_: Request, error: Exception) -> Response:
    return _error(500, "the server failed; its log says why")
