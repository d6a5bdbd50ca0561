"""One-off questions to a teacher over HTTP, for scripts and notebooks. No torch, no event loop.

Nothing is kept between two questions: each is scored from its first token. Rollouts that grow are
for `TeacherClient`. Answers are the records that gRPC gives; failures are the same TeacherErrors.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from enum import Enum
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from teacher_client.access import TeacherAccess
from teacher_wire.errors import DeadlineError, NotReadyError, error_from_json
from teacher_wire.records import (
    DriftPolicy,
    DriftState,
    ScoreOptions,
    ScoreRows,
    Scores,
    TeacherInfo,
    Timing,
    TokenSpan,
    Verdict,
)


class TeacherHttp:
    """The HTTP side of one teacher, such as http://127.0.0.1:8080. Use it as a context manager.

    Every method raises the TeacherError that the teacher answered, NotReadyError when nobody
    answered or no teacher did, DeadlineError after timeout_s without an answer, AccessError for a
    token or certificate that cannot be used.
    """

    def __init__(
        self, url: str, *, access: TeacherAccess | None = None, timeout_s: float = 60.0
    ) -> None:
        self._access = access or TeacherAccess()
        self._timeout_s = timeout_s
        verify = self._access.ssl_context() or True
        self._client = httpx.Client(base_url=url, timeout=timeout_s, verify=verify)
        if self._client.base_url.scheme != "https":
            self._access.warn_in_the_clear(self._client.base_url.netloc.decode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()

    def info(self) -> TeacherInfo:
        """What the teacher serves, and its limits."""
        return TeacherInfo(**_fields(TeacherInfo, self._ask("GET", "/v1/info")))

    def score(
        self,
        prompt_ids: NDArray[np.int32],
        span: TokenSpan,
        options: ScoreOptions,
        policy: DriftPolicy | None = None,
    ) -> Scores:
        """Scores one whole response; the span begins at 0. As `TeacherClient.score`."""
        body = {
            "prompt_ids": prompt_ids,
            "response_ids": span.token_ids,
            "candidate_ids": span.candidate_ids,
            "event_mask": span.event_mask,
            "policy": _policy(policy),
            "encoding": "base64",
            **{field.name: getattr(options, field.name) for field in fields(options) if field.init},
        }
        answer = self._ask("POST", "/v1/score", body)
        rows = {name: _array(value) for name, value in answer["rows"].items()}
        drift = answer["drift"]
        return Scores(
            rows=ScoreRows(**_fields(ScoreRows, rows)),
            drift=None if drift is None else DriftState(**_fields(DriftState, drift)),
            verdict=Verdict(answer["verdict"]),
            keep_tokens=answer["keep_tokens"],
            timing=Timing(**_fields(Timing, answer["timing"])),
        )

    def analyze(
        self,
        prompt: str | NDArray[np.int32],
        response: str | NDArray[np.int32],
        *,
        k: int = 8,
        temperature: float = 1.0,
        candidate_ids: NDArray[np.int32] | None = None,
        policy: DriftPolicy | None = None,
    ) -> dict[str, Any]:
        """The report of one response as /openapi.json describes it (AnalyzeReply): `tokens` has
        one dict a response token. Texts need a teacher with a tokenizer."""
        body: dict[str, Any] = {"k": k, "temperature": temperature, "policy": _policy(policy)}
        body["candidate_ids"] = candidate_ids
        for name, value in (("prompt", prompt), ("response", response)):
            body[name if isinstance(value, str) else f"{name}_ids"] = value
        return self._ask("POST", "/v1/analyze", body)

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        headers = {"content-type": "application/json", **dict(self._access.metadata())}
        content = None if body is None else json.dumps(body, default=_plain)
        where = f"{self._client.base_url}{path.removeprefix('/')}"
        try:
            reply = self._client.request(method, path, content=content, headers=headers)
        except httpx.TimeoutException as error:
            raise DeadlineError(f"{where} gave no answer in {self._timeout_s} s") from error
        except httpx.TransportError as error:
            raise NotReadyError(f"{where} cannot be reached: {error}") from error
        try:
            answer: dict[str, Any] = dict(reply.json())
            failure = None if reply.is_success else dict(answer["error"])
        except (ValueError, TypeError, KeyError) as error:
            said = f"HTTP {reply.status_code} and no JSON of a teacher"
            raise NotReadyError(f"{where} answered {said}") from error
        if failure is not None:
            raise error_from_json(reply.status_code, failure)
        return answer


def _plain(value: Any) -> Any:
    """An array, an enum or a record as JSON has it."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.value if isinstance(value, Enum) else asdict(value)


def _policy(policy: DriftPolicy | None) -> dict[str, Any] | None:
    """The constants of the metric beside those of all metrics."""
    if policy is None:
        return None
    return {**asdict(policy), "metric": policy.metric.name, **asdict(policy.metric)}


def _fields(record: type[Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """What a record of ours knows of an answer; lists of JSON become tuples."""
    found = {field.name: content[field.name] for field in fields(record) if field.name in content}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}


def _array(value: Any) -> Any:
    """A packed array as gRPC would give it, floats as float32; anything else as it is."""
    if not isinstance(value, dict):
        return value
    packed = np.frombuffer(base64.b64decode(value["data"]), value["dtype"])
    array = packed.reshape(value["shape"])
    return array.astype(np.float32 if array.dtype.kind == "f" else array.dtype)
