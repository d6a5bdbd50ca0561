"""Puts evaluations together: what grades, what scores, and which responses are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from student_trainer.assembly import from_settings, teachers
from student_trainer.assembly.teachers import Teachers
from student_trainer.diagnostics.step_report import EvalReport
from student_trainer.errors import ConfigError
from student_trainer.evaluation.answers import AnswerFinder
from student_trainer.evaluation.evaluate import Decode, check_problems, evaluation_report
from student_trainer.evaluation.grading import ExactGrader, Grader, MathGrader, MathProcesses
from student_trainer.evaluation.responses import Plan, Scoring, respond
from student_trainer.records import Prompt
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.rollouts.stream import LoopThread
from student_trainer.settings.best_metric import HELDOUT
from student_trainer.settings.config import TrainerConfig
from student_trainer.special_tokens import SpecialTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Held-out problems, and what makes a report of responses to them."""

    problems: Sequence[Prompt]
    grader: Grader
    decode: Decode
    plan: Plan
    pass_k: Sequence[int]
    num_texts: int
    scoring: Scoring | None
    """None without a teacher."""

    def report(
        self,
        loop: LoopThread,
        sampler: Sampler,
        *,
        step: int,
        with_samples: bool,
        progress: Callable[[int, int], None],
    ) -> EvalReport:
        """What the weights in a sampler make of the problems; with samples also avg@k and pass@k.

        One at a time for a sampler.
        """
        num_samples = self.plan.num_samples if with_samples else 0
        responses = loop.run(
            respond(
                sampler,
                self.problems,
                replace(self.plan, num_samples=num_samples),
                self.scoring,
                name=f"step{step}",
                progress=progress,
            )
        )
        return evaluation_report(
            responses,
            self.grader,
            self.decode,
            step=step,
            pass_k=self.pass_k if with_samples else (),
            overlap_k=self.scoring.overlap_k if self.scoring else None,
            num_texts=self.num_texts,
        )


def checked_grader(config: TrainerConfig, problems: Sequence[Prompt], stack: ExitStack) -> Grader:
    """What makes an answer right, once it can read every expected one there is.

    Raises DatasetError for held-out problems that cannot be evaluated, ConfigError where neither
    an answer nor the teacher would say anything of them.
    """
    settings = config.eval
    finder = AnswerFinder(settings.answer_pattern, unicode_normalize=settings.unicode_normalize)
    grader: Grader = ExactGrader(finder)
    if settings.compares_mathematics:
        mathematics = MathProcesses()
        stack.callback(mathematics.close)
        grader = MathGrader(finder, mathematics, strict=settings.grader == "math")
    if not problems:
        return grader
    check_problems(problems, grader)
    if settings.teacher_samples == 0 and problems[0].answer is None:
        raise ConfigError(
            f"{problems[0].prompt_id}: the problems of data.heldout have no answer, and "
            "eval.teacher_samples is 0: nothing would be known of a response"
        )
    best, metric = config.checkpoint.keep_best, config.checkpoint.best_metric
    if best and problems[0].answer is None and not metric.startswith(HELDOUT):
        raise ConfigError(
            f"{problems[0].prompt_id}: the problems of data.heldout have no answer, and "
            f"checkpoint.keep_best is {best} by checkpoint.best_metric {metric}: no evaluation has "
            "it; heldout_reverse_kl is the teacher's"
        )
    return grader


def evaluator(
    config: TrainerConfig,
    problems: Sequence[Prompt],
    grader: Grader,
    tokenizer: PreTrainedTokenizerBase,
    asked: Teachers,
) -> Evaluator:
    """Evaluations as the settings want them, by the teachers too where there are some."""
    return Evaluator(
        problems=problems,
        grader=grader,
        decode=decoder(tokenizer),
        plan=Plan(
            options=from_settings.sampling_options(
                config, config.eval.max_tokens, asked.excluded_ids
            ),
            num_samples=config.eval.num_samples,
            temperature=config.eval.temperature,
            num_scored=config.eval.teacher_samples,
        ),
        pass_k=config.eval.pass_k,
        num_texts=config.eval.texts,
        scoring=scoring(config, from_settings.special_tokens(config, tokenizer), asked)
        if asked.clients
        else None,
    )


def scoring(config: TrainerConfig, specials: SpecialTokens, asked: Teachers) -> Scoring:
    """As in training, but the drift policy only observes."""
    num_topk = from_settings.sampling_options(config, config.eval.max_tokens).num_topk
    return Scoring(
        open_session=teachers.sessions(config, asked, only_observes=True),
        rules=teachers.rules(config, specials, asked),
        temperature=config.rollout.temperature,
        num_topk=num_topk,
        overlap_k=config.overlap_k if num_topk else None,
    )


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Token ids to the text that is graded and shown."""
    return lambda ids: str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
