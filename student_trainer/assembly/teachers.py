"""The teachers of a run: `[teacher]`, for rows that name none, and each of `[teachers.NAME]`.

Each is asked in its own way: which is which is decided here, by what a row calls its teacher.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from student_trainer.diagnostics.replicas import ReplicaReading
from student_trainer.errors import ConfigError, DatasetError
from student_trainer.pretrained import load_generation_config
from student_trainer.records import Prompt
from student_trainer.rollouts.rollout import RolloutRules, TeacherSession
from student_trainer.rollouts.stream import LoopThread, OpenSession
from student_trainer.settings.config import TrainerConfig, table_of
from student_trainer.settings.teacher import NamedTeacherSettings, TeacherSettings
from student_trainer.special_tokens import SpecialTokens
from student_trainer.stop_tokens import own_end_warnings, stop_token_ids, teacher_end_warnings
from student_trainer.vocabulary import SharedIds, shared_ids
from teacher_client.access import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, TeacherAccess
from teacher_client.agreement import MAX_PROBE_TOKENS, Probe
from teacher_client.client import TeacherClient
from teacher_wire.drift_metrics import METRICS
from teacher_wire.errors import FingerprintMismatchError
from teacher_wire.id_ranges import IdRanges, num_ids, united, within
from teacher_wire.records import (
    DriftPolicy,
    LogprobDtype,
    ScoreOptions,
    TeacherInfo,
    flags_for,
)
from teacher_wire.vocabulary import Vocabulary

REPLICA_TEXT = (
    "A train leaves at 9:40 and takes 2 hours and 35 minutes, so it arrives at 12:15. "
    "def area(radius):\n    return 3.14159 * radius ** 2\n"
    "If 3x + 7 = 25, then 3x = 18 and x = 6. Water boils at 100 degrees at sea level, and sooner "
    "on a mountain, because the air is thinner there."
)
"""By which replicas are compared: words, code and numbers."""
MIN_PROBE_TOKENS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Teachers:
    """The teachers of a run, each by what a row calls it."""

    clients: Mapping[str | None, TeacherClient] = field(default_factory=dict)
    shared: Mapping[str | None, SharedIds] = field(default_factory=dict)
    """What the student's tokens have in common with those of each."""
    excluded_before: IdRanges = ()
    """Ids that take no part whatever these teachers share."""

    def replicas(self) -> list[ReplicaReading]:
        """Every endpoint of every teacher as it is now."""
        return [
            ReplicaReading(
                teacher=table_of(tag), endpoint=each.address, up=each.up, losses=each.losses
            )
            for tag, client in self.clients.items()
            for each in client.endpoints.replicas
        ]

    def failovers(self) -> dict[str, int]:
        """Sessions of each teacher that went on at another endpoint than the one they were on."""
        return {
            table_of(tag): client.endpoints.num_failovers for tag, client in self.clients.items()
        }

    @property
    def excluded_ids(self) -> IdRanges:
        """Ids that take no part: among them those that one of the teachers does not share."""
        return united(
            self.excluded_before, *(shared.excluded_ids for shared in self.shared.values())
        )


@contextmanager
def connected(
    config: TrainerConfig,
    loop: LoopThread,
    prompts: Sequence[Prompt],
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
    excluded_before: IdRanges = (),
) -> Iterator[Teachers]:
    """The teachers that the prompts name, connected on the loop and compared with the student.

    Raises what `connect` and the comparison raise, with the name of the teacher where there are
    several, DatasetError for a prompt or a turn that a teacher would read otherwise, ConfigError
    where more entries are asked for than ids take part.
    """
    clients: dict[str | None, TeacherClient] = {}
    shared: dict[str | None, SharedIds] = {}
    own = Vocabulary.of(tokenizer)
    with ExitStack() as stack:
        for tag in sorted({prompt.teacher for prompt in prompts}, key=lambda tag: tag or ""):
            with naming(config, tag):
                probe = replica_probe(config, tokenizer, tag)
                clients[tag] = client = loop.run(connect(config, tag, probe))
                stack.callback(_close, loop, client)
                student = f"the student {config.student.model}"
                shared[tag] = loop.run(shared_ids(own, vocab_size, client, student=student))
            shared[tag].refuse_prompts(prompt for prompt in prompts if prompt.teacher == tag)
        for tag, with_teacher in shared.items():
            with naming(config, tag):
                # All prompts: what one teacher does not share, no response may have.
                with_teacher.refuse_turns(prompts)
        asked = Teachers(clients=clients, shared=shared, excluded_before=excluded_before)
        check_participation(config, asked)
        yield asked


@contextmanager
def naming(config: TrainerConfig, tag: str | None) -> Iterator[None]:
    """Where there are several teachers, which one it is that something does not fit."""
    try:
        yield
    except (FingerprintMismatchError, DatasetError) as error:
        if not config.teachers:
            raise
        raise type(error)(f"[{table_of(tag)}]: {error}") from error


def warnings(
    config: TrainerConfig, model: str, tokenizer: PreTrainedTokenizerBase, asked: Teachers
) -> list[str]:
    """What is to be said of tokens before the first step."""
    generation = load_generation_config(model)
    stop_ids = stop_token_ids(tokenizer, generation, config.rollout.stop_tokens)
    found = own_end_warnings(tokenizer, generation)
    for tag, client in asked.clients.items():
        teacher_ends = client.info.end_token_ids
        warned = teacher_end_warnings(tokenizer, teacher_ends, stop_ids)
        warned += asked.shared[tag].warnings((*stop_ids, *teacher_ends))
        found += [f"[{table_of(tag)}]: {text}" for text in warned]
    return found


def _close(loop: LoopThread, client: TeacherClient) -> None:
    loop.run(client.aclose())


def sessions(config: TrainerConfig, asked: Teachers, *, only_observes: bool = False) -> OpenSession:
    """Opens a session for a prompt, at its teacher and with what that is given instead. Where the
    drift policy `only_observes`, no response is stopped."""
    clients = asked.clients
    options = {
        tag: replace(
            score_options(config, tag),
            excluded_ids=within(asked.excluded_ids, 0, client.info.vocab_size),
        )
        for tag, client in clients.items()
    }
    policies = {tag: drift_policy(config, tag) for tag in clients}
    if only_observes:
        policies = {tag: replace(of, stop_in_flight=False) for tag, of in policies.items()}

    def open_session(prompt: Prompt) -> TeacherSession:
        tag = prompt.teacher
        return clients[tag].open(prompt.teacher_prompt_ids, options[tag], policies[tag])

    return open_session


def rules(
    config: TrainerConfig, specials: SpecialTokens, asked: Teachers
) -> dict[str | None, RolloutRules]:
    """What all rollouts of each teacher share."""
    return {
        tag: rollout_rules(config, specials, client.info, tag)
        for tag, client in asked.clients.items()
    }


def replica_probe(
    config: TrainerConfig, tokenizer: PreTrainedTokenizerBase, tag: str | None = None
) -> Probe:
    """What the replicas of a teacher are compared by: a text in the student's tokens, and where it
    has few of them, ids drawn at random behind it."""
    known = tokenizer(REPLICA_TEXT, add_special_tokens=False)["input_ids"]
    drawn = np.random.default_rng(0).integers(0, len(tokenizer), MAX_PROBE_TOKENS)
    token_ids = np.concatenate([np.array(known, np.int32), drawn.astype(np.int32)])
    length = max(MIN_PROBE_TOKENS, len(known))
    bound_nats = config.teacher_of(tag).max_replica_gap_nats
    return Probe(token_ids=token_ids[:length], bound_nats=bound_nats)


async def connect(
    config: TrainerConfig, tag: str | None = None, probe: Probe | None = None
) -> TeacherClient:
    """A teacher whose limits hold what the run asks for; its tokens are not compared yet, but
    among its replicas, and their rows by the probe.

    Raises NotReadyError when none answers, FingerprintMismatchError or ConfigError when it does not
    fit, before any work is done.
    """
    settings = config.teacher_of(tag)
    client = await TeacherClient.connect(
        settings.endpoints,
        tokenizer_fingerprint="",
        vocab_size=0,
        run_id=config.run.out.name,
        connect_timeout_s=settings.connect_timeout_s,
        on_absent="wait" if settings.on_absent == "wait" else "fail",
        access=teacher_access(settings),
        probe=probe,
    )
    try:
        check_limits(config, client.info, tag)
    except ConfigError:
        await client.aclose()
        raise
    return client


def teacher_access(settings: TeacherSettings) -> TeacherAccess:
    """Token and certificates; nothing is read yet but the environment."""
    token_file = os.environ.get(TOKEN_FILE_VARIABLE)
    return TeacherAccess(
        token_file=settings.token_file or (Path(token_file) if token_file else None),
        token=os.environ.get(TOKEN_VARIABLE, ""),
        tls_ca=settings.tls_ca,
        tls_cert=settings.tls_cert,
        tls_key=settings.tls_key,
    )


def check_limits(config: TrainerConfig, info: TeacherInfo, tag: str | None = None) -> None:
    """Raises ConfigError for a setting beyond what the teacher serves."""
    asked = {
        f"{table_of(tag)}.k": (config.teacher_of(tag).k, info.max_k),
        "rollout.student_topk": (config.collected_topk, info.max_k),
        "rollout.max_context": (config.rollout.max_context, info.max_context),
        "rollout.chunk_tokens": (config.rollout.chunk_tokens, info.max_append_tokens),
    }
    for name, (value, limit) in asked.items():
        if value > limit:
            raise ConfigError(f"{name} is {value}, the teacher {info.model_id} allows {limit}")


def check_participation(config: TrainerConfig, asked: Teachers) -> None:
    """Raises ConfigError for a top-k of more entries than ids take part, at any of the teachers."""
    for tag, client in asked.clients.items():
        width = client.info.vocab_size
        left = width - num_ids(within(asked.excluded_ids, 0, width))
        for name, value in (
            (f"{table_of(tag)}.k", config.teacher_of(tag).k),
            ("rollout.student_topk", config.collected_topk),
        ):
            if value > left:
                raise ConfigError(
                    f"{name} is {value}, and {left} of the {width} ids of the teacher "
                    f"{client.info.model_id} take part in the run: at most {left}"
                )


def score_options(config: TrainerConfig, tag: str | None = None) -> ScoreOptions:
    """What the teacher returns; at the student's temperature, so that both sides compare."""
    settings = config.teacher_of(tag)
    return ScoreOptions(
        k=settings.k,
        temperature=config.rollout.temperature,
        logprob_dtype=LogprobDtype(settings.logprob_dtype),
        **flags_for(config.loss.needs.teacher_columns),
    )


def drift_policy(config: TrainerConfig, tag: str | None = None) -> DriftPolicy:
    """The rule that travels to the teacher with every session."""
    drift = config.drift_of(tag)
    kind = METRICS[drift.metric]
    return DriftPolicy(
        metric=kind(**{c.name: getattr(drift, c.name) for c in fields(kind)}),
        w_drop=config.w_drop_of(tag),
        stop_in_flight=drift.stop_in_flight,
    )


def rollout_rules(
    config: TrainerConfig, specials: SpecialTokens, info: TeacherInfo, tag: str | None = None
) -> RolloutRules:
    """What all rollouts of one teacher share."""
    settings = config.teacher_of(tag)
    return RolloutRules(
        chunk_tokens=config.rollout.chunk_tokens,
        max_span_tokens=info.max_append_tokens,
        block_tokens=max(1, info.block_tokens),
        specials=specials,
        finish_when_absent=settings.on_absent == "finish_unscored",
        loss_weight=settings.loss_weight if isinstance(settings, NamedTeacherSettings) else 1.0,
    )
