"""What a run says of itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from student_trainer import cli
from student_trainer.diagnostics.alarms import Alarm
from student_trainer.diagnostics.step import (
    BAND_TOKENS,
    effective_lengths,
    phase_seconds,
    rollout_report,
    step_profile,
)
from student_trainer.diagnostics.step_report import (
    EvalReport,
    HeldoutReport,
    PhaseSeconds,
    SampleText,
    StepReport,
)
from student_trainer.errors import ConfigError, DatasetError
from student_trainer.recording.json_lines import read_lines, read_profiles, read_run
from student_trainer.recording.phase_clock import PhaseClock
from student_trainer.recording.recorder import Recorder
from student_trainer.recording.report import draw, summary_table, warning_lines
from student_trainer.recording.run_figures import run_figures
from student_trainer.recording.summary import summarize, write_progress, write_summary
from student_trainer.recording.terminal import Bars
from student_trainer.records import Finish, RolloutTimes
from tests.trainer.made_reports import step_report
from tests.trainer.made_rollouts import plain_rollout

LINE_EVERY_S = "student_trainer.recording.terminal.LINE_EVERY_S"
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
    metrics = rollout_report([STOPPED, ENDED], overlap_k=4)
    assert metrics.rollouts == 2
    assert metrics.truncated_rollouts == 1
    assert metrics.generated_tokens == 15
    assert metrics.kept_tokens == 8
    assert metrics.overshoot_tokens == 7
    assert metrics.overshoot_mean == 7.0
    assert metrics.overshoot_bound_mean == 8.0
    assert metrics.length_mean == 4.0
    assert metrics.ended_by_student == 0.5
    assert metrics.staleness_min_version == 2
    assert metrics.overlap == pytest.approx((4 + 4 + 0 + 5 * 2) / 8 / 4)
    assert metrics.bad_event_rate == pytest.approx(2 / 8)


def test_unscored_tokens_are_no_overshoot() -> None:
    metrics = rollout_report([UNSCORED, ENDED], overlap_k=4)
    assert metrics.overshoot_tokens == 0
    assert metrics.overshoot_mean is None
    assert metrics.generated_tokens - metrics.kept_tokens == 8


def test_overlap_is_left_out_without_candidates() -> None:
    assert rollout_report([ENDED], overlap_k=None).overlap is None
    assert step_profile([ENDED], overlap_k=None).overlap_by_band is None


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
    assert profile.overlap_by_band == pytest.approx([first, 0.25], abs=1e-4)
    assert profile.rollouts_by_band == [2, 1]
    assert profile.band_tokens == BAND_TOKENS
    assert profile.lengths == [8, BAND_TOKENS + 3]


def test_band_ends_exactly_where_the_longest_does() -> None:
    profile = step_profile([plain_rollout(overlap_counts=[4] * BAND_TOKENS)], overlap_k=4)
    assert profile.overlap_by_band == [1.0]


def test_effective_length_counts_unmasked_tokens_before_reliability_was_gone() -> None:
    observed = plain_rollout(overlap_counts=[1] * 6, mask=[0, 1, 1, 1, 1, 1], exhausted_at=4)
    at_once = plain_rollout(overlap_counts=[1] * 6, exhausted_at=1)
    # R reaches 0 at token 3, which therefore does not count; a masked token never does.
    assert effective_lengths([STOPPED, ENDED, observed, at_once]) == [2, 4, 2, 0]


def test_clock_adds_up_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr("student_trainer.recording.phase_clock.time.monotonic", lambda: next(now))
    clock = PhaseClock()
    with clock.phase("learn"):
        pass
    with pytest.raises(KeyError), clock.phase("learn"):
        raise KeyError
    assert clock.seconds == {"learn": 3.0}


@contextmanager
def recorder(
    folder: Path, *, resume_from: int | None = None, overwrite: bool = False
) -> Iterator[tuple[Recorder, StringIO]]:
    """A recorder with a console that is no terminal."""
    output = StringIO()
    bars = Bars(Console(file=output, width=200))
    made = Recorder(folder, bars, resume_from=resume_from, overwrite=overwrite)
    try:
        yield made, output
    finally:
        made.close()


def stopped(truncated: int, *, overshoot: int) -> dict[str, float]:
    """What differs in a step with so many stopped rollouts."""
    changes: dict[str, float] = {
        "truncated_rollouts": truncated,
        "kept_tokens": 100 - overshoot,
        "overshoot_tokens": overshoot,
        "sync_gap_nats": 1e-6 * (1 + truncated),
    }
    if truncated:
        changes |= {"overshoot_mean": overshoot / truncated, "overshoot_bound_mean": 12.0}
    return changes


FAR = HeldoutReport(
    responses=4,
    tokens=60,
    unscored=0,
    reverse_kl=2.25,
    reverse_kl_se=0.125,
    teacher_logprob=-4.5,
    end_rate=0.25,
    band_tokens=16,
    overlap_by_band=[0.5, 0.25],
    responses_by_band=[4, 2],
)
NEAR = replace(FAR, reverse_kl=1.25, reverse_kl_se=None, teacher_logprob=-3.0, end_rate=0.5)


def text(response: str, *, prompt_id: str = "q1", sample: int = 1) -> SampleText:
    return SampleText(
        prompt_id=prompt_id,
        sample=sample,
        prompt="Say it",
        response=response,
        tokens=3,
        finish="stop",
        temperature=0.5,
    )


BEFORE = (text("broken | pieces"), text("only before", prompt_id="q2"), text("greedy", sample=0))
AFTER = (text("a whole sentence"), text("greedy too", sample=0))


def write_run(folder: Path) -> None:
    """Two steps between two evaluations."""
    with recorder(folder) as (run, _):
        run.evaluation(
            EvalReport(
                step=0,
                accuracy=0.1,
                avg_at_k={4: 0.05},
                pass_at_k={4: 0.2},
                heldout=FAR,
                samples=BEFORE,
            )
        )
        for step, (truncated, overshoot) in enumerate([(3, 30), (1, 6)], start=1):
            changes = stopped(truncated, overshoot=overshoot)
            run.step(step_report(step, [STOPPED, ENDED], **changes))
        run.evaluation(EvalReport(step=2, accuracy=0.9, heldout=NEAR, samples=AFTER))


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
        "avg_at_4_before": 0.05,
        "pass_at_4_before": 0.2,
        "pass_at_4_after": None,
        "heldout_reverse_kl_before": 2.25,
        "heldout_reverse_kl_after": 1.25,
        "heldout_end_rate_after": 0.5,
    }
    assert {name: summary[name] for name in expected} == expected
    path = write_summary(tmp_path, summary)
    assert json.loads(path.read_text()) == summary
    output = StringIO()
    Console(file=output, width=100).print(summary_table(summary))
    for shown in ("10.0% → 90.0%", "95.0%", "3 of 4", "1 of 4", "12.5%", "2.250 ± 0.125 → 1.250"):
        assert shown in output.getvalue()


def test_drawing_makes_a_picture(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = draw(tmp_path, summarize(tmp_path, {"teacher_accuracy": 0.95}))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_run_without_truncation_evaluation_and_overlap_is_drawn_too(tmp_path: Path) -> None:
    without = replace(ENDED, teacher=replace(ENDED.teacher, overlap_counts=None))
    with recorder(tmp_path) as (run, _):
        run.step(step_report(1, [without]))
    summary = summarize(tmp_path)
    assert "overshoot_mean" not in summary
    assert "accuracy_before" not in summary
    assert draw(tmp_path, summary).is_file()


def test_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"{tmp_path}/metrics\.jsonl: no such file"):
        summarize(tmp_path)


def test_run_without_a_step_is_named(tmp_path: Path) -> None:
    with recorder(tmp_path) as (run, _):
        run.evaluation(EvalReport(step=0, accuracy=0.1))
    with pytest.raises(DatasetError, match="no step was finished"):
        summarize(tmp_path)


BROKEN_LINES = {
    "cut short": ('{"kind": "step", "st', "not JSON"),
    "no object": ("[1, 2]", "must be an object with `step`"),
    "no step": ('{"kind": "eval", "accuracy": 1.0}', "must be an object with `step`"),
    "no kind": ('{"step": 3}', "kind must be one of"),
    "no figures": ('{"kind": "step", "step": 3}', "kind step lacks loss, loss_tokens"),
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
        lines.write("\n")
    with pytest.raises(DatasetError, match=re.escape(f"{path}:5: {reason}")):
        summarize(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == cli.EXIT_LASTING
    assert f"DatasetError: {path}:5: {reason}" in capsys.readouterr().err


def test_profile_that_is_broken_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "profiles.jsonl"
    path.write_text("{\n" + path.read_text())
    with pytest.raises(DatasetError, match=rf"{path}:1: not JSON"):
        run_figures(tmp_path)


def test_broken_line_before_the_last_stops_a_resume(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("{\n" + path.read_text())
    with (
        pytest.raises(DatasetError, match=rf"{path}:1: not JSON"),
        recorder(tmp_path, resume_from=1),
    ):
        pass


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_metric_that_is_not_finite_raises_and_is_not_written(tmp_path: Path, bad: float) -> None:
    with recorder(tmp_path) as (run, _):
        with pytest.raises(ValueError, match=f"metric loss of step 1 is {bad}"):
            run.step(step_report(loss=bad))
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    with recorder(tmp_path) as (run, output):
        run.step(step_report(**stopped(3, overshoot=30)))
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line)["seconds_learn"] == 0.5
        assert "stopped 3/4" in output.getvalue()


def test_step_of_special_tokens_alone_is_logged(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("reverse_kl", "weight_min", "weight_mean", "weight_max"))
    with recorder(tmp_path) as (run, output):
        run.step(step_report(**nothing))
    assert "step   1" in output.getvalue()


def test_resumed_run_counts_no_step_twice(tmp_path: Path) -> None:
    write_run(tmp_path)
    # Killed after step 2, resumed from the checkpoint of step 1.
    with recorder(tmp_path, resume_from=1) as (run, _):
        run.step(step_report(2, [ENDED]))
        run.evaluation(EvalReport(step=2, accuracy=0.8))
    summary = summarize(tmp_path)
    assert (summary["steps"], summary["overshoot_tokens"]) == (2, 30)
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.1, 0.8)
    lines = (tmp_path / "profiles.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_resumed_run_drops_a_line_that_was_cut_short(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    with recorder(tmp_path, resume_from=2):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_new_run_starts_its_record_anew(tmp_path: Path) -> None:
    write_run(tmp_path)
    with recorder(tmp_path, overwrite=True):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_warning_is_written_always_and_printed_at_times(tmp_path: Path) -> None:
    with recorder(tmp_path) as (run, output):
        for step in range(1, 24):
            rate, lost = 0.5 * (step >= 2), int(step == 20)
            run.step(step_report(step, [ENDED], repetition_rate=rate, unscored_rollouts=lost))
    printed = [line[:45] for line in output.getvalue().splitlines() if "warning" in line]
    assert printed == [
        "step   2  warning: 50% of the tokens continue",
        "step  12  warning: 50% of the tokens continue",
        "step  20  warning: the teacher stayed away: 1",
        "step  22  warning: 50% of the tokens continue",
    ]
    records = [r for r in read_lines(tmp_path / "metrics.jsonl") if r["kind"] == "warning"]
    assert [r["step"] for r in records if r["warning"] == "repetition"] == list(range(2, 24))
    draw(tmp_path, summarize(tmp_path))


def test_report_shows_each_kind_of_warning_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    assert warning_lines(summarize(tmp_path)) == []
    with recorder(tmp_path, resume_from=2) as (run, _):
        run.step(step_report(3, unscored_rollouts=1))
        run.step(step_report(4, unscored_rollouts=2))
    (line,) = warning_lines(summarize(tmp_path))
    assert line.startswith("warning at 2 of 4 steps (3 to 4): the teacher stayed away: 2 rollouts")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert line in " ".join(capsys.readouterr().out.split())


def test_first_step_is_known_after_a_resume(tmp_path: Path) -> None:
    with recorder(tmp_path) as (run, _):
        assert run.first_step is None
    write_run(tmp_path)
    with recorder(tmp_path, resume_from=2) as (run, _):
        assert run.first_step is not None
        assert run.first_step.generation is not None
        assert (run.first_step.step, run.first_step.generation.truncated_rollouts) == (1, 3)
        run.step(step_report(3))
        assert run.first_step.step == 1
        assert run.last_evaluation == 2
    with recorder(tmp_path, resume_from=0) as (run, _):
        assert run.first_step is None
        assert run.last_evaluation == 0
        run.step(step_report(1, loss=0.75))
        assert run.first_step == step_report(1, loss=0.75)


def test_what_was_written_is_read_back_as_the_same_report(tmp_path: Path) -> None:
    report = step_report(1, [STOPPED, ENDED], **stopped(2, overshoot=9))
    skipped = StepReport(step=2, unscored_rollouts=4, seconds=PhaseSeconds(teacher_wait=1.5))
    evaluation = EvalReport(
        step=2,
        accuracy=0.5,
        mean_tokens=7.0,
        ungraded=3,
        avg_at_k={8: 0.25},
        pass_at_k={1: 0.25, 8: 0.75},
        heldout=FAR,
    )
    with recorder(tmp_path) as (run, _):
        run.step(report)
        run.step(skipped)
        run.evaluation(evaluation)
    written = read_run(tmp_path)
    assert written.steps == [replace(report, profile=None)]
    assert written.skipped == [skipped]
    assert written.evaluations == [evaluation]
    assert written.steps_done == 2
    assert read_profiles(tmp_path) == {1: report.profile}
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert not any(value is None for line in lines for value in line.values())


def test_every_sink_is_told_everything(tmp_path: Path) -> None:
    told: list[object] = []

    class Listener:
        def step(self, report: StepReport) -> None:
            told.append(report.step)

        def evaluation(self, report: EvalReport) -> None:
            told.append(report.accuracy)

        def alarm(self, step: int, alarm: Alarm) -> None:
            told.append(alarm.kind)

        def close(self) -> None:
            told.append("closed")

    run = Recorder(tmp_path, Bars(Console(file=StringIO())))
    run.add(Listener())
    run.step(step_report(1, unscored_rollouts=1))
    run.evaluation(EvalReport(step=1, accuracy=0.5))
    run.close()
    assert told == [1, "unscored", 0.5, "closed"]


def test_only_the_run_itself_says_that_it_is_finished(tmp_path: Path) -> None:
    def said() -> tuple[object, ...]:
        summary = json.loads((tmp_path / "summary.json").read_text())
        return tuple(summary[name] for name in ("finished", "steps_done", "steps_planned"))

    with recorder(tmp_path):
        write_progress(tmp_path, finished=False, steps_planned=4)
    assert said() == (False, 0, 4)
    before = (tmp_path / "summary.json").read_text()
    write_run(tmp_path)
    (tmp_path / "summary.json").write_text(before)
    # The report keeps the run's word, and counts for itself.
    write_summary(tmp_path, summarize(tmp_path))
    assert said() == (False, 2, 4)
    output = StringIO()
    Console(file=output, width=100).print(summary_table(summarize(tmp_path)))
    assert "2 of 4" in output.getvalue()
    assert "--resume" in output.getvalue()
    write_progress(tmp_path, finished=True, steps_planned=2)
    assert said() == (True, 2, 2)
    (tmp_path / "summary.json").unlink()
    assert (summarize(tmp_path)["finished"], summarize(tmp_path)["steps_planned"]) == (None, None)


def test_without_a_terminal_a_line_now_and_then_stands_for_the_bars(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = StringIO()
    with Bars(Console(file=output)) as bars:
        monkeypatch.setattr(LINE_EVERY_S, math.inf)
        bars.update("rollouts", 1, 2)
        assert output.getvalue() == ""
        monkeypatch.setattr(LINE_EVERY_S, 0.0)
        bars.update("rollouts", 1, 2)
        bars.update("rollouts", 2, 2)
        bars.update("rollouts", 1, 3, "again")
    assert output.getvalue() == "rollouts 1/2\nrollouts 1/3 again\n"


def test_a_full_bar_starts_again_at_nought() -> None:
    output = StringIO()
    with Bars(Console(file=output, force_terminal=True, width=100)) as bars:
        bars.update("rollouts", 2, 2)
        bars.update("rollouts", 1, 3)
    assert "1/3" in output.getvalue()


def test_two_runs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    with Bars() as bars:
        first = Recorder(tmp_path, bars)
        with pytest.raises(ConfigError, match="another run is writing"):
            Recorder(tmp_path, bars)
        first.close()
        Recorder(tmp_path, bars).close()
