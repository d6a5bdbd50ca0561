"""What goes in and out of the HTTP side as JSON; the published OpenAPI schema is made of these.

Requests are parsed into their models. Replies are written straight from arrays, so their models say
what leaves and are not filled; tests hold one against the other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union, get_type_hints

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, create_model

from teacher_server.http.rows import ArrayEncoding, RowsReply
from teacher_wire.drift_metrics import METRICS, DriftMetric, OverlapRatio
from teacher_wire.errors import ERROR_CODES, InvalidRequestError
from teacher_wire.id_ranges import MAX_RANGES
from teacher_wire.records import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    ROW_FLAGS,
    DriftPolicy,
    DriftState,
    LogprobDtype,
    ScoreOptions,
    TeacherInfo,
    Timing,
    TokenSpan,
    Verdict,
)

Int32 = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Count = Annotated[int, Field(strict=True, ge=1, le=4096)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
TokenIds = Annotated[list[Int32], Field(min_length=1, max_length=2**20, fail_fast=True)]
"""The first that is wrong is told; a list of all would take as long as the list."""
IdRow = Annotated[list[Int32], Field(fail_fast=True)]
IdRows = Annotated[list[IdRow], Field(max_length=2**20, fail_fast=True)]
Text = Annotated[str, Field(min_length=1, max_length=2**20)]
Temperature = Annotated[float, Field(strict=True, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)]


class JsonBody(BaseModel):
    """Part of a request; a name that is not known is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class PolicyFields(JsonBody):
    """teacher_wire.records.DriftPolicy as JSON, the constants of its metric beside its own."""

    w_drop: Real = DriftPolicy().w_drop
    stop_in_flight: Flag = DriftPolicy().stop_in_flight


def _policy_body(kind: type[DriftMetric]) -> Any:
    hints = get_type_hints(kind)
    strict = {int: Annotated[int, Field(strict=True)], float: Real}
    constants: dict[str, Any] = {
        "metric": (Literal[kind.name], kind.name),
        **{field.name: (strict[hints[field.name]], field.default) for field in fields(kind)},
    }
    body = create_model(
        f"{kind.__name__}Policy", __base__=PolicyFields, __doc__=kind.__doc__, **constants
    )
    return Annotated[body, Tag(kind.name)]


def metric(policy: Any) -> str | None:
    """The tag of a policy; the usual one where a body does not say, None where it is no policy."""
    named = policy.get("metric", OverlapRatio.name) if isinstance(policy, dict) else None
    return named if isinstance(named, str) else None


PolicyOfMetric: tuple[Any, ...] = tuple(map(_policy_body, METRICS.values()))


class AnyOf:
    """Of a union: what is left out is a default, so that a value may match several of its schemas,
    which `oneOf` would forbid."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        made: dict[str, Any] = handler(schema)
        if "oneOf" in made:
            made["anyOf"] = made.pop("oneOf")
        return made


PolicyBody: Any = Annotated[
    Union[PolicyOfMetric],  # noqa: UP007
    Discriminator(metric),
    AnyOf(),
]


class _SpanBody(JsonBody):
    candidate_ids: IdRows | None = None
    """One row a response token, each of the same length: the student's top-k, most likely first."""
    temperature: Temperature = 1.0
    policy: Optional[PolicyBody] = None  # noqa: UP045

    def policy_record(self) -> DriftPolicy | None:
        if self.policy is None:
            return None
        kind, policy = METRICS[self.policy.metric], dict(self.policy)
        constants = {field.name: policy.pop(field.name) for field in fields(kind)}
        return DriftPolicy(**policy | {"metric": kind(**constants)})

    def candidate_array(self) -> NDArray[np.int32] | None:
        if self.candidate_ids is None:
            return None
        widths = {len(row) for row in self.candidate_ids}
        if len(widths) != 1 or 0 in widths:
            raise InvalidRequestError(
                f"candidate_ids has rows of {sorted(widths)} ids, must all have one length >= 1"
            )
        return np.array(self.candidate_ids, np.int32)


if TYPE_CHECKING:
    _FlagsBody = _SpanBody
else:
    _FlagsBody = create_model(
        "_FlagsBody", __base__=_SpanBody, **dict.fromkeys(ROW_FLAGS, (Flag, False))
    )


class ScoreBody(_FlagsBody):
    """One whole response to score, as token ids."""

    prompt_ids: TokenIds
    response_ids: TokenIds
    event_mask: Annotated[list[Flag], Field(fail_fast=True)] | None = None
    """False where a position may raise no drift event."""
    k: Count = 16
    excluded_ids: Annotated[tuple[tuple[Int32, Int32], ...], Field(max_length=MAX_RANGES)] = ()
    """Ids that take no part, as ranges [start, end), ascending and disjoint."""
    logprob_dtype: LogprobDtype = LogprobDtype.F32
    """Element type of packed log-probs; JSON numbers are always those of the engine."""
    encoding: ArrayEncoding = ArrayEncoding.JSON

    def options_record(self) -> ScoreOptions:
        return ScoreOptions(
            k=self.k,
            temperature=self.temperature,
            logprob_dtype=self.logprob_dtype,
            excluded_ids=self.excluded_ids,
            **{flag: getattr(self, flag) for flag in ROW_FLAGS},
        )

    def span_record(self) -> TokenSpan:
        return TokenSpan(
            offset=0,
            token_ids=np.array(self.response_ids, np.int32),
            candidate_ids=self.candidate_array(),
            event_mask=None if self.event_mask is None else np.array(self.event_mask, np.bool_),
        )


class ScoreReply(JsonBody):
    """teacher_wire.records.Scores as JSON."""

    rows: RowsReply
    drift: DriftState | None
    verdict: Verdict
    keep_tokens: int | None
    timing: Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoReply(TeacherInfo):
    """What is served, its limits, and what the page can show."""

    has_tokenizer: bool
    """Texts can be analysed."""
    shows_runs: bool
    """Recorded rollouts can be seen by who asks."""
    max_analysis_entries: int
    """Largest T * (K + candidates) of a report as one JSON object."""


class ErrorDetail(JsonBody):
    """A failure, by the table of teacher_wire.errors."""

    type: str
    reason: str
    message: str
    retryable: bool
    retry_after_ms: int
    """0: the same request does not help."""
    expected_offset: int | None = None
    offset: int | None = None


class ErrorReply(JsonBody):
    """The body of every answer that is not 200."""

    error: ErrorDetail


def _failures(first_digit: int) -> dict[str, Any]:
    named = [
        f"{code.http} {cls.__name__}"
        for cls, code in ERROR_CODES.items()
        if code.http // 100 == first_digit
    ]
    return {"model": ErrorReply, "description": ", ".join(sorted(named))}


FAILURES: dict[int | str, dict[str, Any]] = {"4XX": _failures(4), "5XX": _failures(5)}
"""What every path may answer besides 200."""
