"""The evaluation of any checkpoint, outside of a run."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console
from transformers import AutoConfig, PreTrainedTokenizerBase

from student_trainer.assembly import evaluating, from_settings
from student_trainer.assembly.own_loss import with_declared_needs
from student_trainer.assembly.run import started
from student_trainer.errors import CheckpointError, DatasetError
from student_trainer.pretrained import load_tokenizer
from student_trainer.recording.terminal import Bars
from student_trainer.rollouts.stream import LoopThread
from student_trainer.settings.config import TrainerConfig
from teacher_client.client import TeacherClient
from teacher_wire.errors import NotReadyError

TeacherUse = Literal["auto", "required", "none"]
PATIENCE_S = 5.0
"""Seconds that a teacher nobody insists on may take to answer."""


def evaluate_checkpoint(
    config: TrainerConfig, model: str, *, teacher: TeacherUse = "auto"
) -> dict[str, Any]:
    """Every figure of an evaluation, and what was evaluated; None where a figure is not there.

    The held-out divergences need a teacher: `auto` does without where none answers, and says why,
    unless the problems have no answers, of which nobody else could say anything. Raises what a run
    raises before its first step.
    """
    config = with_declared_needs(config)
    tokenizer = load_tokenizer(model)
    problems = from_settings.heldout_problems(config, tokenizer)
    if not problems:
        raise DatasetError("there are no problems to evaluate: data.heldout must name them")
    with ExitStack() as stack:
        grader = evaluating.checked_grader(config, problems, stack)
        loop = stack.enter_context(closing(LoopThread()))
        client, absent = None, "not asked for"
        if teacher != "none" and config.eval.teacher_samples:
            needed = teacher == "required" or problems[0].answer is None
            client, absent = _client(config, model, tokenizer, loop, needed)
        if client is not None:
            stack.callback(lambda connected: loop.run(connected.aclose()), client)
        evaluator = evaluating.evaluator(config, problems, grader, tokenizer, client)
        sampler = from_settings.sampler(config, model)
        stack.enter_context(started(sampler, loop))
        bars = stack.enter_context(Bars(Console(stderr=True)))
        report = evaluator.report(
            loop,
            sampler,
            step=0,
            with_samples=True,
            progress=lambda done, total: bars.update("evaluation", done, total),
        )
    return {
        "checkpoint": model,
        "teacher": None if client is None else client.info.model_id,
        "without_teacher": absent or None,
        "num_prompts": len(problems),
        "accuracy": report.accuracy,
        **report.written(),
        "texts": [asdict(sample) for sample in report.samples],
    }


def _client(
    config: TrainerConfig,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    loop: LoopThread,
    needed: bool,
) -> tuple[TeacherClient | None, str]:
    """The teacher, or why there is none."""
    if not needed:
        patience_s = min(PATIENCE_S, config.teacher.connect_timeout_s)
        in_short = config.teacher.model_copy(update={"connect_timeout_s": patience_s})
        config = config.model_copy(update={"teacher": in_short})
    try:
        return loop.run(from_settings.connect(config, _vocab_size(model), tokenizer)), ""
    except NotReadyError as error:
        if needed:
            raise
        return None, str(error)


def _vocab_size(model: str) -> int:
    try:
        return int(AutoConfig.from_pretrained(model).get_text_config().vocab_size)
    # Whatever the library that reads it makes of a malformed file.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{model}: cannot read its configuration: {reason}") from error
