"""What every group of routes is given. Knows no route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Depends, Response
from fastapi.security import HTTPBearer

from teacher_server.access.caller import TenantOf
from teacher_server.http.texts import Tokenizer
from teacher_server.metrics.server import Metrics
from teacher_server.scoring.sessions import SessionTable
from teacher_server.scoring.texts import Texts
from teacher_wire.errors import NotReadyError
from teacher_wire.records import TeacherInfo

if TYPE_CHECKING:
    from teacher_server.http.recordings import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpDeps:
    """What the HTTP side is made of."""

    info: TeacherInfo
    sessions: SessionTable
    texts: Texts
    """Of the same sessions, for clients that know none."""
    ready: Callable[[], bool]
    """False while loading or draining; must not block."""
    metrics: Metrics
    tokenizer: Tokenizer | None
    """None: texts are refused, token ids still work."""
    served_name: str = ""
    """Of the model for other trainers' clients; empty: as in `info`."""
    follow_temperature: bool = False
    """Requests whose own server would score at 1 are scored at their temperature."""
    authenticate: TenantOf | None = None
    """Who asks, for every path but the open ones; None: nobody is authenticated."""
    open_metrics: bool = False
    """/metrics is open too."""
    runs: RunFolder | None = None
    """Recorded rollouts to show; None: there are none to show."""
    sees_runs: Callable[[str], bool] = lambda _: True
    """Whether a tenant may see them."""

    @property
    def model_name(self) -> str:
        """By which other trainers' clients ask for the model."""
        return self.served_name or self.info.model_id

    def refuse_unless_ready(self) -> None:
        """Raises NotReadyError while loading, stalled or draining."""
        if not self.ready():
            message = "the teacher is loading, stalled or draining"
            raise NotReadyError(message, retry_after_ms=1000)

    def token_in_schema(self, *, needed: bool = True) -> list[Any]:
        """Has the published schema say that a token is needed; it has been checked by then."""
        if self.authenticate is None or not needed:
            return []
        return [Depends(HTTPBearer(auto_error=False))]


def not_json(media_type: str) -> dict[str, Any]:
    """What the published schema says of a path whose answer is no JSON, though its failures are."""
    return {"response_class": Response, "responses": {200: {"content": {media_type: {}}}}}
