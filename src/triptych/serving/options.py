"""What a server allows, and what it says when it does not. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from triptych.core.errors import TriptychError


@dataclass(frozen=True, slots=True)
class Options:
    """Limits of one server; `triptych serve --help` tells them by the same names.

    `max_batch` images are computed at once, after the oldest has waited `max_delay` seconds for company. `max_queue` images wait, and
    as many uploads for their decoding. `max_body` bytes and `max_pixels` are of one request; all bodies together may hold `max_held`
    bytes. `head_seconds` and `body_seconds` are for a client to send, `request_seconds` for us to answer, `drain_seconds` for the
    requests that are there when the server is asked to end. `start_seconds` is for the model's process to be ready.
    """

    max_batch: int = 32
    max_delay: float = 0.002
    max_queue: int = 256
    max_body: int = 32 * 2**20
    max_pixels: int = 16_000_000
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    request_seconds: float = 30.0
    drain_seconds: int = 30
    start_seconds: float = 300.0
    decoders: int = 2

    @property
    def max_held(self) -> int:
        """Bytes of request bodies that are held at once."""
        return 8 * self.max_body

    @property
    def hung_seconds(self) -> float:
        """When a batch takes so long, nobody waits for it any more: the process that computes it is taken for hung, and replaced."""
        return 2 * self.request_seconds


class Refused(TriptychError):
    """A request that is answered with an error: its status and, where waiting helps, after how many seconds to come back."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def busy(what: str, seconds: float) -> Refused:
    """503, and when to come back."""
    return Refused(503, f"{what}; try again later", max(1, round(seconds + 0.5)))
