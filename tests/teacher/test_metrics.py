"""Names, labels and bounds of the metrics. Run: pytest tests/teacher/test_metrics.py"""

import re

import pytest
from grpc import StatusCode
from http_teacher import INFO
from prometheus_client.parser import text_string_to_metric_families

from teacher_server.metrics import OTHER, Metrics
from teacher_wire.errors import ERROR_CODES

SESSION = "/opd.teacher.v1.TeacherService/Session"
SESSION_LABELS = {
    "grpc_type": "bidi_stream",
    "grpc_service": "opd.teacher.v1.TeacherService",
    "grpc_method": "Session",
}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def used(metrics: Metrics) -> None:
    metrics.serving(INFO)
    metrics.tokens_scored(3, "a")
    metrics.append_done(0.001, 0.02)
    metrics.sessions_open(2)
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
        "teacher_sessions",
        "teacher_queue_wait_seconds",
        "teacher_engine_step_seconds",
        "teacher_tokens_scored",
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
    metrics.tokens_scored(4, "a")
    metrics.sessions_open(1)
    metrics.append_done(0.004, 0.03)
    assert value(metrics, "teacher_tokens_scored_total", tenant="a") == 7
    assert value(metrics, "teacher_sessions", state="open") == 1
    assert value(metrics, "teacher_queue_wait_seconds_count") == 2
    assert value(metrics, "teacher_engine_step_seconds_sum") == pytest.approx(0.05)
    assert value(metrics, "grpc_server_handled_total", **SESSION_LABELS, grpc_code="OK") == 1
    assert value(metrics, "grpc_server_handling_seconds_sum", **SESSION_LABELS) == 1.0


def test_two_servers_in_one_process_do_not_share_counts() -> None:
    first, second = Metrics(), Metrics()
    used(first)
    assert value(second, "teacher_tokens_scored_total", tenant="a") is None


def test_tenants_past_the_bound_are_counted_together() -> None:
    metrics = Metrics(max_tenants=2)
    for tenant in ("a", "b", "c", "d", "a"):
        metrics.tokens_scored(1, tenant)
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
