"""`student-trainer report`: pages of runs, whole ones and others.

Run: python -m pytest tests/trainer/recording/test_report_pages.py
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from rollout_records.schema import FOLDER, Origin
from rollout_records.writing import write_step
from run_report.drawing import Chart
from student_trainer import cli
from student_trainer.diagnostics.groups import GROUPS, group_of
from student_trainer.diagnostics.step_report import (
    PHASES,
    EvalReport,
    LearnReport,
    RolloutReport,
    StepReport,
)
from student_trainer.recording.run_figures import names_of, run_figures
from student_trainer.recording.summary import write_progress
from tests.records.made_rows import made_row
from tests.trainer.recording.test_diagnostics_report import write_run


@pytest.fixture(autouse=True)
def _not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pictures look like is tests/reports' affair."""
    monkeypatch.setattr(Chart, "svg", lambda chart: f"<svg>{chart.name}</svg>")
    monkeypatch.setattr("student_trainer.recording.report.overview", lambda _, path: path)


def test_a_run_that_was_cut_off_has_a_report_that_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    write_progress(tmp_path, finished=False, steps_planned=5)
    for name in ("metrics.jsonl", "profiles.jsonl"):
        path = tmp_path / name
        path.write_text(path.read_text()[:-9])
    whole = write_step(tmp_path / FOLDER, 1, 0, [made_row(0, step=1)], Origin())
    write_step(tmp_path / FOLDER, 2, 0, [made_row(0, step=2)], Origin())
    cut = tmp_path / FOLDER / "step-000003.parquet"
    cut.write_bytes(whole.read_bytes()[:500])
    assert cli.main(["report", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for note in (
        "The last line of metrics.jsonl is not whole, and left out.",
        "The last line of profiles.jsonl is not whole, and left out.",
        "The recorded rollouts of step 3 are left out",
        "2 of 5 steps are written: the run goes on, or was ended before its last one.",
    ):
        assert note in said
        assert note in (tmp_path / "report.html").read_text()
    assert "2 rollouts of step 1 to 2" in (tmp_path / "report.html").read_text()
    assert run_figures(tmp_path).steps.keys() == {1, 2}


def test_cut_texts_and_a_cut_summary_do_not_fail_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    write_progress(tmp_path, finished=False, steps_planned=2)
    assert not list(tmp_path.glob("*.partial"))
    texts = tmp_path / "samples" / "evaluations.jsonl"
    texts.write_text(texts.read_text()[:-9])
    assert cli.main(["report", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "The last line of evaluations.jsonl is not whole, and left out." in said
    assert "All 2 steps are written, but not that the run is finished" in said
    summary = tmp_path / "summary.json"
    summary.write_text(summary.read_text()[:-9])
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "summary.json is not whole, and left out" in capsys.readouterr().out


def test_several_runs_have_one_page_and_names_that_tell_them_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / part / "run" for part in ("a", "b")]
    for run in runs:
        write_run(run)
    assert cli.main(["report", *map(str, runs)]) == 0
    page = (runs[0] / "compared.html").read_text()
    assert "a/run" in page
    assert "b/run" in page
    assert not (runs[1] / "summary.json").exists()


def test_every_figure_has_a_group_and_few_are_in_one() -> None:
    names = {
        f.name
        for kind in (LearnReport, RolloutReport, StepReport, EvalReport)
        for f in fields(kind)
        if f.type not in ("PhaseSeconds", "LearnReport | None", "RolloutReport | None")
    } | {f"seconds_{phase}" for phase in PHASES}
    names -= {"step", "profile", "samples", "avg_at_k", "pass_at_k", "heldout"}
    grouped = [name for listed in GROUPS.values() for name in listed.split()]
    assert sorted(grouped) == sorted(names)
    assert max(len(listed.split()) for listed in GROUPS.values()) <= 14
    assert group_of("heldout_reverse_kl") == "heldout"
    assert group_of("pass_at_4") == "eval"
    assert group_of("my_own") == "other"


def test_names_of_runs_are_as_long_as_it_takes(tmp_path: Path) -> None:
    a, b, c = tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "other"
    assert names_of([a, c]) == ["run", "other"]
    assert names_of([a, b, c]) == ["x/run", "y/run", f"{tmp_path.name}/other"]
    assert names_of([a, a]) == ["run (1)", "run (2)"]
