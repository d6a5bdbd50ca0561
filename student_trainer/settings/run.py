"""Settings of a run as such: its folder and length, what it goes on from, and who is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from student_trainer.settings.best_metric import check_metric
from student_trainer.settings.section import MayChange, Section


class RunSettings(Section):
    """What a run is called, how long it lasts, and what is the same when it is done again."""

    out: Annotated[Path, MayChange()]
    """Folder of everything the run writes; its name is the run's name at the teacher."""
    seed: int = 0
    """Of the order of the problems, of sampling, and of the updates within a step."""
    steps: Annotated[int, MayChange(only_upward=True)] = Field(gt=0)
    """Optimisation rounds: one batch of rollouts each."""
    texts: Annotated[int, MayChange()] = Field(4, ge=0)
    """Rollouts a step whose text is kept in the run's folder."""
    otlp_endpoint: Annotated[str, MayChange()] = Field("", pattern="^(https?://.+)?$")
    """OTLP/HTTP address that traces are sent to (needs the extra `otel`); empty for none."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.out / "checkpoints"


class CheckpointSettings(Section):
    """What a run that was cut off goes on from."""

    every_steps: int | None = Field(None, gt=0)
    """Steps between checkpoints; none: by the clock."""
    every_minutes: float | None = Field(10.0, gt=0)
    """Without every_steps: minutes between checkpoints, and twenty times what the last one took to
    write, so that at most a twentieth of a run goes into them. None: a run that is killed begins
    again."""
    keep: int = Field(2, gt=0)
    """Checkpoints kept: the newest. Older ones are deleted, but for the best."""
    keep_best: int = Field(0, ge=0)
    """Checkpoints kept however old they are: the best by the evaluation at their step. One whose
    step had none is never among them."""
    best_metric: Annotated[str, AfterValidator(check_metric)] = "heldout_reverse_kl"
    """Figure of an evaluation by which a checkpoint is the best, as metrics.jsonl calls it:
    "accuracy", "pass_at_4", "heldout_forward_kl"; whether more or less is better is known."""


class RecordingSettings(Section):
    """What of the rollouts themselves is kept: a Parquet file a step in `run.out`/rollouts, with
    all that was said of every token."""

    rollouts_per_step: Annotated[int, Field(ge=0)] | Literal["all"] = 8
    """Rollouts recorded of each step, evenly spaced over it, with at least one of those that were
    stopped in flight; 0 for none, "all" for all."""
    max_bytes: int = Field(1_000_000_000, gt=0)
    """Of the recorded rollouts of the run; beyond, older steps are thinned out: the first and the
    newest stay, and what is left between is spread over the run."""

    @property
    def count(self) -> int | None:
        """Rollouts of a step; None for all."""
        return None if self.rollouts_per_step == "all" else self.rollouts_per_step


class MetricsSettings(Section):
    """Where Prometheus asks how the run is. Of several processes the first one answers."""

    port: int = Field(0, ge=0, le=65535)
    """Port on which `/metrics` is served; 0 for none."""
    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on. Whoever reaches it may read: another one than loopback is for a network
    of one's own."""


class TrackerSettings(Section):
    """Who is told a run's figures besides its folder. One that fails ends no run."""

    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """TensorBoard files in the run's folder, Weights & Biases, trackio; the last two need the extra
    of their name."""
    project: str = Field("driftline", min_length=1)
    """Of Weights & Biases and trackio."""
    name: str = ""
    """Of the run there; empty: the name of `run.out`."""
    entity: str = ""
    """User or team at Weights & Biases; empty: the account's own."""
