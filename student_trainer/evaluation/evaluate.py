"""An evaluation, put together: what the responses say, as one report. Pure but for the grader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from student_trainer.diagnostics.step_report import EvalReport, SampleText
from student_trainer.errors import DatasetError
from student_trainer.evaluation.grading import Grader
from student_trainer.evaluation.heldout import heldout_report
from student_trainer.evaluation.passes import average, mean_pass_at_k, share_right
from student_trainer.evaluation.responses import Response
from student_trainer.records import Finish, Prompt, Rollout

Decode = Callable[[NDArray[np.int32]], str]


def check_problems(problems: Sequence[Prompt], grader: Grader) -> None:
    """Raises DatasetError for held-out problems that cannot be evaluated together, naming the row.

    Either all have an answer, or none has: then the teacher alone says how good a response is.
    """
    without = [problem for problem in problems if problem.answer is None]
    if without and len(without) < len(problems):
        raise DatasetError(
            f"{without[0].prompt_id}: no answer to compare with, and {len(problems) - len(without)}"
            f" of {len(problems)} problems of data.heldout have one: give it an answer, or keep "
            "problems without in a file of their own"
        )
    grader.check(problems)


def evaluation_report(
    responses: Sequence[Response],
    grader: Grader,
    decode: Decode,
    *,
    step: int,
    pass_k: Sequence[int],
    overlap_k: int | None,
    num_texts: int,
) -> EvalReport:
    """Everything that responses to held-out problems say.

    `pass_k` are the k of pass@k, none for an evaluation without samples; texts of `num_texts`
    responses are kept, of as many problems as that gives.
    """
    texts = [decode(response.token_ids) for response in responses]
    grades = _grades(responses, texts, grader)
    graded = [response.request.graded for response in responses]
    greedy, sampled = _by_problem(responses, grades)
    scored = [response.rollout for response in responses if response.request.scored]
    lengths = [len(r.token_ids) for r in responses if r.request.graded and r.request.sample == 0]
    num_samples = max(map(len, sampled), default=0)
    averaged = average(sampled) if num_samples else None
    passed = {k: mean_pass_at_k(sampled, k) for k in pass_k if k <= num_samples}
    return EvalReport(
        step=step,
        accuracy=share_right(greedy),
        mean_tokens=float(np.mean(lengths)) if lengths else None,
        ungraded=sum(grade is None for grade, due in zip(grades, graded, strict=True) if due)
        if any(graded)
        else None,
        avg_at_k={} if averaged is None else {num_samples: averaged},
        pass_at_k={k: value for k, value in passed.items() if value is not None},
        heldout=heldout_report(scored, overlap_k=overlap_k) if scored else None,
        samples=_texts(responses, texts, grades, num_texts),
    )


def rollout_text(rollout: Rollout, sample: int, temperature: float, decode: Decode) -> SampleText:
    """A rollout of training as a person reads it."""
    return SampleText(
        prompt_id=rollout.prompt.prompt_id,
        sample=sample,
        prompt=rollout.prompt.text,
        response=decode(rollout.response_ids),
        tokens=rollout.num_sampled,
        finish=rollout.finish.value,
        temperature=temperature,
        answer=rollout.prompt.answer,
        teacher_logprob=_teacher_logprob(rollout),
    )


def _grades(
    responses: Sequence[Response], texts: Sequence[str], grader: Grader
) -> list[bool | None]:
    """Of every response; None for one that is not to be graded, or was cut off with the teacher."""
    grades: list[bool | None] = [None] * len(responses)
    asked = {
        index: (text, response.request.problem.answer)
        for index, (response, text) in enumerate(zip(responses, texts, strict=True))
        if response.request.graded and response.finish is not Finish.UNSCORED
    }
    pairs = [(text, answer) for text, answer in asked.values() if answer is not None]
    for index, grade in zip(asked, grader.grade(pairs), strict=True):
        grades[index] = grade
    return grades


def _by_problem(
    responses: Sequence[Response], grades: Sequence[bool | None]
) -> tuple[list[bool | None], list[list[bool | None]]]:
    """Grades of the greedy responses, and of the samples of each problem."""
    greedy, sampled = [], []
    of_graded = [
        (response.request, grade)
        for response, grade in zip(responses, grades, strict=True)
        if response.request.graded
    ]
    for _, group in groupby(of_graded, key=lambda entry: id(entry[0].problem)):
        (_, first), *rest = group
        greedy.append(first)
        sampled.append([grade for _, grade in rest])
    return greedy, sampled


def _texts(
    responses: Sequence[Response],
    texts: Sequence[str],
    grades: Sequence[bool | None],
    num_texts: int,
) -> tuple[SampleText, ...]:
    """The first of every problem before the second of any, so that many problems are seen."""
    seen: dict[int, int] = {}
    places = []
    for index, response in enumerate(responses):
        nth = seen.setdefault(id(response.request.problem), 0)
        seen[id(response.request.problem)] += 1
        places.append((nth, index))
    kept = sorted(index for _, index in sorted(places)[:num_texts])
    return tuple(_text(responses[index], texts[index], grades[index]) for index in kept)


def _text(response: Response, text: str, grade: bool | None) -> SampleText:
    request = response.request
    return SampleText(
        prompt_id=request.problem.prompt_id,
        sample=request.sample,
        prompt=request.problem.text,
        response=text,
        tokens=len(response.token_ids),
        finish=response.finish.value,
        temperature=request.temperature,
        answer=request.problem.answer,
        correct=grade,
        teacher_logprob=None if response.rollout is None else _teacher_logprob(response.rollout),
    )


def _teacher_logprob(rollout: Rollout) -> float | None:
    counted = rollout.teacher.token_logprobs[rollout.mask]
    return float(counted.mean()) if len(counted) else None
