"""The teachers of a run: `[teacher]`, for rows that name none, and each of `[teachers.NAME]`.

Each is asked in its own way: which is which is decided here, by what a row calls its teacher.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from student_trainer.errors import ConfigError
from student_trainer.pretrained import load_generation_config
from student_trainer.records import Prompt
from student_trainer.rollouts.rollout import RolloutRules, TeacherSession
from student_trainer.rollouts.stream import LoopThread, OpenSession
from student_trainer.settings.config import TrainerConfig, table_of
from student_trainer.settings.teacher import NamedTeacherSettings, TeacherSettings
from student_trainer.special_tokens import SpecialTokens
from student_trainer.stop_tokens import own_end_warnings, stop_token_ids, teacher_end_warnings
from teacher_client.access import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, TeacherAccess
from teacher_client.client import TeacherClient
from teacher_wire.drift_metrics import METRICS
from teacher_wire.errors import FingerprintMismatchError
from teacher_wire.fingerprint import tokenizer_fingerprint
from teacher_wire.records import (
    DriftPolicy,
    LogprobDtype,
    ScoreOptions,
    TeacherInfo,
    flags_for,
)

Clients = Mapping[str | None, TeacherClient]
"""By what a row calls its teacher."""


@contextmanager
def connected(
    config: TrainerConfig,
    loop: LoopThread,
    prompts: Iterable[Prompt],
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Clients]:
    """The teachers that the prompts name, connected on the loop.

    Raises what `connect` raises, with the name of the teacher where there are several.
    """
    clients: dict[str | None, TeacherClient] = {}
    with ExitStack() as stack:
        for tag in sorted({prompt.teacher for prompt in prompts}, key=lambda tag: tag or ""):
            try:
                client = loop.run(connect(config, vocab_size, tokenizer, tag))
            except FingerprintMismatchError as error:
                if not config.teachers:
                    raise
                raise FingerprintMismatchError(f"[{table_of(tag)}]: {error}") from error
            stack.callback(_close, loop, client)
            clients[tag] = client
        yield clients


def warnings(
    config: TrainerConfig, model: str, tokenizer: PreTrainedTokenizerBase, clients: Clients
) -> list[str]:
    """What is to be said of end tokens before the first step."""
    generation = load_generation_config(model)
    stop_ids = stop_token_ids(tokenizer, generation, config.rollout.stop_tokens)
    found = own_end_warnings(tokenizer, generation)
    for tag, client in clients.items():
        warned = teacher_end_warnings(tokenizer, client.info.end_token_ids, stop_ids)
        found += [f"[{table_of(tag)}]: {text}" for text in warned]
    return found


def _close(loop: LoopThread, client: TeacherClient) -> None:
    loop.run(client.aclose())


def sessions(
    config: TrainerConfig, clients: Clients, *, only_observes: bool = False
) -> OpenSession:
    """Opens a session for a prompt, at its teacher and with what that is given instead. Where the
    drift policy `only_observes`, no response is stopped."""
    asked = {tag: score_options(config, tag) for tag in clients}
    policies = {tag: drift_policy(config, tag) for tag in clients}
    if only_observes:
        policies = {tag: replace(of, stop_in_flight=False) for tag, of in policies.items()}

    def open_session(prompt: Prompt) -> TeacherSession:
        tag = prompt.teacher
        return clients[tag].open(prompt.teacher_prompt_ids, asked[tag], policies[tag])

    return open_session


def rules(
    config: TrainerConfig, specials: SpecialTokens, clients: Clients
) -> dict[str | None, RolloutRules]:
    """What all rollouts of each teacher share."""
    return {
        tag: rollout_rules(config, specials, client.info, tag) for tag, client in clients.items()
    }


async def connect(
    config: TrainerConfig,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
    tag: str | None = None,
) -> TeacherClient:
    """A teacher that speaks of the same tokens and whose limits hold what the run asks for.

    Raises NotReadyError when none answers, FingerprintMismatchError or ConfigError when it does not
    fit, before any work is done.
    """
    settings = config.teacher_of(tag)
    client = await TeacherClient.connect(
        settings.endpoints,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=vocab_size,
        run_id=config.run.out.name,
        connect_timeout_s=settings.connect_timeout_s,
        on_absent="wait" if settings.on_absent == "wait" else "fail",
        access=teacher_access(settings),
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
        metric=kind(**{field.name: getattr(drift, field.name) for field in fields(kind)}),
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
