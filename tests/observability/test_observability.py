"""Dashboards, alerts and the Compose fragment name what exists; nothing is started.

What needs a Prometheus is in try_observability.py. Run: pytest tests/observability
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prometheus_client import CollectorRegistry

from scripts.dashboards import DASHBOARDS as FOLDER_OF_DASHBOARDS
from scripts.dashboards import SOURCE, text_of
from scripts.teacher_panels import TEACHER
from scripts.trainer_panels import TRAINER
from student_trainer.diagnostics.replicas import ReplicaReading
from student_trainer.diagnostics.step_report import EvalReport
from student_trainer.recording.metrics import TrainerMetrics
from teacher_server.metrics.live import Readings
from teacher_server.metrics.server import Metrics
from teacher_wire.records import Timing
from tests.observability.promql import (
    DASHBOARDS,
    FOLDER,
    GUIDES,
    alerts,
    documented_queries,
    named_labels,
    named_metrics,
    panel_queries,
    panels,
    substituted,
)
from tests.teacher.http.http_teacher import INFO
from tests.tracked_files import ROOT
from tests.trainer.made_reports import profile_of_one_token, step_report

SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds."""
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "observability.yml").read_text())
METHOD = "/opd.teacher.v1.TeacherService/Session"


def used_teacher() -> CollectorRegistry:
    """Every family with a sample."""
    metrics = Metrics()
    metrics.serving(INFO)
    metrics.tenant("a")
    metrics.messages(METHOD)
    metrics.rpc_started(METHOD)
    metrics.rpc(METHOD, "OK", 1.0)
    metrics.http("/v1/score", 200, 0.1)
    metrics.loop_lag(0.1)
    metrics.limited({"max_sessions": 1}, lambda tenant: {"max_sessions": 1})
    kv = {"kv_used_ratio": 0.5, "kv_capacity_tokens": 100}
    metrics.watch(lambda: Readings(phase="serving", phases=("serving",), **kv))
    return metrics.registry


def used_trainer() -> CollectorRegistry:
    metrics = TrainerMetrics(run="r", student="s", steps=2)
    figures = {"overlap": 0.5, "max_tokens": 8, "sync_gap_nats": 0.1}
    metrics.step(replace(step_report(**figures), profile=profile_of_one_token()))
    metrics.evaluation(EvalReport(step=0, accuracy=0.5))
    metrics.round_trips("teacher")(0.1, Timing(queue_us=1, engine_us=1), "")
    reading = ReplicaReading(teacher="teacher", endpoint="a:1", up=True, losses=0)
    metrics.watch(lambda: [reading], lambda: {"teacher": 0})
    return metrics.registry


@cache
def known() -> dict[str, set[str]]:
    """Samples that teachers and trainers have -> their labels."""
    found: dict[str, set[str]] = {"up": set(), "ALERTS": set()}
    for registry in (used_teacher(), used_trainer()):
        for family in registry.collect():
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_what_grafana_needs(path: Any) -> None:
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= set(dashboard)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    for panel in panels(dashboard):
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == SOURCE
        assert panel["targets"]
    source = yaml.safe_load(
        (FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"][0]
    assert (source["uid"], source["type"]) == (SOURCE["uid"], SOURCE["type"])


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_grafanas_own_types_know_every_field_of_a_dashboard(path: Any) -> None:
    """Read by them and written again nothing is lost; their own defaults come on top."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    read = models.Dashboard.from_json(dashboard)
    assert list(lost(dashboard, json.loads(encoder.JSONEncoder().encode(read)))) == []
    dashboard["panels"][1]["fieldConfg"] = {}
    again = json.loads(encoder.JSONEncoder().encode(models.Dashboard.from_json(dashboard)))
    assert list(lost(dashboard, again)) == ["/panels[1]/fieldConfg"]


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """What of one tree is not in another, or is another value there."""
    if isinstance(given, dict):
        for key, value in given.items():
            below = f"{path}/{key}"
            yield from lost(value, kept[key], below) if key in kept else [below]
    elif isinstance(given, list):
        for index, pair in enumerate(zip(given, kept, strict=True)):
            yield from lost(*pair, f"{path}[{index}]")
    elif given != kept:
        yield path


@pytest.mark.parametrize("board", [TEACHER, TRAINER], ids=lambda board: board.name)
def test_a_dashboard_is_what_its_tables_say(board: Any) -> None:
    path = FOLDER_OF_DASHBOARDS / f"{board.name}.json"
    assert path.read_text(encoding="utf-8") == text_of(board), "make docs"
    assert board.variable in known()[board.listed_by] | SCRAPED


@pytest.mark.parametrize(
    "query",
    [
        *panel_queries(),
        *documented_queries(),
    ],
    ids=lambda query: query.where,
)
def test_a_query_names_metrics_and_labels_that_exist(query: Any) -> None:
    check_names(query.expr)
    shown = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
    metrics = named_metrics(substituted(query.expr))
    assert shown <= set.union(SCRAPED, *(known()[name] for name in metrics))


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_names_metrics_that_exist_and_a_section_of_the_guide(rule: dict[str, Any]) -> None:
    check_names(rule["expr"])
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    guide, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^### (\w+)$", (ROOT / guide).read_text("utf-8"), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]
    assert anchor == rule["alert"].lower()
    fired = (ROOT / "tests" / "observability" / "alerts.test.yml").read_text("utf-8")
    assert f'alertname="{rule["alert"]}"' in fired, "promtool is to try it"


def test_the_guide_has_no_section_without_an_alert() -> None:
    text = (ROOT / "docs" / "operations-alerts.md").read_text("utf-8")
    sections = re.findall(r"^### (\w+)$", text, re.MULTILINE)
    assert sections == [rule["alert"] for rule in alerts()]


def check_names(expr: str) -> None:
    expr = substituted(expr)
    metrics = named_metrics(expr)
    assert metrics, expr
    for name, labels in metrics.items():
        assert name in known(), f"{name} in {expr}"
        assert labels <= known()[name] | SCRAPED, f"{labels} of {name}"
    of_all = set.union(SCRAPED, *(known()[name] for name in metrics))
    assert named_labels(expr) <= of_all, expr


@pytest.mark.parametrize(
    "wrong",
    [
        "rate(teacher_computed_token_total[5m])",
        'teacher_sessions{phase="open"}',
        "sum by (tenant) (rate(teacher_computed_tokens_total[5m]))",
    ],
)
def test_a_wrong_name_is_seen(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_names(wrong)


def test_the_guides_hold_queries() -> None:
    assert len(list(documented_queries())) >= 3
    assert ROOT / "docs" / "operations-alerts.md" in GUIDES


def test_every_metric_of_a_trainer_is_explained_and_no_other() -> None:
    text = (ROOT / "docs" / "operations-trainer.md").read_text("utf-8")
    explained = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    exported = {
        family.name + "_total" * (family.type == "counter")
        for family in used_trainer().collect()
        if not family.name.startswith(("process_", "trainer_step_", "trainer_eval_"))
    }
    assert explained == exported


def test_the_fragment_fits_the_compose_specification() -> None:
    carrier = metadata.distribution("check-jsonschema")
    path = carrier.locate_file("check_jsonschema/builtin_schemas/vendor/compose-spec.json")
    schema = json.loads(Path(str(path)).read_text("utf-8"))
    validator = jsonschema.validators.validator_for(schema)
    assert [error.message for error in validator(schema).iter_errors(COMPOSE)] == []


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_watcher_may_do_no_more_than_it_must(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["profiles"] == ["observability"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"].split(":")[0] not in ("0", "root")
    assert re.fullmatch(r"[\w/.-]+:\$\{\w+_VERSION:-v?\d+\.\d+\.\d+\}", service["image"])
    (port,) = service["ports"]
    assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+_PORT:-\d+\}:\d+", port)
    for volume in service["volumes"]:
        source, *rest = volume.split(":")
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert rest[-1] == "ro"
        else:
            assert source in COMPOSE["volumes"]


def test_prometheus_looks_where_teachers_and_trainers_are() -> None:
    """Teachers by the names of their containers, which stay targets when a container is gone."""
    teacher, trainer = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert (teacher["job_name"], trainer["job_name"]) == ("teacher", "trainer")
    assert teacher["static_configs"] == [{"targets": ["teacher:8080", "teacher-b:8080"]}]
    (found,) = trainer["dns_sd_configs"]
    assert (found["names"], found["port"]) == (["trainers"], 9400)


def test_with_tls_prometheus_asks_the_same_teachers_with_their_authority() -> None:
    plain, tls = (
        yaml.safe_load((FOLDER / f"{name}.yml").read_text())
        for name in ("prometheus", "prometheus-tls")
    )
    teacher = tls["scrape_configs"][0]
    assert teacher.pop("scheme") == "https"
    assert teacher.pop("tls_config") == {"ca_file": "/run/secrets/teacher-ca.pem"}
    assert tls == plain
