"""A run on several processes: what it cannot be."""

from __future__ import annotations

from student_trainer.errors import ConfigError
from student_trainer.process.ranks import Ranks
from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.sampler import HfBatchedSamplerSettings


def refuse_spread(config: TrainerConfig, ranks: Ranks) -> None:
    """Raises ConfigError for settings that several processes cannot share."""
    world = ranks.world
    if world == 1:
        return
    rollout, sampler = config.rollout, config.sampler
    if rollout.prompts_per_step < world:
        raise ConfigError(
            f"{world} processes, and rollout.prompts_per_step is {rollout.prompts_per_step}: each "
            "needs a prompt at least; fewer processes, or more prompts a step"
        )
    if rollout.prompts_per_step % world:
        raise ConfigError(
            f"{world} processes, and rollout.prompts_per_step is {rollout.prompts_per_step}: each "
            f"generates for as many, so that it must be a multiple of {world}"
        )
    if isinstance(sampler, HfBatchedSamplerSettings) and sampler.weights == "shared":
        raise ConfigError(
            f'sampler.weights is "shared", and {world} processes have parts of the student each: '
            '"copied", or "auto"'
        )
    if config.optim.kind == "adamw_8bit":
        raise ConfigError(f"optim.kind is 'adamw_8bit', with {world} processes: 'adamw'")
    if config.student.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"student.device is {config.student.device!r}, with {world} processes: 'cuda' gives "
            "each its own"
        )
