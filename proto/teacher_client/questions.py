"""What is asked of a teacher over HTTP and when again, as generators: they yield requests and
pauses and are sent the replies, so that one text serves with an event loop and without. No
transport.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

import httpx

from teacher_client.access import TeacherAccess
from teacher_client.frames import comparison_frame, frame_of, pandas
from teacher_client.http_messages import JSON, answer_of, policy_to_json, to_json
from teacher_client.retry import Patience, RetryLimits
from teacher_client.rollout_items import KNOWN, RESENDS, Batches, item_of, rows_of
from teacher_wire.errors import InvalidRequestError, TeacherError, error_from_json
from teacher_wire.records import DriftPolicy

if TYPE_CHECKING:
    import pandas as pd

Policy = DriftPolicy | Mapping[str, Any]
OnError = Literal["raise", "skip"]
LIMITS = RetryLimits(max_resends=3)
"""Whoever waits at a notebook wants to hear soon that nobody is there."""
_CONNECT_S = 10.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """One request: where it goes in words, and the arguments of httpx's request."""

    where: str
    arguments: dict[str, Any]


Asking = Generator[HttpRequest | float, httpx.Response | None, T]
"""Yields a request, to be sent its reply or thrown a TeacherError, or a pause in s."""


class Questions:
    """A teacher's address, and what can be asked there."""

    def __init__(
        self,
        address: str,
        *,
        token: str = "",
        access: TeacherAccess | None = None,
        timeout_s: float = 600.0,
        limits: RetryLimits = LIMITS,
    ) -> None:
        """As teacher_client.Teacher. Raises InvalidRequestError for what is no address."""
        access = access or TeacherAccess()
        scheme = "http" if access.tls_ca is None else "https"
        parts = _parts(address if "://" in address else f"{scheme}://{address}")
        given = token or unquote(parts.username or "")
        self._access = replace(access, token=given) if given else access
        host = parts.netloc.rpartition("@")[2]
        self._url = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
        self.timeout_s = timeout_s
        self._limits = limits
        if parts.scheme != "https":
            self._access.warn_in_the_clear(host)

    def client_options(self) -> dict[str, Any]:
        """Of httpx's clients. Raises AccessError."""
        timeout = httpx.Timeout(self.timeout_s, connect=min(self.timeout_s, _CONNECT_S))
        verify = self._access.ssl_context() or True
        return {"base_url": self._url, "timeout": timeout, "verify": verify}

    def info(self) -> Asking[dict[str, Any]]:
        """What is served."""
        return (yield from self._answer("/v1/info"))

    def reports(
        self, rollouts: Any, policy: Policy | None, **common: Any
    ) -> Asking[list[dict[str, Any]]]:
        """A report a rollout, in columns."""
        batches, _ = yield from self._batches(rollouts, policy, common, "raise")
        return [report for _, report in sorted(batches.reports.items())]

    def table(
        self, rollouts: Any, policy: Policy | None, on_error: OnError, **common: Any
    ) -> Asking[pd.DataFrame]:
        """A row a token of all rollouts."""
        pandas()
        batches, rows = yield from self._batches(rollouts, policy, common, on_error)
        frame = frame_of(batches.reports, rows)
        frame.attrs["errors"] = {index: str(error) for index, error in batches.errors.items()}
        return frame

    def comparison(
        self, responses: Any, policies: Sequence[Policy], on_error: OnError, **common: Any
    ) -> Asking[pd.DataFrame]:
        """A row a token, response and policy."""
        pandas()
        items = []
        for row in rows_of(responses):
            name = {"name": str(row["name"])} if row.get("name") is not None else {}
            items.append(item_of(row, {}) | name)
        body = {
            **{name: value for name, value in common.items() if value is not None},
            "responses": items,
            "policies": [policy_to_json(policy) for policy in policies],
        }
        answer = yield from self._answer("/v1/compare", body)
        failed = [each["error"] for each in answer["responses"] if "error" in each]
        if failed and on_error == "raise":
            raise error_from_json(0, failed[0])
        return comparison_frame(answer)

    def _batches(
        self, rollouts: Any, policy: Policy | None, common: Mapping[str, Any], on_error: OnError
    ) -> Asking[tuple[Batches, list[Mapping[str, Any]]]]:
        if unknown := sorted(set(common) - KNOWN):
            raise TypeError(f"unknown argument {', '.join(unknown)}: known are {sorted(KNOWN)}")
        rows = rows_of(common if rollouts is None else rollouts)
        shared = {**common, "policy": policy_to_json(policy)}
        batches = Batches([item_of(row, shared) for row in rows], self._limits)
        while (body := batches.next()) is not None:
            try:
                answer = yield from self._answer("/v1/analyze", body)
            except InvalidRequestError as refused:
                batches.refuse(refused)
            else:
                yield batches.take(answer)
            if batches.errors and on_error == "raise":
                index, error = min(batches.errors.items())
                error.add_note(f"of rollout {index}")
                raise error
        return batches, rows

    def _answer(self, path: str, body: object = None) -> Asking[dict[str, Any]]:
        """The answer to one request, which is tried again where that can help."""
        patience = Patience(self._limits, resends=RESENDS)
        content = None if body is None else to_json(body)
        where = f"{self._url}{path}"
        while True:
            headers = {"content-type": JSON, **dict(self._access.metadata())}
            method = "GET" if body is None else "POST"
            arguments = {"method": method, "url": path, "content": content, "headers": headers}
            try:
                reply = yield HttpRequest(where=where, arguments=arguments)
                assert reply is not None
                return answer_of(reply, where)
            except TeacherError as error:
                pause_s = patience.pause_s(error)
            yield pause_s


def _parts(url: str) -> SplitResult:
    """Of an address that httpx takes. Raises InvalidRequestError, without the token."""
    try:
        httpx.URL(url)
        return urlsplit(url)
    except (httpx.InvalidURL, ValueError) as error:
        named = url.rpartition("@")[2]
        raise InvalidRequestError(f"{named!r} is no address of a teacher: {error}") from None
