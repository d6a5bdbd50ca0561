"""What of a run goes into a checkpoint, and whether it may go on from one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from student_trainer.errors import ConfigError
from student_trainer.learner.learner import Learner
from student_trainer.process.stopping import LIMIT_S
from student_trainer.rollouts.stream import RolloutStream
from student_trainer.settings.config import TrainerConfig
from student_trainer.train_state import TrainState, latest, seconds_to_write, step_of

ELSEWHERE = (
    "run.out",
    "run.otlp_endpoint",
    "checkpoint.",
    "teacher.endpoints",
    "teacher.token_file",
    "teacher.tls_",
    "teacher.connect_timeout_s",
)
"""Beginnings of the settings that say where things are and who is asked, not what is learnt."""


def train_state(config: TrainerConfig, learner: Learner, stream: RolloutStream) -> TrainState:
    """The state of a run, of the parts that have one."""
    return TrainState(
        config.run.checkpoints,
        keep=config.checkpoint.keep,
        save_weights=learner.save,
        parts={"learner": learner, "budget": stream.budget, "stream": stream},
        settings=determining_settings(config),
    )


def determining_settings(config: TrainerConfig) -> dict[str, str]:
    """Dotted name -> JSON of every setting that the outcome of a run depends on."""
    leaves: dict[str, str] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                walk(value, f"{name}.")
            elif not name.startswith(ELSEWHERE):
                leaves[name] = json.dumps(value)

    walk(config.model_dump(mode="json"), "")
    return leaves


def to_resume(config: TrainerConfig) -> Path:
    """The run's newest checkpoint.

    Raises CheckpointError when there is none, ConfigError when it is of a later step than the run
    has.
    """
    checkpoint = latest(config.run.checkpoints)
    if (done := step_of(checkpoint)) > config.run.steps:
        raise ConfigError(f"run.steps is {config.run.steps}, but {checkpoint} is of step {done}")
    return checkpoint


def warnings(
    config: TrainerConfig, learner: Learner, state: TrainState, checkpoint: Path | None
) -> list[str]:
    """Goes on from a checkpoint, if there is one, and says what to know before the first step."""
    found = []
    if checkpoint is not None and (changes := state.load(checkpoint)) is not None:
        found.append(f"these settings changed since step {state.step}: {changes}")
    size = learner.checkpoint_bytes
    if (seconds := seconds_to_write(config.run.out, size, limit_s=LIMIT_S)) is not None:
        found.append(
            f"a checkpoint of {size / 1e9:.0f} GB takes about {seconds:.0f} s to write to "
            f"{config.run.out} (measured), so SIGTERM ends this run after that long and not within "
            f"{LIMIT_S:.0f} s. Give it that time before SIGKILL, or set checkpoint.every_steps"
        )
    return found
