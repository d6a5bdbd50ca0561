"""What goes in and out of the HTTP side as JSON; the published OpenAPI schema is made of these.

Requests are parsed into their models. Replies are written straight from arrays, so their models say
what leaves and are not filled; tests hold one against the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from teacher_server.http.analysis import Report
from teacher_server.http.rows import ArrayEncoding, RowsReply
from teacher_wire.errors import ERROR_CODES, InvalidRequestError
from teacher_wire.records import (
    MAX_DRIFT_K,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    ROW_FLAGS,
    DriftMetric,
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
TokenIds = Annotated[list[Int32], Field(min_length=1, max_length=2**20)]
Text = Annotated[str, Field(min_length=1, max_length=2**20)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicyBody(_Body):
    """teacher_wire.records.DriftPolicy as JSON."""

    metric: DriftMetric = DriftMetric.OVERLAP_RATIO
    k: Annotated[int, Field(strict=True, ge=1, le=MAX_DRIFT_K)] = 16
    threshold: Real = 0.7
    top_p: Real = 0.95
    w_drop: Real = 0.01
    stop_in_flight: Flag = True


class _SpanBody(_Body):
    candidate_ids: Annotated[list[list[Int32]], Field(max_length=2**20)] | None = None
    """One row a response token, each of the same length: the student's top-k, most likely first."""
    temperature: Annotated[float, Field(strict=True, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)] = 1.0
    policy: PolicyBody | None = None

    def policy_record(self) -> DriftPolicy | None:
        return None if self.policy is None else DriftPolicy(**dict(self.policy))

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
    event_mask: list[Flag] | None = None
    """False where a position may raise no drift event."""
    k: Count = 16
    logprob_dtype: LogprobDtype = LogprobDtype.F32
    """Element type of packed log-probs; JSON numbers are always those of the engine."""
    encoding: ArrayEncoding = ArrayEncoding.JSON

    def options_record(self) -> ScoreOptions:
        return ScoreOptions(
            k=self.k,
            temperature=self.temperature,
            logprob_dtype=self.logprob_dtype,
            **{flag: getattr(self, flag) for flag in ROW_FLAGS},
        )

    def span_record(self) -> TokenSpan:
        return TokenSpan(
            offset=0,
            token_ids=np.array(self.response_ids, np.int32),
            candidate_ids=self.candidate_array(),
            event_mask=None if self.event_mask is None else np.array(self.event_mask, np.bool_),
        )


class AnalyzeBody(_SpanBody):
    """One prompt and response to analyse, each as text or as token ids."""

    prompt: Text | None = None
    prompt_ids: TokenIds | None = None
    response: Text | None = None
    response_ids: TokenIds | None = None
    add_special_tokens: Flag = False
    """Let the tokenizer add its special tokens to a prompt given as text."""
    k: Count = 8

    def options_record(self) -> ScoreOptions:
        """A report shows every column."""
        return ScoreOptions(
            k=self.k, temperature=self.temperature, **dict.fromkeys(ROW_FLAGS, True)
        )

    @model_validator(mode="after")
    def _one_of_each(self) -> AnalyzeBody:
        for name in ("prompt", "response"):
            given = [f for f in (name, f"{name}_ids") if getattr(self, f) is not None]
            if len(given) != 1:
                raise ValueError(f"exactly one of {name} and {name}_ids must be given")
        return self


class ScoreReply(_Body):
    """teacher_wire.records.Scores as JSON."""

    rows: RowsReply  # type: ignore[valid-type]
    drift: DriftState | None
    verdict: Verdict
    keep_tokens: int | None
    timing: Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeReply(Report):
    """The report, and what it took."""

    timing: Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoReply(TeacherInfo):
    """What is served, its limits, and whether texts can be analysed."""

    has_tokenizer: bool


class ErrorDetail(_Body):
    """A failure, by the table of teacher_wire.errors."""

    type: str
    reason: str
    message: str
    retryable: bool
    retry_after_ms: int
    """0: the same request does not help."""
    expected_offset: int | None = None
    offset: int | None = None


class ErrorReply(_Body):
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
