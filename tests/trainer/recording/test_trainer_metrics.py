"""What Prometheus is told of a run, by reports and round trips, and where it is served.

Run: pytest tests/trainer/recording/test_trainer_metrics.py
"""

from __future__ import annotations

import io
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from student_trainer.assembly.metering import trainer_metrics
from student_trainer.diagnostics.alarms import Alarm
from student_trainer.diagnostics.replicas import ReplicaReading
from student_trainer.diagnostics.step_report import EvalReport, PhaseSeconds, StepReport
from student_trainer.errors import ConfigError
from student_trainer.process.ranks import ALONE, Ranks
from student_trainer.recording.metrics import TrainerMetrics, served
from student_trainer.recording.terminal import Bars
from student_trainer.rollouts.metered import MeteredSession
from student_trainer.settings.config import TrainerConfig, load_config
from teacher_wire.errors import CapacityError, TeacherError
from teacher_wire.records import Scores, Timing, TokenSpan
from tests.trainer.made_reports import profile_of_one_token, step_report
from tests.trainer.settings.smallest_config import SMALLEST

SPAN = TokenSpan(offset=0, token_ids=np.zeros(1, np.int32), candidate_ids=None, event_mask=None)


def made() -> TrainerMetrics:
    return TrainerMetrics(run="r", student="s", steps=9, clock=lambda: 50.0)


def value(metrics: TrainerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def configured(folder: Path, *overrides: str) -> TrainerConfig:
    path = folder / "trainer.toml"
    path.write_text(SMALLEST)
    return load_config(path, overrides)


def test_counts_are_the_sums_of_the_steps_and_figures_are_those_of_the_last() -> None:
    metrics = made()
    for step, loss in ((3, 0.5), (4, 0.25)):
        report = step_report(step, loss=loss, generated_tokens=100, kept_tokens=90)
        metrics.step(replace(report, profile=profile_of_one_token()))
    lost = PhaseSeconds(teacher_wait=2.0)
    metrics.step(StepReport(step=5, unscored_rollouts=4, seconds=lost))
    metrics.evaluation(EvalReport(step=5, accuracy=0.75))
    metrics.alarm(5, Alarm(kind="repetition", message="m"))
    assert value(metrics, "trainer_steps_total", kind="step") == 2
    assert value(metrics, "trainer_steps_total", kind="skipped") == 1
    assert value(metrics, "trainer_done_steps") == 5
    assert value(metrics, "trainer_planned_steps") == 9
    assert value(metrics, "trainer_last_step_timestamp_seconds") == 50.0
    assert value(metrics, "trainer_tokens_total", kind="kept") == 180
    assert value(metrics, "trainer_tokens_total", kind="generated") == 200
    assert value(metrics, "trainer_rollouts_total", end="stop") == 2
    assert value(metrics, "trainer_rollouts_total", end="lost") == 4
    assert value(metrics, "trainer_phase_seconds_total", phase="teacher_wait") == 2.5
    assert value(metrics, "trainer_warnings_total", kind="repetition") == 1
    assert value(metrics, "trainer_warnings_total", kind="weights") == 0
    assert value(metrics, "trainer_eval_accuracy") == 0.75
    assert value(metrics, "trainer_step_loss") is None, "the last step learnt nothing"
    metrics.step(step_report(6, staleness_min_version=4, loss=0.125))
    assert value(metrics, "trainer_step_loss") == 0.125
    assert value(metrics, "trainer_staleness_steps") == 1


def test_replicas_are_read_when_somebody_asks() -> None:
    metrics, up = made(), True
    metrics.watch(
        lambda: [ReplicaReading(teacher="teacher", endpoint="a:1", up=up, losses=3)],
        lambda: {"teacher": 7},
    )
    labels = {"teacher": "teacher", "endpoint": "a:1"}
    assert value(metrics, "trainer_replica_up", **labels) == 1
    up = False
    assert value(metrics, "trainer_replica_up", **labels) == 0
    assert value(metrics, "trainer_replica_losses_total", **labels) == 3
    assert value(metrics, "trainer_failovers_total", teacher="teacher") == 7


class Session:
    """Answers, or fails."""

    def __init__(self, answer: Scores | TeacherError) -> None:
        self.answer = answer
        self.closed = False

    async def append(self, span: TokenSpan) -> Scores:
        if isinstance(self.answer, TeacherError):
            raise self.answer
        return self.answer

    async def close(self) -> None:
        self.closed = True


async def test_a_round_trip_is_told_once_it_is_over_and_where_its_time_went() -> None:
    metrics = made()
    tell = metrics.round_trips("teachers.code")
    tell(1.0, Timing(queue_us=200_000, engine_us=300_000), "")
    labels = {"teacher": "teachers.code"}
    assert value(metrics, "trainer_teacher_round_trip_seconds_count", **labels) == 1
    for part, seconds in (("queue", 0.2), ("engine", 0.3), ("way", 0.5)):
        told = value(metrics, "trainer_teacher_seconds_total", part=part, **labels)
        assert told == pytest.approx(seconds)
    session = Session(CapacityError("full"))
    metered = MeteredSession(session, tell)
    with pytest.raises(CapacityError):
        await metered.append(SPAN)
    await metered.close()
    assert session.closed
    assert value(metrics, "trainer_teacher_round_trip_seconds_count", **labels) == 1
    name = "trainer_teacher_errors_total"
    assert value(metrics, name, type="CapacityError", **labels) == 1
    assert value(metrics, name, type="NotReadyError", **labels) == 0
    tell(1.0, None, "ErrorOfTomorrow")
    assert value(metrics, name, type="other", **labels) == 1


def test_they_are_served_within_the_block_and_the_port_is_free_after_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = configured(tmp_path, f"metrics.port={port}")
    for _ in range(2):
        with trainer_metrics(config, ALONE) as metrics:
            assert metrics is not None
            url = f"http://127.0.0.1:{port}/metrics"
            with urllib.request.urlopen(url, timeout=60) as reply:
                assert b"trainer_info{" in reply.read()
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(url, timeout=60)


def test_a_port_that_is_taken_is_refused_with_the_remedy(tmp_path: Path, taken: int) -> None:
    config = configured(tmp_path, f"metrics.port={taken}")
    with pytest.raises(ConfigError) as caught, trainer_metrics(config, ALONE):
        pass
    assert str(caught.value) == (
        f"metrics.port is {taken}, and 127.0.0.1:{taken} cannot be listened on: Address already in "
        "use; take another port, or 0 for none"
    )


def test_an_address_that_is_not_ours_is_refused(taken: int) -> None:
    with pytest.raises(ConfigError, match=f"metrics.port is {taken}, and 192.0.2.1:{taken} cannot"):
        with served(made(), "192.0.2.1", taken):
            pass


def test_without_a_port_there_are_none(tmp_path: Path) -> None:
    with trainer_metrics(configured(tmp_path), ALONE) as metrics:
        assert metrics is None


def test_of_several_processes_the_first_one_serves(
    tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "gathered", lambda self, own: [(None, None), own])
    config = configured(tmp_path, f"metrics.port={taken}")
    with trainer_metrics(config, Ranks(rank=1, world=2)) as metrics:
        assert metrics is None
    monkeypatch.setattr(Ranks, "gathered", lambda self, own: [(None, "metrics.port is"), own])
    with pytest.raises(ConfigError, match=r"process 0 has refused: metrics\.port is"):
        with trainer_metrics(config, Ranks(rank=1, world=2)):
            pass


def test_where_there_is_no_terminal_what_begins_is_a_line() -> None:
    """A container's log was silent until the first step, or for ten seconds of progress."""
    out = io.StringIO()
    with Bars(Console(file=out, width=80)) as bars:
        bars.note("reading the data, then loading some/student")
        bars.update("sampler", 0, 1, "starting vllm")
        bars.update("sampler", 0, 1, "starting vllm")
        bars.update("rollouts", 1, 2)
        bars.update("sampler", 1, 1, "ready")
    assert out.getvalue().splitlines() == [
        "reading the data, then loading some/student",
        "sampler 0/1 starting vllm",
        "sampler 1/1 ready",
    ]
