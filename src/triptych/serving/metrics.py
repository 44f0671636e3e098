"""What Prometheus is told: requests by route and status, batches, seconds, and what waits."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, model: str) -> None:
        self._registry = registry = CollectorRegistry()
        Gauge("triptych_model_info", "The model that is served.", ["model"], registry=registry).labels(model).set(1)
        self.requests = Counter("triptych_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "triptych_request_seconds", "From a request's head to its answer.", ["route"], buckets=SECONDS, registry=registry
        )
        self.queue = Gauge("triptych_queue_images", "Images that wait for a batch.", registry=registry)
        self.in_flight = Gauge("triptych_in_flight_requests", "Requests that are not answered yet.", registry=registry)
        self.restarts = Counter("triptych_worker_restarts", "Times that the model's process ended and was replaced.", registry=registry)
        self.held = Gauge("triptych_held_bytes", "Bytes of request bodies in memory.", registry=registry)
        self.queue_seconds = Histogram("triptych_queue_seconds", "A request's wait for its batch.", buckets=SECONDS, registry=registry)
        self._compute = Histogram("triptych_compute_seconds", "Seconds of a batch in the runtime.", buckets=SECONDS, registry=registry)
        self._sizes = Histogram("triptych_batch_images", "Images of a batch.", buckets=SIZES, registry=registry)

    def batch(self, images: int, seconds: float) -> None:
        """A batch was computed."""
        self._sizes.observe(images)
        self._compute.observe(seconds)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)
