"""Log lines as text or as JSON objects, with what they are about.

The standard library does it in one class; structlog would be a dependency for as many lines. What a
line is about is kept in context variables: each handler and each lane of a stream is a task with a
context of its own, so nothing has to be reset.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

request_id: ContextVar[str] = ContextVar("request", default="")
"""One RPC or HTTP request."""
tenant: ContextVar[str] = ContextVar("tenant", default="")
session: ContextVar[str] = ContextVar("session", default="")
trace_id: ContextVar[str] = ContextVar("trace", default="")

_ABOUT: tuple[ContextVar[str], ...] = (request_id, tenant, session, trace_id)
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def about() -> Mapping[str, str]:
    """What the present task is about; names without a value are left out."""
    return {variable.name: value for variable in _ABOUT if (value := variable.get())}


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, what it is about, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **about(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """The same for people. Clients choose names: they are quoted, so that a line stays one line."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        context = "".join(f" {name}={value!r}" for name, value in about().items())
        return super().formatMessage(record) + context


def configure(level: str, form: str) -> None:
    """Sends all log lines from `level` on to standard error, as "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
