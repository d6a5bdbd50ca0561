"""How a teacher is spoken to over HTTP: bodies, answers, failures. No transport of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from typing import Any

import httpx
import numpy as np

from teacher_wire.errors import DeadlineError, NotReadyError, error_from_json
from teacher_wire.records import DriftPolicy

JSON = "application/json"


def to_json(content: object) -> bytes:
    """A body; arrays, enums and records as the teacher reads them."""
    return json.dumps(content, default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value.value if isinstance(value, Enum) else asdict(value)


def policy_to_json(policy: DriftPolicy | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The constants of the metric beside those of all metrics; a mapping as it is."""
    if policy is None:
        return None
    if isinstance(policy, DriftPolicy):
        return {**asdict(policy), "metric": policy.metric.name, **asdict(policy.metric)}
    return dict(policy)


@contextmanager
def told(where: str, timeout_s: float) -> Iterator[None]:
    """Turns what a transport raises into DeadlineError and NotReadyError."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise DeadlineError(f"{where} gave no answer in {timeout_s} s") from error
    except httpx.TransportError as error:
        raise NotReadyError(f"{where} cannot be reached: {error}") from error


def answer_of(reply: httpx.Response, where: str) -> dict[str, Any]:
    """The object that a teacher answered. Raises the TeacherError that it tells of, and
    NotReadyError for what no teacher says."""
    try:
        answer: dict[str, Any] = dict(reply.json())
        failure = None if reply.is_success else dict(answer["error"])
    except (ValueError, TypeError, KeyError) as error:
        said = f"HTTP {reply.status_code} and no JSON of a teacher"
        raise NotReadyError(f"{where} answered {said}") from error
    if failure is not None:
        raise error_from_json(reply.status_code, failure)
    return answer
