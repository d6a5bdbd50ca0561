"""What of a run goes into a checkpoint, and whether and as what it may go on from one."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from student_trainer.best_checkpoints import Best
from student_trainer.errors import ConfigError
from student_trainer.learner.learner import Learner
from student_trainer.process.ranks import ALONE, Ranks
from student_trainer.process.stopping import LIMIT_S
from student_trainer.rollouts.stream import RolloutStream
from student_trainer.settings.best_metric import higher_is_better
from student_trainer.settings.changes import Change, changes, written
from student_trainer.settings.config import TrainerConfig
from student_trainer.train_state import (
    TrainState,
    complete_checkpoints,
    seconds_to_write,
    settings_of,
    step_of,
)


def train_state(
    config: TrainerConfig, learner: Learner, stream: RolloutStream, ranks: Ranks = ALONE
) -> TrainState:
    """The state of a run, of the parts that have one."""
    settings = config.checkpoint
    return TrainState(
        config.run.checkpoints,
        keep=settings.keep,
        save_weights=learner.save,
        parts={"learner": learner, "budget": stream.budget, "stream": stream},
        settings=written(config),
        writes=ranks.is_first,
        best=Best(
            keep=settings.keep_best,
            metric=settings.best_metric,
            higher_is_better=higher_is_better(settings.best_metric),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GoesOn:
    """From which checkpoint a run goes on, and with which settings that are not the old ones."""

    checkpoint: Path
    changes: tuple[Change, ...]

    @property
    def may_begin_anew(self) -> Collection[str]:
        """Parts whose settings were meant to change, so that their old state may not fit."""
        accepted = [change for change in self.changes if not change.harmless]
        return {"budget"} if any(change.is_within({"budget"}) for change in accepted) else ()

    def lines(self) -> Iterator[str]:
        """What a person is told of it."""
        step = step_of(self.checkpoint)
        for change in self.changes:
            effect = "" if change.harmless else " (accepted)"
            if change.name == "run.steps":
                effect += ": the learning rate's schedule ends there now"
            elif change.name == "student.model":
                effect += ": the weights stay those of the checkpoint"
            yield f"changed since step {step}: {change}{effect}"


def goes_on(config: TrainerConfig, checkpoint: Path, accepted: Collection[str]) -> GoesOn:
    """Compares the settings with those of the checkpoint, before anything is loaded.

    `accepted` are names of settings, or of groups of them, that may change what is learnt. Raises
    ConfigError naming every other one that would, with both values; and for steps that are done.
    """
    if (done := step_of(checkpoint)) > config.run.steps:
        raise ConfigError(f"run.steps is {config.run.steps}, but {checkpoint} is of step {done}")
    before = settings_of(checkpoint)
    found = changes(before, config)
    known = {*before, *written(config)}
    for key in accepted:
        if not any(f"{name}.".startswith(f"{key}.") for name in known):
            raise ConfigError(f"--accept-changes {key}: there is no such setting")
    refused = [c for c in found if not c.harmless and not c.is_within(accepted)]
    if refused:
        listed = "".join(f"\n  {change}" for change in refused)
        flags = " ".join(f"--accept-changes {change.name}" for change in refused)
        raise ConfigError(
            f"{checkpoint} was made with other settings, and these change what is learnt:{listed}\n"
            f"give the old values again, begin a new run, or say that it is meant: {flags}"
        )
    return GoesOn(checkpoint=checkpoint, changes=tuple(found))


def gone_on(state: TrainState, goes_on: GoesOn | None) -> Iterator[str]:
    """Goes on from a checkpoint, if there is one, and says with what."""
    if goes_on is None:
        return
    anew = state.load(goes_on.checkpoint, may_begin_anew=goes_on.may_begin_anew)
    yield from goes_on.lines()
    for name in anew:
        yield f"the {name} begins anew: its old state does not fit these settings"


def warnings(config: TrainerConfig, learner: Learner) -> Iterator[str]:
    """What to know of checkpoints before the first step."""
    size = learner.checkpoint_bytes
    if (seconds := seconds_to_write(config.run.out, size, limit_s=LIMIT_S)) is not None:
        yield (
            f"a checkpoint of {size / 1e9:.0f} GB takes about {seconds:.0f} s to write to "
            f"{config.run.out} (measured), so SIGTERM ends this run after that long and not within "
            f"{LIMIT_S:.0f} s. Give it that time before SIGKILL, or set checkpoint.every_steps"
        )
    if config.checkpoint.every_steps is None and config.checkpoint.every_minutes is None:
        return
    config.run.out.mkdir(parents=True, exist_ok=True)
    kept = config.checkpoint.keep + config.checkpoint.keep_best
    more = max(1, kept + 1 - len(complete_checkpoints(config.run.checkpoints)))
    if (room := shutil.disk_usage(config.run.out).free) < more * size:
        yield (
            f"{more} more checkpoints of {size / 1e9:.1f} GB will be in {config.run.out} at once "
            f"({_kept(config)}, and one while it is written), and "
            f"{room / 1e9:.1f} GB are free: make room, or lower checkpoint.keep"
        )


def _kept(config: TrainerConfig) -> str:
    best = config.checkpoint.keep_best
    of_best = f", checkpoint.keep_best {best}" if best else ""
    return f"checkpoint.keep {config.checkpoint.keep}{of_best}"
