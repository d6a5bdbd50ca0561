"""Records to messages and back: the only hand-written file that touches a message.

Arrays are little-endian and row-major. Every length is checked before it is used, and a wrong one
is an InvalidRequestError naming the field, the length and what it should be. Decoded arrays are
read-only views of the message's bytes where the element type allows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_wire.columns import Column, Width
from teacher_wire.drift_metrics import METRICS
from teacher_wire.errors import InvalidRequestError
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import (
    ROW_COLUMNS,
    ROW_FLAGS,
    DriftPolicy,
    DriftState,
    LogprobDtype,
    ScoreOptions,
    ScoreRows,
    Scores,
    TeacherInfo,
    Timing,
    TokenSpan,
    Verdict,
    concat_rows,
    slice_rows,
)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
MAX_REPLY_BYTES = 1 << 20
"""No message of scores is larger."""
MAX_MESSAGE_BYTES = 16 << 20
"""Message limit of both ends; gRPC's default of 4 MiB refuses an ordinary request."""
CHANNEL_LIMITS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
KEEPALIVE = (
    # A dead peer is found in 50 s at most.
    ("grpc.keepalive_time_ms", 30_000),
    # Not grpc.keepalive_timeout_ms, which has no effect on a silent peer: docs/LOG.md.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
ENVELOPE_BYTES = 1024
"""Room for everything in a reply that does not grow with its rows, the session's name aside."""

_I32, _U8 = np.dtype("<i4"), np.dtype("u1")
_F16, _F32 = np.dtype("<f2"), np.dtype("<f4")
_FLOATS: dict[LogprobDtype, np.dtype[Any]] = {LogprobDtype.F16: _F16, LogprobDtype.F32: _F32}
_F16_MIN = np.float32(np.finfo(np.float16).min)
_ON_WIRE: dict[LogprobDtype, tuple[tuple[Column, np.dtype[Any]], ...]] = {
    dtype: tuple((column, column.on_wire(floats)) for column in ROW_COLUMNS)
    for dtype, floats in _FLOATS.items()
}
"""The columns of rows, and the element of each in a message."""
_raw_columns: Callable[[pb.ScoreRows], tuple[bytes, ...]] = attrgetter(*ROW_COLUMNS.names)
_ROW_BYTES = {
    dtype: [sum(e.itemsize for c, e in columns if c.width is width) for width in Width]
    for dtype, columns in _ON_WIRE.items()
}
"""Of the columns of each width, by element of the log-probs."""

_DTYPE_TO_PB = {LogprobDtype.F16: pb.LOGPROB_DTYPE_F16, LogprobDtype.F32: pb.LOGPROB_DTYPE_F32}
_VERDICT_TO_PB = {Verdict.CONTINUE: pb.VERDICT_CONTINUE, Verdict.TRUNCATE: pb.VERDICT_TRUNCATE}
_DTYPE_FROM_PB: dict[int, LogprobDtype] = {value: key for key, value in _DTYPE_TO_PB.items()}
_VERDICT_FROM_PB: dict[int, Verdict] = {value: key for key, value in _VERDICT_TO_PB.items()}


# Arrays


def _decode_array(
    raw: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], field: str
) -> NDArray[Any]:
    try:  # both refuse a length that does not fit
        return np.frombuffer(raw, dtype).reshape(shape)
    except ValueError:
        raise _wrong_length(raw, dtype, shape, field) from None


def _wrong_length(
    raw: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], field: str
) -> InvalidRequestError:
    expected = math.prod(shape) * dtype.itemsize
    return InvalidRequestError(
        f"{field} has {len(raw)} bytes, must have {expected} for {list(shape)} {dtype.name}"
    )


def _encode_array(array: NDArray[Any], dtype: np.dtype[Any]) -> bytes:
    return array.astype(dtype, copy=False).tobytes()


def encode_ids(ids: NDArray[np.int32]) -> bytes:
    """Token ids as little-endian int32."""
    return _encode_array(ids, _I32)


def decode_ids(raw: bytes, field: str) -> NDArray[np.int32]:
    """[n] token ids; `field` names the field in the error for a broken length."""
    if len(raw) % 4:
        raise InvalidRequestError(f"{field} has {len(raw)} bytes, must be a multiple of 4")
    return np.frombuffer(raw, _I32)


# Options, policy, state


def encode_options(options: ScoreOptions) -> pb.ScoreOptions:
    return pb.ScoreOptions(
        k=options.k,
        temperature=options.temperature,
        logprob_dtype=_DTYPE_TO_PB[options.logprob_dtype],
        excluded_ids=[pb.IdRange(start=start, end=end) for start, end in options.excluded_ids],
        **{flag: getattr(options, flag) for flag in ROW_FLAGS},
    )


def decode_options(message: pb.ScoreOptions) -> ScoreOptions:
    return ScoreOptions(
        k=message.k,
        temperature=message.temperature,
        logprob_dtype=_decode_logprob_dtype(message.logprob_dtype),
        excluded_ids=tuple((ids.start, ids.end) for ids in message.excluded_ids),
        **{flag: getattr(message, flag) for flag in ROW_FLAGS},
    )


def _decode_logprob_dtype(value: int) -> LogprobDtype:
    if value not in _DTYPE_FROM_PB:
        raise InvalidRequestError(
            f"logprob_dtype is {value}, must be one of {sorted(_DTYPE_FROM_PB)}"
        )
    return _DTYPE_FROM_PB[value]


def encode_policy(policy: DriftPolicy | None) -> pb.DriftPolicy | None:
    if policy is None:
        return None
    message = pb.DriftPolicy(w_drop=policy.w_drop, stop_in_flight=policy.stop_in_flight)
    metric = getattr(message, policy.metric.name)
    metric.SetInParent()
    for field in fields(policy.metric):
        setattr(metric, field.name, getattr(policy.metric, field.name))
    return message


def decode_policy(message: pb.Open | pb.ScoreRequest) -> DriftPolicy | None:
    """The policy of a request; None for none, and InvalidRequestError for an unknown metric."""
    if not message.HasField("policy"):
        return None
    policy = message.policy
    name = policy.WhichOneof("metric")
    if name is None:
        raise InvalidRequestError(
            f"the drift policy has no metric that is known here, must have one of {sorted(METRICS)}"
        )
    metric, kind = getattr(policy, name), METRICS[name]
    return DriftPolicy(
        metric=kind(**{field.name: getattr(metric, field.name) for field in fields(kind)}),
        w_drop=policy.w_drop,
        stop_in_flight=policy.stop_in_flight,
    )


def encode_drift(drift: DriftState | None) -> pb.DriftState | None:
    if drift is None:
        return None
    return pb.DriftState(
        num_tokens=drift.num_tokens,
        num_bad_events=drift.num_bad_events,
        exhausted_at=drift.exhausted_at,
    )


def decode_drift(message: pb.DriftState) -> DriftState:
    return DriftState(
        num_tokens=message.num_tokens,
        num_bad_events=message.num_bad_events,
        exhausted_at=message.exhausted_at if message.HasField("exhausted_at") else None,
    )


# Spans and rows


def encode_span(span: TokenSpan) -> pb.TokenSpan:
    message = pb.TokenSpan()
    write_span(message, span)
    return message


def write_span(message: pb.TokenSpan, span: TokenSpan) -> None:
    """Fills an empty message: a part of a larger one is not copied into it."""
    message.offset = span.offset
    message.token_ids = encode_ids(span.token_ids)
    if span.candidate_ids is not None:
        message.num_candidates = span.candidate_ids.shape[1]
        message.candidate_ids = encode_ids(span.candidate_ids)
    if span.event_mask is not None:
        message.event_mask = _encode_array(span.event_mask, _U8)


def decode_span(message: pb.TokenSpan) -> TokenSpan:
    token_ids = decode_ids(message.token_ids, "token_ids")
    candidates = mask = None
    if message.HasField("candidate_ids"):
        shape = (len(token_ids), message.num_candidates)
        candidates = _decode_array(message.candidate_ids, _I32, shape, "candidate_ids")
    elif message.num_candidates:
        raise InvalidRequestError(
            f"num_candidates is {message.num_candidates} without candidate_ids, must be 0"
        )
    if message.HasField("event_mask"):
        mask = _decode_array(message.event_mask, _U8, (len(token_ids),), "event_mask") != 0
    return TokenSpan(
        offset=message.offset, token_ids=token_ids, candidate_ids=candidates, event_mask=mask
    )


def encode_rows(rows: ScoreRows, dtype: LogprobDtype) -> pb.ScoreRows:
    message = pb.ScoreRows()
    _write_rows(message, rows, dtype)
    return message


def _write_rows(message: pb.ScoreRows, rows: ScoreRows, dtype: LogprobDtype) -> None:
    message.offset = rows.offset
    message.count, message.k = rows.topk_ids.shape
    message.logprob_dtype = _DTYPE_TO_PB[dtype]
    if rows.candidate_logprobs is not None:
        message.num_candidates = rows.candidate_logprobs.shape[1]
    arrays = ROW_COLUMNS.arrays(rows)
    for (column, element), array in zip(_ON_WIRE[dtype], arrays, strict=True):
        if array is not None:
            if array.dtype is not element:
                if element is _F16:  # beyond half precision a log-prob would become -inf
                    array = np.maximum(array, _F16_MIN)
                array = array.astype(element)
            setattr(message, column.name, array.tobytes())


def decode_rows(message: pb.ScoreRows) -> ScoreRows:
    n, elements = message.count, _ON_WIRE[_decode_logprob_dtype(message.logprob_dtype)]
    shapes: tuple[tuple[int, ...], ...] = (n,), (n, message.k), (n, message.num_candidates)
    columns: dict[str, NDArray[Any]] = {}
    try:  # not in a function for each: this runs with every append
        for (column, element), raw in zip(elements, _raw_columns(message), strict=True):
            if raw or not column.asked_by or message.HasField(column.name):
                columns[column.name] = np.frombuffer(raw, element).reshape(shapes[column.width])
                if element is not column.in_memory:
                    columns[column.name] = columns[column.name].astype(column.in_memory)
    except ValueError:
        raise _wrong_length(raw, element, shapes[column.width], column.name) from None
    return ScoreRows(offset=message.offset, **columns)


# Answers


def row_bytes(k: int, num_candidates: int, dtype: LogprobDtype) -> int:
    """Bytes that one row takes on the wire at most."""
    one, top_k, candidates = _ROW_BYTES[dtype]
    return one + top_k * k + candidates * num_candidates


def encode_scores(
    scores: Scores, dtype: LogprobDtype, session_id: str
) -> Iterator[pb.SessionResponse]:
    """The answer to one append, as messages of at most MAX_REPLY_BYTES."""
    for rows, last in _chunks(scores.rows, dtype, ENVELOPE_BYTES + len(session_id.encode())):
        message = pb.SessionResponse()
        message.scores.session_id = session_id
        _write_answer(message.scores, rows, dtype, scores if last else None)
        yield message


def encode_score_responses(scores: Scores, dtype: LogprobDtype) -> Iterator[pb.ScoreResponse]:
    """The answer to one Score call, as messages of at most MAX_REPLY_BYTES."""
    for rows, last in _chunks(scores.rows, dtype, ENVELOPE_BYTES):
        message = pb.ScoreResponse()
        _write_answer(message, rows, dtype, scores if last else None)
        yield message


def _chunks(
    rows: ScoreRows, dtype: LogprobDtype, envelope_bytes: int
) -> Iterator[tuple[ScoreRows, bool]]:
    candidates = rows.candidate_logprobs
    num_candidates = 0 if candidates is None else candidates.shape[1]
    per_row = row_bytes(rows.topk_ids.shape[1], num_candidates, dtype)
    size = max(1, (MAX_REPLY_BYTES - envelope_bytes) // per_row)
    if len(rows) <= size:
        yield rows, True
        return
    stops = [*range(size, len(rows), size), len(rows)]
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        yield slice_rows(rows, start, stop), stop == len(rows)


def _write_answer(
    message: pb.Scores | pb.ScoreResponse,
    rows: ScoreRows,
    dtype: LogprobDtype,
    final: Scores | None,
) -> None:
    """One chunk; the last, with `final`, says what follows from all rows."""
    _write_rows(message.rows, rows, dtype)
    if final is None:
        return
    message.last = True
    message.verdict = _VERDICT_TO_PB[final.verdict]
    if (drift := encode_drift(final.drift)) is not None:
        message.drift.CopyFrom(drift)
    if final.keep_tokens is not None:
        message.keep_tokens = final.keep_tokens
    timing, spent = message.timing, final.timing
    timing.queue_us, timing.engine_us = spent.queue_us, spent.engine_us
    if spent.computed_tokens is not None:
        timing.computed_tokens = spent.computed_tokens


def decode_scores(chunks: list[pb.Scores] | list[pb.ScoreResponse]) -> Scores:
    """The answer that the chunks make up; the last of them must have `last` set."""
    if not chunks or not chunks[-1].last:
        raise InvalidRequestError(f"an answer of {len(chunks)} chunks ends without its last chunk")
    final = chunks[-1]
    if final.verdict not in _VERDICT_FROM_PB:
        raise InvalidRequestError(
            f"verdict is {final.verdict}, must be one of {sorted(_VERDICT_FROM_PB)}"
        )
    timing = final.timing
    return Scores(
        rows=concat_rows([decode_rows(chunk.rows) for chunk in chunks]),
        drift=decode_drift(final.drift) if final.HasField("drift") else None,
        verdict=_VERDICT_FROM_PB[final.verdict],
        keep_tokens=final.keep_tokens if final.HasField("keep_tokens") else None,
        timing=Timing(
            queue_us=timing.queue_us,
            engine_us=timing.engine_us,
            computed_tokens=timing.computed_tokens if timing.HasField("computed_tokens") else None,
        ),
    )


# Description of the teacher


def encode_info(info: TeacherInfo) -> pb.TeacherInfo:
    return pb.TeacherInfo(**{name: getattr(info, name) for name in info.__dataclass_fields__})


def decode_info(message: pb.TeacherInfo) -> TeacherInfo:
    fields = {name: getattr(message, name) for name in TeacherInfo.__dataclass_fields__}
    for name in ("special_token_ids", "end_token_ids", "token_digests"):
        fields[name] = tuple(fields[name])
    return TeacherInfo(**fields)
