"""What goes in and out of the analysis as JSON; the published OpenAPI schema is made of these.

Requests are parsed into their models. Replies are written straight from arrays, so their models say
what leaves and are not filled; tests hold one against the other.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, Optional, Union

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag, create_model, model_validator

from teacher_server.http.bodies import (
    AnyOf,
    Count,
    ErrorDetail,
    Flag,
    IdRows,
    JsonBody,
    PolicyFields,
    PolicyOfMetric,
    Temperature,
    Text,
    TokenIds,
)
from teacher_server.http.rows import PackedArray, Reply, number_of
from teacher_wire.drift_metrics import METRICS, DriftMetric, OverlapRatio, TeacherTopPAccept
from teacher_wire.errors import InvalidRequestError
from teacher_wire.records import MODEL_COLUMNS, DriftPolicy, Timing
from teacher_wire.report_columns import in_report

MAX_ITEMS = 256
"""Of a batch, or responses of a comparison."""
MAX_POLICIES = 16
_OWN_CONSTANTS = {
    name: {f.name for f in fields(kind)} - {f.name for f in fields(DriftMetric)}
    for name, kind in METRICS.items()
}


class UnnamedPolicy(PolicyFields):
    """A policy that names no metric: overlap_ratio where candidate_ids are sent, else
    teacher_top_p_accept."""

    k: Annotated[int, Field(strict=True, ge=1)] = OverlapRatio().k


def named_metric(policy: Any) -> str:
    """The tag of a policy: its metric, else the one whose constant it has, else none."""
    if not isinstance(policy, dict):
        return "unnamed"
    if "metric" in policy:
        name = policy["metric"]
        return name if isinstance(name, str) else ""
    return next((name for name, own in _OWN_CONSTANTS.items() if own & set(policy)), "unnamed")


AnyPolicy: Any = Annotated[
    Union[(*PolicyOfMetric, Annotated[UnnamedPolicy, Tag("unnamed")])],
    Discriminator(named_metric),
    AnyOf(),
]


def resolved_policy(body: Any, *, k: int, num_candidates: int, max_k: int) -> DriftPolicy:
    """The policy that a body asks for, beside the other sizes of its request.

    A drift k that is not given is that of the metric, but at most the requested `k` and, where
    candidates are compared, their number. One that is given may be larger than `k`: more is scored
    than is shown. Raises InvalidRequestError naming the field.
    """
    values = dict(body)
    name = values.pop("metric", None)
    if name is None:
        name = (OverlapRatio if num_candidates else TeacherTopPAccept).name
    kind = METRICS[name]
    constants = {f.name: values.pop(f.name) for f in fields(kind) if f.name in values}
    if kind.compares_candidates and not num_candidates:
        raise InvalidRequestError(
            f"policy.metric is {name}, which compares candidate_ids: send them, or choose "
            f"{TeacherTopPAccept.name}"
        )
    width = num_candidates if kind.compares_candidates else max_k
    if "k" not in body.model_fields_set:
        constants["k"] = min(kind().k, k, width)
    elif not kind.compares_candidates:
        constants["k"] = min(constants["k"], max_k)
    elif constants["k"] > min(width, max_k):
        have = f"{width} ids a row" if width < max_k else f"max_k {max_k} as its limit"
        raise InvalidRequestError(
            f"policy.k is {constants['k']}, but it compares candidate_ids, which has {have}"
        )
    return DriftPolicy(**values, metric=kind(**constants))


class Message(JsonBody):
    """One turn of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str, Field(max_length=2**20)]


Scalar = Annotated[bool, Field(strict=True)] | Annotated[int, Field(strict=True)] | str | None


class PromptBody(JsonBody):
    """A prompt in one of three forms."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = None
    """A conversation, put into the tokenizer's chat template with the generation prompt."""
    prompt: Text | None = None
    """Text as it is."""
    prompt_ids: TokenIds | None = None
    add_special_tokens: Flag = False
    """Let the tokenizer add its special tokens to `prompt`."""
    chat_template_kwargs: dict[str, Scalar] = Field(default_factory=dict, max_length=32)
    """What the chat template reads besides the messages, such as enable_thinking."""


class ResponseBody(JsonBody):
    """A response as text or ids, and another model's top-k at its tokens."""

    response: Text | None = None
    response_ids: TokenIds | None = None
    candidate_ids: IdRows | PackedArray | None = None
    """One row a response token, each of the same length: the student's, or another model's, top-k,
    most likely first; as lists, or packed as <i4."""

    def candidate_array(self) -> NDArray[np.int32] | None:
        """[T, C]. Raises InvalidRequestError."""
        if self.candidate_ids is None:
            return None
        if isinstance(self.candidate_ids, PackedArray):
            return _unpacked(self.candidate_ids)
        widths = {len(row) for row in self.candidate_ids}
        if len(widths) != 1 or 0 in widths:
            raise InvalidRequestError(
                f"candidate_ids has rows of {sorted(widths)} ids, must all have one length >= 1"
            )
        return np.array(self.candidate_ids, np.int32)


def _unpacked(packed: PackedArray) -> NDArray[np.int32]:
    if packed.dtype != "<i4" or len(packed.shape) != 2 or min(packed.shape) < 1:
        raise InvalidRequestError(
            f"candidate_ids is packed as {packed.dtype} of shape {packed.shape}, must be <i4 of "
            "shape [T, C]"
        )
    try:
        raw = base64.b64decode(packed.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"candidate_ids.data is no base64: {error}") from error
    num_rows, width = packed.shape
    if len(raw) != 4 * num_rows * width:
        raise InvalidRequestError(
            f"candidate_ids.data has {len(raw)} bytes, its shape needs {4 * num_rows * width}"
        )
    return np.frombuffer(raw, "<i4").reshape(num_rows, width).astype(np.int32)


class _ScoredBody(JsonBody):
    k: Count = 8
    """Size of the teacher's top-k that is shown."""
    temperature: Temperature = 1.0


def _one_of(body: JsonBody, *names: str) -> None:
    given = [name for name in names if getattr(body, name) is not None]
    if len(given) != 1:
        found = f", got {' and '.join(given)}" if given else ""
        raise ValueError(f"exactly one of {', '.join(names)} must be given{found}")


class AnalyzeItem(_ScoredBody, PromptBody, ResponseBody):
    """One prompt and response to analyse."""

    policy: Optional[AnyPolicy] = None  # noqa: UP045
    """A drift policy; {} is the usual one. The reply has what became of it."""

    @model_validator(mode="after")
    def _one_of_each(self) -> AnalyzeItem:
        if not self.is_batch():
            _one_of(self, "messages", "prompt", "prompt_ids")
            _one_of(self, "response", "response_ids")
        return self

    def is_batch(self) -> bool:
        return False


class AnalyzeBody(AnalyzeItem):
    """One prompt and response to analyse, or several as `items`, alone."""

    items: Annotated[list[AnalyzeItem], Field(min_length=1, max_length=MAX_ITEMS)] | None = None
    """Each is answered by itself, with a report or an error."""

    @model_validator(mode="after")
    def _items_alone(self) -> AnalyzeBody:
        if self.is_batch() and self.model_fields_set != {"items"}:
            others = sorted(self.model_fields_set - {"items"})
            raise ValueError(f"items must be given alone, got {', '.join(others)} beside it")
        return self

    def is_batch(self) -> bool:
        return self.items is not None


class ComparedResponse(ResponseBody):
    """One of several responses to a prompt."""

    name: Annotated[str, Field(max_length=256)] | None = None
    """Comes back with it."""

    @model_validator(mode="after")
    def _one_of_each(self) -> ComparedResponse:
        _one_of(self, "response", "response_ids")
        return self


class CompareBody(_ScoredBody, PromptBody):
    """Several responses to one prompt, each scored once and judged by each of several policies."""

    responses: Annotated[list[ComparedResponse], Field(min_length=1, max_length=MAX_ITEMS)]
    policies: list[AnyPolicy] = Field(default_factory=list, max_length=MAX_POLICIES)

    @model_validator(mode="after")
    def _one_prompt(self) -> CompareBody:
        _one_of(self, "messages", "prompt", "prompt_ids")
        return self


class WarningReply(Reply):
    """teacher_server.http.texts.TextWarning as JSON."""

    reason: Literal["round_trip", "unknown_text"]
    field: str
    message: str
    positions: list[int]
    """Characters of the text, from 0."""


class _Judged(Reply):
    overlap: list[float] | None
    """[T] share of the leading candidates that are among as many of the teacher's."""
    bad_events: list[bool] | None
    """[T]"""
    reliability: list[float] | None
    """[T] R_t in [0, 1]; never rises."""
    num_bad_events: int | None
    exhausted_at: int | None
    """Response tokens up to and including the one where R reached 0; None while R > 0."""
    verdict: Literal["continue", "truncate"]
    keep_tokens: int | None
    """With verdict "truncate": response tokens to keep."""
    policy: dict[str, Any] | None
    """As it was resolved: the metric and all of its constants."""


_OF_EXTRAS: dict[str, Any] = {
    in_report(column): (list[number_of(column)] | None, ...)  # type: ignore[misc]
    for column in MODEL_COLUMNS.extras
}
_Extras: Any = create_model("_Extras", __base__=Reply, **_OF_EXTRAS)


class _Scored(_Extras):
    response_ids: list[int]
    """[T]"""
    teacher_logprobs: list[float]
    """[T] nats, float32 as few digits as tell them apart"""
    teacher_topk_ids: list[list[int]]
    """[T][K] most likely first"""
    teacher_topk_logprobs: list[list[float]]
    """[T][K]"""
    candidate_ids: list[list[int]] | None
    """[T][C] as sent"""
    teacher_logprobs_at_candidates: list[list[float]] | None
    """[T][C]"""
    mean_logprob: float
    """nats a response token"""
    warnings: list[WarningReply]
    timing: Timing


class _Asked(Reply):
    model_id: str
    prompt_ids: list[int]
    k: int
    temperature: float
    texts: dict[str, str]
    """The text of every id that occurs, by the id; without those that have none."""


class AnalyzeReply(_Asked, _Scored, _Judged):
    """One response in columns: entry t of each is response token t."""


class FailedItem(Reply):
    """In place of a report."""

    error: ErrorDetail


class BatchReply(Reply):
    """The answers to a batch, in its order."""

    items: list[AnalyzeReply | FailedItem]


class ComparedReply(_Scored):
    """One response of a comparison."""

    name: str | None
    common_prefix_tokens: int
    """Leading tokens that are those of the first response."""
    judgements: list[_Judged]
    """One a policy, in their order."""


class FailedResponse(FailedItem):
    name: str | None


class CompareReply(_Asked):
    """Several responses to one prompt, in their order."""

    warnings: list[WarningReply]
    """Of the prompt."""
    responses: list[ComparedReply | FailedResponse]


def widest(policies: Sequence[DriftPolicy], k: int) -> int:
    """The top-k to score so that every policy sees its own."""
    return max([k, *(policy.metric.k for policy in policies)])
