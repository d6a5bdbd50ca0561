"""One-off questions to a teacher over HTTP, for scripts and notebooks. No torch, no event loop.

Nothing is kept between two questions: each is scored from its first token. Rollouts that grow are
for `TeacherClient`, tables for `Teacher`. Answers are the records that gRPC gives; failures are the
same TeacherErrors.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from teacher_client.access import TeacherAccess
from teacher_client.http_messages import JSON, answer_of, policy_to_json, to_json, told
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
            "policy": policy_to_json(policy),
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

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        headers = {"content-type": JSON, **dict(self._access.metadata())}
        content = None if body is None else to_json(body)
        where = f"{self._client.base_url}{path.removeprefix('/')}"
        with told(where, self._timeout_s):
            reply = self._client.request(method, path, content=content, headers=headers)
        return answer_of(reply, where)


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
