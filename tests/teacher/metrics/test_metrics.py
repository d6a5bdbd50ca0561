"""Names, labels and bounds of the metrics. Run: pytest tests/teacher/metrics/test_metrics.py"""

import asyncio
import re
from itertools import accumulate

import numpy as np
import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from teacher_server.metrics.live import Readings
from teacher_server.metrics.server import OTHER, Metrics
from teacher_server.metrics.tallies import TenantTally, TimeTally
from teacher_server.scoring.session import Session
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.errors import ERROR_CODES, CapacityError, DeadlineError, EngineError
from teacher_wire.records import DriftPolicy, ScoreOptions, Timing
from tests.teacher.http.http_teacher import INFO
from tests.teacher.scoring.fake_rows import make_span

SESSION = "/opd.teacher.v1.TeacherService/Session"
SESSION_LABELS = {
    "grpc_type": "bidi_stream",
    "grpc_service": "opd.teacher.v1.TeacherService",
    "grpc_method": "Session",
}


POLICY = DriftPolicy(metric=OverlapRatio(k=8), w_drop=0.05)


def session_of(tally: TenantTally, policy: DriftPolicy | None) -> Session:
    return Session(
        session_id="s",
        tenant="a",
        prompt_ids=np.zeros(1, np.int32),
        options=ScoreOptions(k=8),
        policy=policy,
        tally=tally,
        last_used=0.0,
    )


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def used(metrics: Metrics) -> None:
    metrics.serving(INFO)
    metrics.tenant("a").tokens_scored += 3
    metrics.append_done(Timing(queue_us=1000, engine_us=20_000, computed_tokens=5))
    metrics.sessions_open(2)
    metrics.messages(SESSION).received += 1
    metrics.error("CapacityError")
    metrics.rpc_started(SESSION)
    metrics.rpc(SESSION, "OK", 1.0)
    metrics.http("/v1/score", 200, 0.1)


def test_every_family_has_its_published_name() -> None:
    metrics = Metrics()
    used(metrics)
    names = {family.name for family in text_string_to_metric_families(metrics.render().decode())}
    assert {
        "grpc_server_started",
        "grpc_server_handled",
        "grpc_server_handling_seconds",
        "grpc_server_msg_received",
        "grpc_server_msg_sent",
        "teacher_sessions",
        "teacher_queue_depth",
        "teacher_batch_tokens",
        "teacher_batch_sessions",
        "teacher_kv_used_ratio",
        "teacher_evictions",
        "teacher_admission",
        "teacher_dropped",
        "teacher_send_queue_bytes",
        "teacher_event_loop_lag_seconds",
        "teacher_resumes",
        "teacher_queue_wait_seconds",
        "teacher_engine_step_seconds",
        "teacher_tokens_scored",
        "teacher_computed_tokens",
        "teacher_errors",
        "teacher_build_info",
        "teacher_http_request_seconds",
        "process_open_fds",
    } <= names
    ours = {name for name in names if not name.startswith(("process_", "python_"))}
    assert all(re.match("grpc_server_|teacher_", name) for name in ours)


def test_values_are_the_sums_of_what_was_reported() -> None:
    metrics = Metrics()
    used(metrics)
    metrics.tenant("a").tokens_scored += 4
    metrics.sessions_open(1)
    metrics.append_done(Timing(queue_us=4000, engine_us=30_000, computed_tokens=4))
    assert value(metrics, "teacher_tokens_scored_total", tenant="a") == 7
    assert value(metrics, "teacher_computed_tokens_total") == 9
    assert value(metrics, "teacher_sessions", state="open") == 1
    assert value(metrics, "teacher_queue_wait_seconds_count") == 2
    assert value(metrics, "teacher_engine_step_seconds_sum") == pytest.approx(0.05)
    assert value(metrics, "grpc_server_handled_total", **SESSION_LABELS, grpc_code="OK") == 1
    assert value(metrics, "grpc_server_handling_seconds_sum", **SESSION_LABELS) == 1.0


def test_what_is_held_is_read_at_every_scrape() -> None:
    metrics = Metrics()
    depth = 3
    metrics.watch(lambda: Readings(queue_depth=depth, phase="b", phases=("a", "b")))
    assert value(metrics, "teacher_queue_depth") == 3
    depth = 5
    assert value(metrics, "teacher_queue_depth") == 5
    assert value(metrics, "teacher_phase", phase="a") == 0
    assert value(metrics, "teacher_phase", phase="b") == 1
    assert value(metrics, "teacher_kv_used_ratio") is None, "a missing value is never a number"


def test_a_query_counts_under_what_became_of_it() -> None:
    metrics = Metrics()
    tally = metrics.tenant("a")
    errors = [asyncio.CancelledError(), CapacityError("x"), DeadlineError("x"), EngineError("x")]
    for error in errors:
        tally.failed(error)
    for outcome in ("admitted", "refused", "expired", "cancelled"):
        assert value(metrics, "teacher_admission_total", outcome=outcome, tenant="a") == 1
    for reason in ("deadline", "cancelled"):
        assert value(metrics, "teacher_dropped_total", reason=reason) == 1


def test_verdicts_are_counted_by_tenant_and_only_where_a_policy_judged() -> None:
    """There were none: whether the teacher stops anything was nowhere to be seen."""
    metrics = Metrics()
    tally = metrics.tenant("a")
    for span in (make_span(4, seed=1), make_span(4, seed=2)):
        session_of(tally, policy=None).take_in(span, None)
        session_of(tally, policy=POLICY).take_in(span, np.zeros(4, np.bool_))
    tally.admitted += 4
    tally.truncated += 1
    tally.failed(EngineError("x"))
    for verdict, count in (("continue", 1), ("truncate", 1)):
        assert value(metrics, "teacher_verdicts_total", verdict=verdict, tenant="a") == count
    assert value(metrics, "teacher_admission_total", outcome="admitted", tenant="a") == 5


def test_limits_are_gauges_beside_what_they_limit() -> None:
    metrics = Metrics(max_tenants=1)
    metrics.tenant("a")
    limits_of_a = {"max_sessions": 3}
    metrics.limited({"max_sessions": 7}, lambda tenant: limits_of_a if tenant == "a" else {})
    metrics.watch(lambda: Readings(tenant_sessions={"a": 2, "b": 1, "c": 1}, session_tokens=9))
    assert value(metrics, "teacher_limit", setting="max_sessions") == 7
    assert value(metrics, "teacher_tenant_limit", setting="max_sessions", tenant="a") == 3
    assert value(metrics, "teacher_tenant_sessions", tenant="a") == 2
    assert value(metrics, "teacher_session_tokens") == 9
    metrics.tenant("b")
    assert value(metrics, "teacher_tenant_sessions", tenant=OTHER) == 2
    assert value(metrics, "teacher_tenant_limit", setting="max_sessions", tenant=OTHER) is None


def test_two_servers_in_one_process_do_not_share_counts() -> None:
    first, second = Metrics(), Metrics()
    used(first)
    assert value(second, "teacher_tokens_scored_total", tenant="a") is None


def test_tenants_past_the_bound_are_counted_together() -> None:
    metrics = Metrics(max_tenants=2)
    for tenant in ("a", "b", "c", "d", "a"):
        metrics.tenant(tenant).tokens_scored += 1
    name = "teacher_tokens_scored_total"
    assert value(metrics, name, tenant="a") == 2
    assert value(metrics, name, tenant=OTHER) == 2
    assert value(metrics, name, tenant="c") is None


@pytest.mark.parametrize("code", [StatusCode.NOT_FOUND, "NOT_FOUND"])
def test_a_status_counts_under_its_grpc_name(code: StatusCode | str) -> None:
    metrics = Metrics()
    metrics.rpc(SESSION, code, 0.1)
    assert value(metrics, "grpc_server_handled_total", **SESSION_LABELS, grpc_code="NOT_FOUND") == 1


def test_names_from_outside_never_become_labels() -> None:
    metrics = Metrics()
    metrics.rpc("/evil/" + "x" * 40, "MADE_UP", 0.1)
    metrics.rpc("no slash", "OK", 0.1)
    metrics.error("MadeUpError")
    text = metrics.render().decode()
    assert "xxxx" not in text
    assert "MADE_UP" not in text
    assert "MadeUp" not in text
    assert value(metrics, "teacher_errors_total", type=OTHER) == 1


def test_every_error_class_counts_under_its_own_name() -> None:
    metrics = Metrics()
    for error_class in ERROR_CODES:
        metrics.error(error_class.__name__)
        assert value(metrics, "teacher_errors_total", type=error_class.__name__) == 1


def test_a_bound_below_one_tenant_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tenants is 0"):
        Metrics(max_tenants=0)


@given(st.lists(st.one_of(st.sampled_from([0, 10, 500, 30_000]), st.integers(0, 100_000))))
def test_times_by_bucket_are_those_of_a_prometheus_histogram(us: list[int]) -> None:
    bounds = (10, 500, 30_000)
    tally, registry = TimeTally(bounds), CollectorRegistry()
    slow = Histogram("slow", "The same.", buckets=bounds, registry=registry)
    for each in us:
        tally.add(each)
        slow.observe(each)
    ends = [*(str(float(bound)) for bound in bounds), "+Inf"]
    for end, count in zip(ends, accumulate(tally.counts), strict=True):
        assert registry.get_sample_value("slow_bucket", {"le": end}) == count
    assert registry.get_sample_value("slow_sum") == tally.total_us
