"""What ends a run before anything large is loaded, and what `student-trainer doctor` looks at by
itself: the run's folder, the student's files, tokens and certificates, and teachers that are there
already.

A teacher that is not there yet is waited for later, as always.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from preflight.checkpoints import CheckpointFileError, check_stored, check_tokenizer_files
from preflight.disk import why_not_writable
from preflight.gpus import driver
from preflight.software import why_no_vllm
from student_trainer.assembly import teachers
from student_trainer.errors import CheckpointError, ConfigError
from student_trainer.rollouts.stream import LoopThread
from student_trainer.settings.config import TrainerConfig, table_of
from student_trainer.settings.sampler import VllmSamplerSettings
from student_trainer.vocabulary import SharedIds, shared_ids
from teacher_client.access import AccessError, TeacherAccess
from teacher_client.glance import glance
from teacher_client.reaching import Reached, reach
from teacher_client.retry import BrokenStreamError
from teacher_wire.errors import CapacityError, DeadlineError, NotReadyError
from teacher_wire.records import TeacherInfo
from teacher_wire.vocabulary import Vocabulary

LOOK_S = 10.0
"""For a teacher that is there to say what it serves; one that does not is asked again later."""
MAX_AT_ONCE = 16


def check_folder(config: TrainerConfig) -> None:
    """Raises ConfigError for a run.out, or a weights_dir, in which nothing can be written."""
    if why := why_not_writable(config.run.out):
        raise ConfigError(f"run.out is {str(config.run.out)!r}, and {why}")
    place: Path | None = getattr(config.sampler, "weights_dir", None)
    if place is not None and (why := why_not_writable(place)):
        raise ConfigError(f"sampler.weights_dir is {str(place)!r}, and {why}")


def check_sampler(config: TrainerConfig) -> None:
    """Raises ConfigError for an engine of vLLM that has not what it was built for."""
    if isinstance(config.sampler, VllmSamplerSettings) and (why := why_no_vllm(driver())):
        raise ConfigError(
            f"sampler.kind is 'vllm', and {why}, or take sampler.kind = \"hf_batched\""
        )


def check_student_files(config: TrainerConfig) -> None:
    """Raises CheckpointError where the student is here and cannot be loaded: a file that is missing
    or not whole, or no tokenizer."""
    model = config.student.model
    try:
        check_stored(model)
        check_tokenizer_files(model)
    except CheckpointFileError as error:
        raise CheckpointError(f"student.model is {model!r}: {error}") from error


def check_access(config: TrainerConfig, tags: Iterable[str | None]) -> None:
    """Raises AccessError for a token or a certificate of ours that cannot be used, or that every
    user of the machine could use."""
    for tag in tags:
        access = teachers.teacher_access(config.teacher_of(tag))
        try:
            access.metadata()
            access.ssl_context()
            if why := access.why_exposed():
                raise AccessError(why)
        except AccessError as error:
            if tag is None:
                raise
            raise AccessError(f"[{table_of(tag)}]: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One endpoint, tried."""

    tag: str | None
    endpoint: str
    reached: Reached | None = None
    refused: str = ""
    """What is to be mended; empty where nothing is."""


def reached(config: TrainerConfig, tags: Iterable[str | None]) -> list[Answer]:
    """Every endpoint of these teachers, all at once."""
    asked = [
        (tag, endpoint, teachers.teacher_access(config.teacher_of(tag)))
        for tag in tags
        for endpoint in config.teacher_of(tag).endpoints
    ]

    def one(place: tuple[str | None, str, TeacherAccess]) -> Answer:
        tag, endpoint, access = place
        try:
            return Answer(tag=tag, endpoint=endpoint, reached=reach(endpoint, access))
        except AccessError as error:
            return Answer(tag=tag, endpoint=endpoint, refused=str(error))

    with ThreadPoolExecutor(max_workers=MAX_AT_ONCE) as threads:
        return [*threads.map(one, asked)]


def refuse_early(config: TrainerConfig, tags: Collection[str | None]) -> list[Answer]:
    """Files and endpoints of the teachers that a run asks. Raises AccessError."""
    check_access(config, tags)
    answers = reached(config, tags)
    if refused := next((answer for answer in answers if answer.refused), None):
        raise AccessError(refused.refused)
    return answers


def refuse_strangers(
    config: TrainerConfig,
    loop: LoopThread,
    answers: list[Answer],
    own: Vocabulary,
    vocab_size: int,
) -> None:
    """Raises FingerprintMismatchError or ConfigError where a teacher that is there already does not
    fit, and what it says to who is not to ask it."""
    for tag, endpoint in _first_there(answers):
        try:
            with teachers.naming(config, tag):
                loop.run(_fits(config, tag, endpoint, own, vocab_size))
        except (NotReadyError, CapacityError, DeadlineError, BrokenStreamError):
            continue


def _first_there(answers: list[Answer]) -> Iterator[tuple[str | None, str]]:
    """The first endpoint of each teacher at which somebody is."""
    found: dict[str | None, str] = {}
    for answer in answers:
        if answer.reached is not None and not answer.reached.absent:
            found.setdefault(answer.tag, answer.endpoint)
    return iter(found.items())


async def _fits(
    config: TrainerConfig, tag: str | None, endpoint: str, own: Vocabulary, vocab_size: int
) -> tuple[TeacherInfo, SharedIds]:
    """What a teacher serves, and what it shares with the student. Raises what it says, and
    FingerprintMismatchError and ConfigError where it does not fit."""
    access = teachers.teacher_access(config.teacher_of(tag))
    run_id = config.run.out.name
    async with glance(endpoint, access, run_id=run_id, timeout_s=LOOK_S) as seen:
        teachers.check_limits(config, seen.info, tag)
        student = f"the student {config.student.model}"
        return seen.info, await shared_ids(own, vocab_size, seen, student=student)


def look(
    config: TrainerConfig, loop: LoopThread, answer: Answer, own: Vocabulary, vocab_size: int
) -> tuple[TeacherInfo, SharedIds]:
    """One endpoint, for the doctor. Raises as `refuse_strangers`, and NotReadyError."""
    return loop.run(_fits(config, answer.tag, answer.endpoint, own, vocab_size))
