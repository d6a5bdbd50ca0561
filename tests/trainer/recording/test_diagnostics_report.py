"""What a run says of itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from student_trainer import cli
from student_trainer.diagnostics import (
    BAND_TOKENS,
    Alarm,
    effective_lengths,
    phase_seconds,
    rollout_metrics,
    step_profile,
)
from student_trainer.errors import ConfigError, DatasetError
from student_trainer.recording.report import (
    draw,
    summarize,
    summary_table,
    warning_lines,
    write_summary,
)
from student_trainer.recording.run_log import Bars, PhaseClock, RunLog, read_lines
from student_trainer.records import Finish, RolloutTimes
from tests.trainer.made_rollouts import plain_rollout

STOPPED = plain_rollout(
    overlap_counts=[4, 4, 0],
    bad_events=[0, 0, 1],
    finish=Finish.TRUNCATED,
    num_generated=10,
    exhausted_at=3,
    policy_version=2,
    times=RolloutTimes(
        started_s=1.0, generated_s=4.0, scored_s=4.5, round_trip_tokens=5, verdict_span_tokens=3
    ),
)
ENDED = plain_rollout(
    overlap_counts=[2, 2, 2, 2, 2],
    bad_events=[0, 1, 0, 0, 0],
    mask=[1, 1, 0, 1, 1],
    policy_version=3,
    times=RolloutTimes(
        started_s=0.5, generated_s=6.0, scored_s=6.25, round_trip_tokens=0, verdict_span_tokens=0
    ),
)
UNSCORED = plain_rollout(
    overlap_counts=[4], bad_events=[0], finish=Finish.UNSCORED, num_generated=9, policy_version=3
)


def test_metrics_of_a_worked_example() -> None:
    metrics = rollout_metrics([STOPPED, ENDED], overlap_k=4)
    assert metrics["rollouts"] == 2
    assert metrics["truncated_rollouts"] == 1
    assert metrics["generated_tokens"] == 15
    assert metrics["kept_tokens"] == 8
    assert metrics["overshoot_tokens"] == 7
    assert metrics["overshoot_mean"] == 7.0
    assert metrics["overshoot_bound_mean"] == 8.0
    assert metrics["length_mean"] == 4.0
    assert metrics["ended_by_student"] == 0.5
    assert metrics["staleness_min_version"] == 2
    assert metrics["overlap"] == pytest.approx((4 + 4 + 0 + 5 * 2) / 8 / 4)
    assert metrics["bad_event_rate"] == pytest.approx(2 / 8)


def test_unscored_tokens_are_no_overshoot() -> None:
    metrics = rollout_metrics([UNSCORED, ENDED], overlap_k=4)
    assert metrics["overshoot_tokens"] == 0
    assert "overshoot_mean" not in metrics
    assert metrics["generated_tokens"] - metrics["kept_tokens"] == 8


def test_overlap_is_left_out_without_candidates() -> None:
    assert "overlap" not in rollout_metrics([ENDED], overlap_k=None)
    assert step_profile([ENDED], overlap_k=None)["overlap_by_band"] is None


def test_phase_seconds_are_of_the_whole_batch() -> None:
    assert phase_seconds([STOPPED, ENDED]) == (5.5, 0.25)


def test_scores_that_came_in_time_cost_no_wait() -> None:
    early = plain_rollout(
        overlap_counts=[1],
        times=RolloutTimes(
            started_s=0.0, generated_s=9.0, scored_s=8.0, round_trip_tokens=0, verdict_span_tokens=0
        ),
    )
    assert phase_seconds([early]) == (9.0, 0.0)


def test_overlap_bands_average_the_rollouts_that_reach_them() -> None:
    short = plain_rollout(overlap_counts=[4] * 8)
    long = plain_rollout(overlap_counts=[2] * BAND_TOKENS + [1] * 3)
    profile = step_profile([short, long], overlap_k=4)
    first = (8 * 1.0 + BAND_TOKENS * 0.5) / (8 + BAND_TOKENS)
    assert profile["overlap_by_band"] == pytest.approx([first, 0.25], abs=1e-4)
    assert profile["rollouts_by_band"] == [2, 1]
    assert profile["band_tokens"] == BAND_TOKENS
    assert profile["lengths"] == [8, BAND_TOKENS + 3]
    assert json.loads(json.dumps(profile)) == profile


def test_band_ends_exactly_where_the_longest_does() -> None:
    profile = step_profile([plain_rollout(overlap_counts=[4] * BAND_TOKENS)], overlap_k=4)
    assert profile["overlap_by_band"] == [1.0]


def test_effective_length_counts_unmasked_tokens_before_reliability_was_gone() -> None:
    observed = plain_rollout(overlap_counts=[1] * 6, mask=[0, 1, 1, 1, 1, 1], exhausted_at=4)
    at_once = plain_rollout(overlap_counts=[1] * 6, exhausted_at=1)
    # R reaches 0 at token 3, which therefore does not count; a masked token never does.
    assert effective_lengths([STOPPED, ENDED, observed, at_once]) == [2, 4, 2, 0]


def test_clock_adds_up_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr("student_trainer.recording.run_log.time.monotonic", lambda: next(now))
    clock = PhaseClock()
    with clock.phase("learn"):
        pass
    with pytest.raises(KeyError), clock.phase("learn"):
        raise KeyError
    clock.add("sync", 0.5)
    assert clock.seconds == {"learn": 3.0, "sync": 0.5}


@contextmanager
def run_log(folder: Path, *, resume_from: int | None = None) -> Iterator[tuple[RunLog, StringIO]]:
    """A log with a console that is no terminal."""
    output = StringIO()
    log = RunLog(folder, Bars(Console(file=output, width=200)), resume_from=resume_from)
    try:
        yield log, output
    finally:
        log.close()


def step_metrics(truncated: int, *, overshoot: int) -> dict[str, float]:
    """Scalars of one step of four rollouts."""
    metrics = {
        "loss": 0.5,
        "reverse_kl": 0.25,
        "length_mean": 20.0,
        "rollouts": 4,
        "truncated_rollouts": truncated,
        "generated_tokens": 100,
        "kept_tokens": 100 - overshoot,
        "overshoot_tokens": overshoot,
        "sync_gap_nats": 1e-6 * (1 + truncated),
    }
    if truncated:
        metrics |= {"overshoot_mean": overshoot / truncated, "overshoot_bound_mean": 12.0}
    return metrics


SECONDS = {"generate": 1.0, "teacher_wait": 0.25, "learn": 0.5, "sync": 0.25}


def write_run(folder: Path) -> None:
    """Two steps between two evaluations."""
    with run_log(folder) as (log, _):
        log.evaluation(0, {"accuracy": 0.1, "pass_at_1": 0.05, "pass_at_k": 0.2})
        for step, (truncated, overshoot) in enumerate([(3, 30), (1, 6)], start=1):
            log.step(step, step_metrics(truncated, overshoot=overshoot), SECONDS)
            log.profile(step, step_profile([STOPPED, ENDED], overlap_k=4))
        log.evaluation(2, {"accuracy": 0.9, "pass_at_1": None, "pass_at_k": None})


def test_summary_of_a_run_has_every_figure(tmp_path: Path) -> None:
    write_run(tmp_path)
    summary = summarize(tmp_path, {"teacher_accuracy": 0.95})
    expected = {
        "accuracy_before": 0.1,
        "accuracy_after": 0.9,
        "teacher_accuracy": 0.95,
        "steps": 2,
        "wall_s": 4.0,
        "generated_tokens": 200,
        "kept_tokens": 164,
        "overshoot_tokens": 36,
        "truncated_rollouts_first_step": 3,
        "truncated_rollouts_last_step": 1,
        "share": {"generate": 0.5, "teacher_wait": 0.125, "learn": 0.25, "sync": 0.125},
        "overshoot_mean": 9.0,
        "overshoot_bound_mean": 12.0,
        "sync_gap_nats_max": 4e-6,
        "pass_at_k_before": 0.2,
        "pass_at_k_after": None,
    }
    assert {name: summary[name] for name in expected} == expected
    path = write_summary(tmp_path, summary)
    assert json.loads(path.read_text()) == summary
    output = StringIO()
    Console(file=output, width=100).print(summary_table(summary))
    for shown in ("10.0% → 90.0%", "95.0%", "3 of 4", "1 of 4", "12.5%"):
        assert shown in output.getvalue()


def test_drawing_makes_a_picture(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = draw(tmp_path, summarize(tmp_path, {"teacher_accuracy": 0.95}))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_run_without_truncation_evaluation_and_overlap_is_drawn_too(tmp_path: Path) -> None:
    with run_log(tmp_path) as (log, _):
        log.step(1, step_metrics(0, overshoot=0), SECONDS)
        log.profile(1, step_profile([ENDED], overlap_k=None))
    summary = summarize(tmp_path)
    assert "overshoot_mean" not in summary
    assert "accuracy_before" not in summary
    assert draw(tmp_path, summary).is_file()


def test_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"{tmp_path}/metrics\.jsonl: no such file"):
        summarize(tmp_path)


def test_run_without_a_step_is_named(tmp_path: Path) -> None:
    with run_log(tmp_path) as (log, _):
        log.evaluation(0, {"accuracy": 0.1})
    with pytest.raises(DatasetError, match="no step was finished"):
        summarize(tmp_path)


BROKEN_LINES = {
    "cut short": ('{"kind": "step", "st', "not JSON"),
    "no object": ("[1, 2]", "must be an object with `step`"),
    "no step": ('{"kind": "eval", "accuracy": 1.0}', "must be an object with `step`"),
    "no kind": ('{"step": 3}', "kind must be one of"),
    "no figures": ('{"kind": "step", "step": 3}', "kind step lacks generated_tokens"),
    "eval without figures": ('{"kind": "eval", "step": 3}', "kind eval lacks accuracy"),
}


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_line_that_is_broken_is_named(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    line, reason = BROKEN_LINES[case]
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as lines:
        lines.write(line)
    with pytest.raises(DatasetError, match=re.escape(f"{path}:5: {reason}")):
        summarize(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == cli.EXIT_FAILED
    assert f"DatasetError: {path}:5: {reason}" in capsys.readouterr().err


def test_profile_that_is_broken_or_absent_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    summary = summarize(tmp_path)
    path = tmp_path / "profiles.jsonl"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DatasetError, match=rf"{path}:2: not JSON"):
        draw(tmp_path, summary)
    path.unlink()
    with pytest.raises(DatasetError, match=rf"{path}: no such file"):
        draw(tmp_path, summary)


def test_broken_line_before_the_last_stops_a_resume(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("{\n" + path.read_text())
    with (
        pytest.raises(DatasetError, match=rf"{path}:1: not JSON"),
        run_log(tmp_path, resume_from=1),
    ):
        pass


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_metric_that_is_not_finite_raises_and_is_not_written(tmp_path: Path, bad: float) -> None:
    with run_log(tmp_path) as (log, _):
        metrics = step_metrics(0, overshoot=0) | {"loss": bad}
        with pytest.raises(ValueError, match=f"metric loss of step 1 is {bad}"):
            log.step(1, metrics, SECONDS)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    with run_log(tmp_path) as (log, output):
        log.step(1, step_metrics(3, overshoot=30), SECONDS)
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line)["seconds_learn"] == 0.5
        assert "stopped 3/4" in output.getvalue()


def test_step_of_special_tokens_alone_is_logged(tmp_path: Path) -> None:
    metrics = step_metrics(0, overshoot=0)
    del metrics["reverse_kl"]
    with run_log(tmp_path) as (log, output):
        log.step(1, metrics, SECONDS)
    assert "step   1" in output.getvalue()


def test_resumed_run_counts_no_step_twice(tmp_path: Path) -> None:
    write_run(tmp_path)
    # Killed after step 2, resumed from the checkpoint of step 1.
    with run_log(tmp_path, resume_from=1) as (log, _):
        log.step(2, step_metrics(0, overshoot=0), SECONDS)
        log.profile(2, step_profile([ENDED], overlap_k=4))
        log.evaluation(2, {"accuracy": 0.8})
    summary = summarize(tmp_path)
    assert (summary["steps"], summary["overshoot_tokens"]) == (2, 30)
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.1, 0.8)
    lines = (tmp_path / "profiles.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_resumed_run_drops_a_line_that_was_cut_short(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    with run_log(tmp_path, resume_from=2):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_new_run_starts_its_record_anew(tmp_path: Path) -> None:
    write_run(tmp_path)
    with run_log(tmp_path):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_warning_is_written_always_and_printed_at_times(tmp_path: Path) -> None:
    loop, lost = (Alarm(kind=kind, message=f"[{kind}] is bad") for kind in ("loop", "lost"))
    with run_log(tmp_path) as (log, output):
        for step in range(1, 24):
            log.step(step, step_metrics(0, overshoot=0), SECONDS)
            log.alarms(step, [loop] * (step >= 2) + [lost] * (step == 20))
    printed = [line for line in output.getvalue().splitlines() if "warning" in line]
    assert printed == [
        "step   2  warning: [loop] is bad",
        "step  12  warning: [loop] is bad",
        "step  20  warning: [lost] is bad",
        "step  22  warning: [loop] is bad",
    ]
    records = [r for r in read_lines(tmp_path / "metrics.jsonl") if r["kind"] == "warning"]
    assert [r["step"] for r in records if r["warning"] == "loop"] == list(range(2, 24))
    draw(tmp_path, summarize(tmp_path))


def test_report_shows_each_kind_of_warning_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    assert warning_lines(summarize(tmp_path)) == []
    with run_log(tmp_path, resume_from=2) as (log, _):
        log.alarms(1, [Alarm(kind="loop", message="30% [loop]")])
        log.alarms(2, [Alarm(kind="loop", message="40% [loop]")])
    (line,) = warning_lines(summarize(tmp_path))
    assert line == "warning at 2 of 2 steps (1 to 2): 40% [loop]"
    assert cli.main(["report", str(tmp_path)]) == 0
    assert line in capsys.readouterr().out


def test_first_step_is_known_after_a_resume(tmp_path: Path) -> None:
    with run_log(tmp_path) as (log, _):
        assert log.first_step == {}
    write_run(tmp_path)
    with run_log(tmp_path, resume_from=2) as (log, _):
        assert (log.first_step["step"], log.first_step["truncated_rollouts"]) == (1, 3)
        log.step(3, step_metrics(0, overshoot=0), SECONDS)
        assert log.first_step["step"] == 1
    with run_log(tmp_path, resume_from=0) as (log, _):
        assert log.first_step == {}
        log.step(1, step_metrics(2, overshoot=9), SECONDS)
        assert log.first_step["truncated_rollouts"] == 2


def test_bars_are_silent_without_a_terminal_and_start_again() -> None:
    output = StringIO()
    with Bars(Console(file=output)) as bars:
        bars.update("rollouts", 2, 2)
        bars.update("rollouts", 1, 3)
    assert output.getvalue() == ""


def test_two_runs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    with Bars() as bars:
        first = RunLog(tmp_path, bars)
        with pytest.raises(ConfigError, match="another run is writing"):
            RunLog(tmp_path, bars)
        first.close()
        RunLog(tmp_path, bars).close()
