"""Puts the recording of rollouts together: whose they are, and what makes a row of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rollout_records.measures import policy_settings
from rollout_records.schema import FOLDER, Origin
from student_trainer.assembly.evaluating import decoder
from student_trainer.assembly.parts import Start
from student_trainer.assembly.teachers import Teachers, drift_policy
from student_trainer.evaluation.grading import Grader
from student_trainer.recording.rollout_files import RolloutFiles
from student_trainer.recording.rollout_rows import RowMaker
from student_trainer.recording.run_folder import git_commit
from student_trainer.records import Rollout
from student_trainer.settings.changes import written
from student_trainer.settings.config import TrainerConfig
from teacher_wire.records import DriftPolicy
from teacher_wire.vocabulary import Vocabulary


def rollout_files(
    start: Start,
    tokenizer: PreTrainedTokenizerBase,
    asked: Teachers,
    grader: Grader,
    say: Callable[[str], None],
) -> RolloutFiles:
    """What this process records of the rollouts; of several each has a part of the bytes."""
    config, ranks = start.config, start.ranks
    policies = {tag: drift_policy(config, tag) for tag in asked.clients}
    return RolloutFiles(
        config.run.out / FOLDER,
        per_step=config.recording.count,
        max_bytes=config.recording.max_bytes // ranks.world,
        rank=ranks.rank,
        maker=RowMaker(
            decode=lambda ids: str(tokenizer.decode(ids.tolist())),
            is_right=_is_right(grader, tokenizer),
            policies=policies,
        ),
        origin=lambda: _origin(config, tokenizer, asked, policies[next(iter(policies))]),
        say=say,
    )


def _is_right(
    grader: Grader, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Rollout], bool | None]:
    """By the text of the answer, as evaluations find it, where that is enough to tell."""
    decode = decoder(tokenizer)

    def is_right(rollout: Rollout) -> bool | None:
        answer = rollout.prompt.answer
        return None if answer is None else grader.at_once(decode(rollout.last_answer_ids), answer)

    return is_right


def _origin(
    config: TrainerConfig,
    tokenizer: PreTrainedTokenizerBase,
    asked: Teachers,
    policy: DriftPolicy,
) -> Origin:
    settings = json.dumps(written(config), sort_keys=True)
    return Origin(
        tokenizer=config.student.model,
        tokenizer_fingerprint=Vocabulary.of(tokenizer).fingerprint,
        student=config.student.model,
        teachers={tag or "": client.info.model_id for tag, client in asked.clients.items()},
        drift_policy=policy_settings(policy),
        settings_digest=hashlib.sha256(settings.encode()).hexdigest(),
        commit=git_commit(Path.cwd()),
        temperature=config.rollout.temperature,
        run=config.run.out.resolve().name,
    )
