"""The texts of a run, side by side. Run: python -m pytest tests/trainer/recording/test_texts.py"""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from student_trainer import cli
from student_trainer.diagnostics.step_report import EvalReport, SampleText
from student_trainer.recording.json_lines import drop_later, read_lines
from student_trainer.recording.report import draw, text_table
from student_trainer.recording.summary import summarize
from student_trainer.recording.texts import Texts, pairs, write_side_by_side
from tests.trainer.made_reports import step_report
from tests.trainer.recording.test_diagnostics_report import AFTER, BEFORE, NEAR, recorder, write_run


def many(word: str, count: int) -> tuple[SampleText, ...]:
    return tuple(
        SampleText(
            prompt_id=f"q{i}",
            sample=1,
            prompt=f"prompt {i}",
            response=f"{word} {i}",
            tokens=2,
            finish="stop",
            temperature=1.0,
            correct=i % 2 == 0,
            teacher_logprob=-1.5,
        )
        for i in range(count)
    )


def test_pairs_are_of_one_prompt_and_drawn_alike(tmp_path: Path) -> None:
    write_run(tmp_path)
    drawn = pairs(tmp_path, count=10)
    assert [(pair.before.response, pair.after.response) for pair in drawn] == [
        ("broken | pieces", "a whole sentence"),
        ("greedy", "greedy too"),
    ]
    text = write_side_by_side(tmp_path, drawn).read_text()
    assert "    broken | pieces\n" in text
    assert text.index("broken | pieces") < text.index("a whole sentence")


def test_pairs_are_drawn_by_the_seed(tmp_path: Path) -> None:
    with recorder(tmp_path) as (run, _):
        for step, word in ((0, "before"), (1, "between"), (2, "after")):
            run.evaluation(EvalReport(step=step, accuracy=0.0, samples=many(word, 30)))
    by_seed = [
        [pair.before.prompt_id for pair in pairs(tmp_path, count=10, seed=seed)]
        for seed in (0, 0, 1)
    ]
    assert by_seed[0] == by_seed[1] != by_seed[2]
    assert len(set(by_seed[0])) == 10
    for pair in pairs(tmp_path, count=10):
        number = pair.before.prompt_id.removeprefix("q")
        assert (pair.before.response, pair.after.response) == (
            f"before {number}",
            f"after {number}",
        )
    text = write_side_by_side(tmp_path, pairs(tmp_path, count=10)).read_text()
    assert "**after** (2 tokens, stop, right, teacher -1.50 nats a token)" in text


def test_one_evaluation_makes_no_pair(tmp_path: Path) -> None:
    assert pairs(tmp_path, count=3) == []
    with recorder(tmp_path) as (run, _):
        run.evaluation(EvalReport(step=0, accuracy=0.0, samples=BEFORE))
    assert pairs(tmp_path, count=3) == []


def test_a_resumed_run_keeps_the_texts_of_its_steps_only(tmp_path: Path) -> None:
    texts = Texts(tmp_path, append=False)
    for step in (1, 2, 3):
        texts.step(step_report(step, samples=many(f"step{step}", 2)))
    texts.evaluation(EvalReport(step=3, accuracy=0.0, samples=AFTER))
    texts.close()
    drop_later(tmp_path, 2)
    lines = read_lines(tmp_path / "samples" / "rollouts.jsonl")
    assert [line["response"] for line in lines] == ["step1 0", "step1 1", "step2 0", "step2 1"]
    assert (tmp_path / "samples" / "evaluations.jsonl").read_text() == ""


def test_report_shows_the_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "a whole sentence" in shown
    assert (tmp_path / "samples.md").is_file()
    output = StringIO()
    Console(file=output, width=100).print(text_table(pairs(tmp_path, count=1)))
    assert "broken | pieces" in output.getvalue()


def test_a_run_without_answers_is_drawn(tmp_path: Path) -> None:
    with recorder(tmp_path) as (run, output):
        run.evaluation(EvalReport(step=0, heldout=NEAR))
        run.step(step_report(1))
        run.evaluation(EvalReport(step=1, heldout=NEAR))
        assert "held out: reverse KL 1.250  teacher log-prob -3.000" in output.getvalue()
    (tmp_path / "profiles.jsonl").touch()
    assert draw(tmp_path, summarize(tmp_path)).stat().st_size > 10_000
