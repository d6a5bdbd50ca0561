"""Records survive the wire. Run: pytest tests/wire"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_wire import codec
from teacher_wire.columns import Column, Width
from teacher_wire.drift_metrics import METRICS, DriftMetric, OverlapRatio
from teacher_wire.errors import InvalidRequestError
from teacher_wire.id_ranges import ranges_of
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
)

PROPERTY = settings(max_examples=60, deadline=None)


def make_rows(n: int, k: int, num_candidates: int | None, optional: bool, seed: int) -> ScoreRows:
    rng = np.random.default_rng(seed)

    def values(column: Column) -> Any:
        widths = {Width.ONE: (), Width.TOP_K: (k,), Width.CANDIDATES: (num_candidates,)}
        shape = (n, *widths[column.width])
        if column.is_float:
            # Exact in half precision, so that both elements must give them back to the bit.
            return rng.uniform(-30, 0, shape).astype(np.float16).astype(np.float32)
        limit = {"|u1": 256, "|b1": 2}.get(column.element, 2**31)
        return rng.integers(0, limit, shape).astype(column.in_memory)

    columns = {
        column.name: values(column)
        for column in ROW_COLUMNS
        if (num_candidates is not None if column.width is Width.CANDIDATES else optional)
        or not column.asked_by
    }
    return ScoreRows(offset=int(rng.integers(0, 1000)), **columns)


def assert_equal(left: Any, right: Any) -> None:
    for entry in fields(left):
        a, b = getattr(left, entry.name), getattr(right, entry.name)
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            assert a is not None, entry.name
            assert b is not None, entry.name
            assert a.dtype == b.dtype, entry.name
            np.testing.assert_array_equal(a, b, err_msg=entry.name)
        elif isinstance(a, ScoreRows):
            assert_equal(a, b)
        else:
            assert a == b, entry.name


@PROPERTY
@given(
    n=st.integers(0, 5),
    k=st.integers(1, 4),
    num_candidates=st.none() | st.integers(0, 4),
    optional=st.booleans(),
    dtype=st.sampled_from(LogprobDtype),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_round_trip(
    n: int, k: int, num_candidates: int | None, optional: bool, dtype: LogprobDtype, seed: int
) -> None:
    rows = make_rows(n, k, num_candidates, optional, seed)
    message = pb.ScoreRows.FromString(codec.encode_rows(rows, dtype).SerializeToString())
    assert_equal(codec.decode_rows(message), rows)


@PROPERTY
@given(
    m=st.integers(0, 5),
    num_candidates=st.none() | st.integers(0, 3),
    masked=st.booleans(),
    offset=st.integers(0, 2**31),
    seed=st.integers(0, 2**32 - 1),
)
def test_spans_round_trip(
    m: int, num_candidates: int | None, masked: bool, offset: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    candidates = None
    if num_candidates is not None:
        candidates = rng.integers(-(2**31), 2**31, (m, num_candidates)).astype(np.int32)
    span = TokenSpan(
        offset=offset,
        token_ids=rng.integers(-(2**31), 2**31, m).astype(np.int32),
        candidate_ids=candidates,
        event_mask=rng.integers(0, 2, m).astype(bool) if masked else None,
    )
    message = pb.TokenSpan.FromString(codec.encode_span(span).SerializeToString())
    assert_equal(codec.decode_span(message), span)


def any_metric(kind: type[DriftMetric]) -> st.SearchStrategy[DriftMetric]:
    shares = {field.name: st.floats(1e-9, 1.0) for field in fields(kind) if field.name != "k"}
    return st.builds(kind, k=st.integers(1, 255), **shares)


@PROPERTY
@given(
    policy=st.builds(
        DriftPolicy,
        metric=st.one_of(map(any_metric, METRICS.values())),
        w_drop=st.floats(1e-9, 1.0),
        stop_in_flight=st.booleans(),
    ),
    options=st.builds(
        ScoreOptions,
        k=st.integers(1, 4096),
        temperature=st.floats(1e-3, 100.0),
        logprob_dtype=st.sampled_from(LogprobDtype),
        want_entropy=st.booleans(),
        want_rank=st.booleans(),
        excluded_ids=st.sets(st.integers(0, 2**31 - 1), max_size=20).map(ranges_of),
    ),
    state=st.builds(
        DriftState,
        num_tokens=st.integers(0, 2**31),
        num_bad_events=st.integers(0, 2**31),
        exhausted_at=st.none() | st.integers(0, 2**31),
    ),
)
def test_policy_options_and_state_round_trip_exactly(
    policy: DriftPolicy, options: ScoreOptions, state: DriftState
) -> None:
    encoded = codec.encode_policy(policy)
    assert encoded is not None
    message = pb.Open.FromString(pb.Open(policy=encoded).SerializeToString())
    assert codec.decode_policy(message) == policy
    assert codec.decode_options(codec.encode_options(options)) == options
    drift = codec.encode_drift(state)
    assert drift is not None
    assert codec.decode_drift(pb.DriftState.FromString(drift.SerializeToString())) == state


def test_thresholds_keep_double_precision() -> None:
    policy = DriftPolicy(metric=OverlapRatio(threshold=0.6))
    decoded = codec.decode_policy(pb.Open(policy=codec.encode_policy(policy)))
    assert decoded is not None
    assert isinstance(decoded.metric, OverlapRatio)
    assert not decoded.metric.threshold > 3 / 5
    assert float(np.float32(0.6)) > 3 / 5  # what a float field would have done


def test_absent_policy_reads_as_none() -> None:
    assert codec.decode_policy(pb.Open()) is None
    assert codec.decode_policy(pb.ScoreRequest()) is None


def test_a_policy_without_a_metric_that_is_known_here_is_refused() -> None:
    """A newer client's metric is a field that this side does not know."""
    for policy in (pb.DriftPolicy(w_drop=0.5), pb.DriftPolicy.FromString(b"\x7a\x00")):
        with pytest.raises(InvalidRequestError, match="no metric that is known here, must have"):
            codec.decode_policy(pb.Open(policy=policy))


def test_every_metric_is_in_the_contract_with_the_same_constants() -> None:
    oneof = pb.DriftPolicy.DESCRIPTOR.oneofs_by_name["metric"]
    contract = {field.name: set(field.message_type.fields_by_name) for field in oneof.fields}
    assert contract == {
        name: {field.name for field in fields(kind)} for name, kind in METRICS.items()
    }


def test_every_column_is_in_the_contract_and_so_is_the_flag_that_asks_for_it() -> None:
    arrays = {f.name for f in pb.ScoreRows.DESCRIPTOR.fields if f.type == f.TYPE_BYTES}
    flags = {f.name for f in pb.ScoreOptions.DESCRIPTOR.fields if f.type == f.TYPE_BOOL}
    assert arrays == set(ROW_COLUMNS.names)
    assert flags == set(ROW_FLAGS)


def test_info_round_trips() -> None:
    info = TeacherInfo(
        model_id="m",
        revision="r",
        weights_digest="d",
        dtype="bfloat16",
        vocab_size=7,
        tokenizer_fingerprint="f",
        special_token_ids=(1, 2),
        max_k=3,
        max_context=4,
        engine="fake",
        engine_version="1",
        instance_id="i",
        max_sessions=5,
        max_append_tokens=6,
        server_version="0",
        end_token_ids=(2, 5),
        token_digests=("0123456789abcdef", "f" * 16),
    )
    assert codec.decode_info(codec.encode_info(info)) == info


def test_golden_bytes_are_little_endian_and_row_major() -> None:
    ids = np.array([[1, 2], [3, 258]], np.int32)
    assert codec.encode_ids(ids).hex() == "01000000020000000300000002010000"
    rows = ScoreRows(
        offset=0,
        topk_ids=ids,
        topk_logprobs=np.array([[-1.0, -2.0], [-0.5, -4.0]], np.float32),
        token_logprobs=np.array([-1.0, -0.5], np.float32),
    )
    message = codec.encode_rows(rows, LogprobDtype.F16)
    assert message.topk_logprobs.hex() == "00bc00c000b800c4"
    assert codec.encode_rows(rows, LogprobDtype.F32).token_logprobs.hex() == "000080bf000000bf"


def test_half_precision_stays_finite() -> None:
    rows = make_rows(1, 1, None, False, 0)
    rows.token_logprobs[0] = -1e6
    decoded = codec.decode_rows(codec.encode_rows(rows, LogprobDtype.F16))
    assert decoded.token_logprobs[0] == np.finfo(np.float16).min


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("token_ids", b"\0" * 7, ("token_ids", "7", "multiple of 4")),
        ("candidate_ids", b"\0" * 4, ("candidate_ids", "4", "16")),
        ("event_mask", b"\0" * 3, ("event_mask", "3", "2")),
    ],
)
def test_hostile_span_lengths_are_named(field: str, value: bytes, parts: tuple[str, ...]) -> None:
    message = pb.TokenSpan(token_ids=b"\0" * 8, num_candidates=2, candidate_ids=b"\0" * 16)
    setattr(message, field, value)
    with pytest.raises(InvalidRequestError) as caught:
        codec.decode_span(message)
    for part in parts:
        assert part in caught.value.message


@pytest.mark.parametrize("field", ROW_COLUMNS.names)
def test_hostile_row_lengths_are_named(field: str) -> None:
    message = codec.encode_rows(make_rows(3, 2, 2, True, 0), LogprobDtype.F32)
    setattr(message, field, getattr(message, field) + b"\0")
    with pytest.raises(InvalidRequestError, match=f"{field} has .* bytes, must have"):
        codec.decode_rows(message)


def test_a_huge_count_is_refused_before_it_allocates() -> None:
    message = codec.encode_rows(make_rows(3, 2, None, False, 0), LogprobDtype.F32)
    message.count = 2**32 - 1
    message.k = 2**32 - 1
    with pytest.raises(InvalidRequestError, match="topk_ids"):
        codec.decode_rows(message)


@pytest.mark.parametrize("value", [0, 99])
def test_unknown_enums_are_refused(value: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"logprob_dtype is {value}"):
        codec.decode_options(pb.ScoreOptions(k=1, temperature=1.0, logprob_dtype=value))  # type: ignore[arg-type]


@given(
    shape=st.sampled_from([(0, 1), (1, 1), (5000, 128), (2048, 300), (9000, 16), (70000, 1)]),
    num_candidates=st.none() | st.integers(1, 64),
    dtype=st.sampled_from(LogprobDtype),
)
@settings(max_examples=12, deadline=None)
def test_large_answers_are_split_below_the_limit_and_joined_again(
    shape: tuple[int, int], num_candidates: int | None, dtype: LogprobDtype
) -> None:
    scores = Scores(
        rows=make_rows(*shape, num_candidates, True, 1),
        drift=DriftState(num_tokens=9, num_bad_events=4, exhausted_at=3),
        verdict=Verdict.TRUNCATE,
        keep_tokens=3,
        timing=Timing(queue_us=1, engine_us=2, computed_tokens=0),
    )
    session_id = "s" * 256
    chunks = [reply.scores for reply in codec.encode_scores(scores, dtype, session_id)]
    wire = [pb.SessionResponse(scores=chunk).SerializeToString() for chunk in chunks]
    assert max(map(len, wire)) <= codec.MAX_REPLY_BYTES
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert not any(chunk.verdict or chunk.HasField("drift") for chunk in chunks[:-1])
    assert_equal(codec.decode_scores(chunks), scores)
    assert_equal(codec.decode_scores(list(codec.encode_score_responses(scores, dtype))), scores)


def test_an_answer_with_a_gap_or_without_its_end_is_refused() -> None:
    scores = Scores(
        rows=make_rows(9000, 128, None, False, 1),
        drift=None,
        verdict=Verdict.CONTINUE,
        keep_tokens=None,
        timing=Timing(),
    )
    chunks = [reply.scores for reply in codec.encode_scores(scores, LogprobDtype.F32, "s")]
    assert len(chunks) > 2
    with pytest.raises(InvalidRequestError, match="must go on at"):
        codec.decode_scores([chunks[0], *chunks[2:]])
    with pytest.raises(InvalidRequestError, match="without its last chunk"):
        codec.decode_scores(chunks[:-1])
