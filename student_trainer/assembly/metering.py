"""The metrics of a run, where `metrics.port` asks for them: served from before anything is loaded,
and told of every step and every round trip. Without a port nothing of it is imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING

from student_trainer.assembly.teachers import Teachers
from student_trainer.process.ranks import Ranks
from student_trainer.records import Prompt
from student_trainer.rollouts.metered import MeteredSession
from student_trainer.rollouts.rollout import TeacherSession
from student_trainer.rollouts.stream import OpenSession
from student_trainer.settings.config import TrainerConfig, table_of

if TYPE_CHECKING:
    from student_trainer.recording.metrics import TrainerMetrics


@contextmanager
def trainer_metrics(config: TrainerConfig, ranks: Ranks) -> Iterator[TrainerMetrics | None]:
    """Served within the block by the first of several processes; None where nobody asks for them.

    Raises ConfigError, in every process, for a port that cannot be had.
    """
    made: list[TrainerMetrics] = []
    with ExitStack() as stack:

        def serve() -> None:
            if config.metrics.port == 0:
                return
            from student_trainer.recording.metrics import TrainerMetrics, served

            metrics = TrainerMetrics(
                run=config.run.out.name, student=config.student.model, steps=config.run.steps
            )
            stack.enter_context(served(metrics, config.metrics.host, config.metrics.port))
            made.append(metrics)

        ranks.agreed(serve)
        yield made[0] if made else None


def metered(
    open_session: OpenSession, metrics: TrainerMetrics | None, asked: Teachers
) -> OpenSession:
    """Sessions at these teachers whose round trips are told to the metrics, which look at the
    replicas too; the same as before without."""
    if metrics is None:
        return open_session

    metrics.watch(asked.replicas, asked.failovers)
    tell = cache(metrics.round_trips)

    def opened(prompt: Prompt) -> TeacherSession:
        return MeteredSession(open_session(prompt), tell(table_of(prompt.teacher)))

    return opened
