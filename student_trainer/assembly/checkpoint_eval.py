"""The evaluation of any checkpoint, outside of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from student_trainer.assembly import adapting, evaluating, from_settings, syncing, teachers
from student_trainer.assembly.own_loss import with_declared_needs
from student_trainer.assembly.recording import warn
from student_trainer.assembly.sampling import started
from student_trainer.assembly.teachers import Teachers
from student_trainer.errors import DatasetError
from student_trainer.pretrained import load_tokenizer, load_vocab_size
from student_trainer.recording.run_folder import RUN_FILE, STUDENT, excluded_ids_of, run_of
from student_trainer.recording.terminal import Bars
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.rollouts.stream import LoopThread
from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.teacher import TeacherSettings
from student_trainer.train_state import step_of
from teacher_wire.errors import NotReadyError
from teacher_wire.id_ranges import IdRanges

TeacherUse = Literal["auto", "required", "none"]
Teacher = TypeVar("Teacher", bound=TeacherSettings)
PATIENCE_S = 5.0
"""Seconds that a teacher nobody insists on may take to answer."""


def evaluate_checkpoint(
    config: TrainerConfig, model: str, *, teacher: TeacherUse = "auto"
) -> dict[str, Any]:
    """Every figure of an evaluation, and what was evaluated; None where a figure is not there.

    The held-out divergences need a teacher: `auto` does without where none answers, and says why,
    unless the problems have no answers, of which nobody else could say anything. What took no part
    in the run of the checkpoint takes none here, whichever teachers are asked. An adapter is
    evaluated on the student of the configuration. Raises what a run raises before its first step.
    """
    config = adapting.with_adapter_of(with_declared_needs(config), Path(model))
    base = model if config.student.lora is None else config.student.model
    tokenizer = load_tokenizer(base)
    problems = from_settings.heldout_problems(config, tokenizer)
    if not problems:
        raise DatasetError("there are no problems to evaluate: data.heldout must name them")
    with ExitStack() as stack:
        grader = evaluating.checked_grader(config, problems, stack)
        loop = stack.enter_context(closing(LoopThread()))
        run, excluded_before = _of_its_run(config, model)
        asked, absent = Teachers(excluded_before=excluded_before), "not asked for"
        if teacher != "none" and config.eval.teacher_samples:
            needed = teacher == "required" or problems[0].answer is None
            patient = config if needed else in_short(config)
            width = load_vocab_size(base)
            connected = teachers.connected(
                patient, loop, problems, width, tokenizer, excluded_before
            )
            try:
                asked, absent = stack.enter_context(connected), ""
            except NotReadyError as error:
                if needed:
                    raise
                absent = str(error)
        bars = stack.enter_context(Bars(Console(stderr=True)))
        for line in teachers.warnings(config, base, tokenizer, asked):
            warn(bars.console, line)
        evaluator = evaluating.evaluator(config, problems, grader, tokenizer, asked)
        sampler = stack.enter_context(_sampler(config, base, tokenizer, loop, bars))
        report = evaluator.report(
            loop,
            sampler,
            step=0,
            with_samples=True,
            progress=lambda done, total: bars.update("evaluation", done, total),
        )
    return {
        "checkpoint": model,
        "without_teacher": absent or None,
        "run": None if run is None else str(run),
        "num_prompts": len(problems),
        **_told(asked),
        "accuracy": report.accuracy,
        **report.written(),
        "texts": [asdict(sample) for sample in report.samples],
    }


@contextmanager
def _sampler(
    config: TrainerConfig,
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    loop: LoopThread,
    bars: Bars,
) -> Iterator[Sampler]:
    """What generates, with the adapter, where there is one."""
    sampler = from_settings.sampler(config, base, tokenizer)
    with started(sampler, loop):
        if config.student.lora is not None:
            syncing.load_adapter(config, sampler, loop, partial(warn, bars.console))
        yield sampler


def _told(asked: Teachers) -> dict[str, Any]:
    """Who scored, and what took no part."""
    return {
        "teacher": ", ".join(client.info.model_id for client in asked.clients.values()) or None,
        "excluded_ids": [list(span) for span in asked.excluded_ids],
    }


def _of_its_run(config: TrainerConfig, model: str) -> tuple[Path | None, IdRanges]:
    """The run of a checkpoint, of the student that it began with too; and what took no part."""
    path = Path(model)
    if model == config.student.model and (config.run.out / RUN_FILE).is_file():
        return config.run.out, excluded_ids_of(config.run.out)
    if (run := run_of(path)) is None:
        return None, ()
    step = None if path.resolve().name == STUDENT else step_of(path.resolve())
    return run, excluded_ids_of(run, step=step)


def in_short(config: TrainerConfig) -> TrainerConfig:
    """The same, without patience for its teachers."""

    def hurried(settings: Teacher) -> Teacher:
        patience_s = min(PATIENCE_S, settings.connect_timeout_s)
        return settings.model_copy(update={"connect_timeout_s": patience_s})

    named = {name: hurried(settings) for name, settings in config.teachers.items()}
    return config.model_copy(update={"teacher": hurried(config.teacher), "teachers": named})
