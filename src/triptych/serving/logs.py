"""Structured logs: one line of JSON an event, on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

LOGGER = logging.getLogger("triptych.serving")


class JsonLines(logging.Formatter):
    """Time (UTC), level, event and what belongs to it; of an exception the last line, and the whole traceback as one string."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        told: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        told |= getattr(record, "told", {})
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def configure() -> None:
    """Our events and the web server's warnings go to stderr as lines of JSON; its own lines about requests are left out, ours tell more."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("triptych.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def event(name: str, **told: Any) -> None:
    """Log an event with what belongs to it."""
    LOGGER.info(name, extra={"told": told})
