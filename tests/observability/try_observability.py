"""A real Prometheus scrapes two teachers and two trainers under load, and every query answers.

Run: make test-observability, which needs Debian's package `prometheus`. The pictures of the panels
are written to $OBSERVABILITY_PICTURES, or to the test's folder.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.observability.drawing import draw
from tests.observability.load import START_S, Load, load
from tests.observability.prometheus import Prometheus, Series, program, prometheus
from tests.observability.promql import (
    DASHBOARDS,
    FOLDER,
    Named,
    alerts,
    documented_queries,
    panel_queries,
    substituted,
    watched,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(3600)
RATE_INTERVAL, STEP_S = "20s", 2.0
BEFORE_S, AWAY_S, AFTER_S = 60.0, 20.0, 40.0
"""Load with both replicas, with one of them killed, and with both again."""
SHORT = {"[5m]": "[30s]", "[10m]": "[30s]", "[30m]": "[30s]", "[1h]": "[30s]"}
"""A load of minutes in place of hours."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A load that has been watched from start to end."""

    load: Load
    prometheus: Prometheus
    start_s: float
    end_s: float

    def answer(self, expr: str) -> list[Series]:
        expr = substituted(expr, rate_interval=RATE_INTERVAL)
        for long, short in SHORT.items():
            expr = expr.replace(long, short)
        return self.prometheus.over(expr, self.start_s, self.end_s, STEP_S)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("observability")
    with ExitStack() as stack:
        running = stack.enter_context(load(folder))
        server = stack.enter_context(prometheus(folder, running.targets))
        addresses = {address for job in running.targets.values() for address in job}
        wait_until(lambda: server.healthy_targets() == addresses)
        steps = "min(trainer_done_steps) > 1 and count(trainer_done_steps) == 2"
        wait_until(lambda: bool(server.now(steps)), START_S)
        start_s = time.time()
        _until(start_s + BEFORE_S / 2)
        running.ask_in_every_other_way()
        _until(start_s + BEFORE_S)
        running.end("hf", signal.SIGKILL)
        _until(start_s + BEFORE_S + AWAY_S)
        running.start_teacher("hf")
        running.wait_until_ready("hf")
        running.ask_in_every_other_way()
        _until(time.time() + AFTER_S)
        for tenant in running.trainers:
            assert running.processes[tenant].poll() is None, running.log(tenant)
        yield Watched(running, server, start_s, time.time())


def _until(moment_s: float) -> None:
    time.sleep(max(0.0, moment_s - time.time()))


def numbers(answer: list[Series]) -> list[float]:
    return [value for series in answer for value in series.values if math.isfinite(value)]


def test_promtool_takes_the_configuration_and_the_rules() -> None:
    for command in (
        ["check", "config", str(FOLDER / "prometheus.yml")],
        ["check", "config", "--syntax-only", str(FOLDER / "prometheus-tls.yml")],
        ["check", "rules", "--lint-fatal", str(FOLDER / "alerts.yml")],
        ["test", "rules", str(Path(__file__).with_name("alerts.test.yml"))],
    ):
        done = subprocess.run(
            [program("promtool"), *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("query", list(panel_queries()), ids=lambda q: q.where)
def test_every_query_of_every_panel_returns_data(query: Named, seen: Watched) -> None:
    assert numbers(seen.answer(query.expr)), query.expr


@pytest.mark.parametrize("query", list(documented_queries()), ids=lambda q: q.expr)
def test_every_documented_query_returns_data(query: Named, seen: Watched) -> None:
    assert numbers(seen.answer(query.expr)), query.expr


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_looks_at_something(rule: dict[str, str], seen: Watched) -> None:
    assert numbers(seen.answer(watched(rule).expr)), rule["expr"]


def test_kv_in_use_is_seen_under_load_on_vllm(seen: Watched) -> None:
    """It read 0 at every scrape: vLLM frees what a step ends before it tells of the step."""
    port = seen.load.ports["vllm"][1]
    values = numbers(seen.answer(f'teacher_kv_used_ratio{{instance="127.0.0.1:{port}"}}'))
    busy = sum(value > 0 for value in values)
    assert busy > len(values) / 10, f"{busy} of {len(values)} above 0, most {max(values):.3f}"
    assert max(values) <= 1


def test_a_replica_that_was_killed_is_seen_by_its_trainer(seen: Watched) -> None:
    port = seen.load.ports["hf"][0]
    endpoint = f'endpoint="127.0.0.1:{port}"'
    up = numbers(seen.answer(f"trainer_replica_up{{{endpoint}}}"))
    assert {up[0], min(up), up[-1]} == {1.0, 0.0}
    assert up[-1] == 1.0
    assert max(numbers(seen.answer(f"trainer_replica_losses_total{{{endpoint}}}"))) == 1.0
    pending = seen.answer('ALERTS{alertname="TrainerReplicaDown"}')
    assert numbers(pending)
    said = seen.load.log("alice")
    assert f"127.0.0.1:{port} is not up, its sessions go on at the 1 of 2" in said
    assert f"127.0.0.1:{port} is up" in said


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_is_drawn(
    path: Path, seen: Watched, tmp_path_factory: pytest.TempPathFactory
) -> None:
    named = os.environ.get("OBSERVABILITY_PICTURES")
    folder = Path(named) if named else tmp_path_factory.mktemp("pictures")
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    answers = {
        target["expr"]: seen.answer(target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    }
    picture = folder / f"observability-{path.stem}.png"
    draw(dashboard, answers, seen.start_s, picture)
    assert picture.stat().st_size > 10_000
