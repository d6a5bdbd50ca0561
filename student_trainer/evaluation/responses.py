"""Which responses an evaluation needs, and how it gets them: from the running sampler alone, or
with the teacher's scores as training does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from student_trainer.records import Finish, Prompt, Rollout, SamplingOptions
from student_trainer.rollouts.generation import Generation
from student_trainer.rollouts.rollout import RolloutRules, TeacherSession, run_rollout
from student_trainer.rollouts.samplers.base import Sampler

GREEDY = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How the teacher scores a response: as in training, with a policy that never stops one."""

    open_session: Callable[[Prompt], TeacherSession]
    rules: Mapping[str | None, RolloutRules]
    """By what a problem calls its teacher."""
    temperature: float
    """Of the sampling, and of the teacher's log-probs."""
    num_topk: int
    """The student's own top-k that goes with every token."""
    overlap_k: int | None
    """Entries that an overlap compares; None without a top-k."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many responses of each sort a problem gets."""

    options: SamplingOptions
    """But for temperature, top-k and seed. Nothing is cut off by top-p: the estimates are of whole
    distributions."""
    num_samples: int = 0
    """Graded samples, of a problem that has an answer, beside the greedy response."""
    temperature: float = 1.0
    """Of the graded samples."""
    num_scored: int = 0
    """Samples that the teacher scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response to a problem, to be had."""

    problem: Prompt
    sample: int
    """0 is the greedy one; the seed too."""
    temperature: float
    graded: bool
    """Whether it counts among the graded ones."""
    scored: bool
    """Whether the teacher is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response to a problem."""

    request: Request
    token_ids: NDArray[np.int32]
    """The answer, which is the last where others spoke between several."""
    finish: Finish
    rollout: Rollout | None = None
    """With the scores; None also where the teacher stayed away."""


def planned(problem: Prompt, plan: Plan, scoring: Scoring | None) -> Iterator[Request]:
    """The responses to one problem. A graded sample is scored too where both are drawn alike."""
    answered = problem.answer is not None
    if answered:
        yield Request(problem=problem, sample=0, temperature=GREEDY, graded=True, scored=False)
    num_graded = plan.num_samples if answered else 0
    num_scored = 0 if scoring is None else plan.num_scored
    alike = scoring is not None and scoring.temperature == plan.temperature
    num_shared = min(num_graded, num_scored) if alike else 0
    for sample in range(1, 1 + num_graded):
        yield Request(
            problem=problem,
            sample=sample,
            temperature=plan.temperature,
            graded=True,
            scored=sample <= num_shared,
        )
    for sample in range(1 + num_shared, 1 + num_scored):
        assert scoring is not None
        yield Request(
            problem=problem,
            sample=sample,
            temperature=scoring.temperature,
            graded=False,
            scored=True,
        )


async def respond(
    sampler: Sampler,
    problems: Sequence[Prompt],
    plan: Plan,
    scoring: Scoring | None,
    *,
    name: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Response]:
    """All responses, those to a problem together and in the order of the plan.

    `name` must differ from that of every other evaluation under way. Raises TeacherError when the
    teacher fails; the others are cancelled then.
    """
    requests = [request for problem in problems for request in planned(problem, plan, scoring)]
    done = 0

    async def one(number: int, request: Request) -> Response:
        nonlocal done
        options = replace(
            plan.options,
            temperature=request.temperature,
            top_p=1.0,
            num_topk=0,
            seed=request.sample,
        )
        request_id = f"eval-{name}-{number}"
        if request.scored and scoring is not None:
            response = await _scored(sampler, request, request_id, options, scoring)
        else:
            response = await _generated(sampler, request, request_id, options)
        done += 1
        progress(done, len(requests))
        return response

    tasks = [asyncio.create_task(one(*numbered)) for numbered in enumerate(requests)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _scored(
    sampler: Sampler, request: Request, request_id: str, options: SamplingOptions, scoring: Scoring
) -> Response:
    rollout = await run_rollout(
        request.problem,
        request_id=request_id,
        options=replace(options, num_topk=scoring.num_topk),
        sampler=sampler,
        session=scoring.open_session(request.problem),
        rules=scoring.rules[request.problem.teacher],
        policy_version=0,
    )
    return Response(
        request=request,
        token_ids=np.empty(0, np.int32) if rollout is None else rollout.last_answer_ids,
        finish=Finish.UNSCORED if rollout is None else rollout.finish,
        rollout=rollout,
    )


async def _generated(
    sampler: Sampler, request: Request, request_id: str, options: SamplingOptions
) -> Response:
    generation = Generation(
        request.problem, request_id=request_id, options=options, sampler=sampler
    )
    await generation.run()
    growing = generation.growing
    return Response(
        request=request,
        token_ids=growing.last_answer_ids(),
        finish=growing.finish or Finish.LENGTH,
    )
