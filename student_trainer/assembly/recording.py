"""The record of a run: its folder, the description of this start, and the trackers it names."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from rich.console import Console

from student_trainer.assembly.parts import Start
from student_trainer.assembly.teachers import Teachers
from student_trainer.diagnostics.alarms import Method
from student_trainer.recording.recorder import Recorder
from student_trainer.recording.run_folder import RunRecord
from student_trainer.recording.summary import write_progress
from student_trainer.recording.terminal import Bars
from student_trainer.recording.trackers.sink import Tracker, TrackerSink
from student_trainer.recording.trackers.tensorboard import TensorBoard
from student_trainer.recording.trackers.trackio import Trackio
from student_trainer.recording.trackers.wandb import Wandb
from student_trainer.recording.unrecorded import Unrecorded
from student_trainer.settings.changes import determining
from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.section import resolved
from student_trainer.train_state import step_of


@contextmanager
def recorded(
    start: Start, bars: Bars, asked: Teachers, decode: Callable[[int], str]
) -> Iterator[tuple[Recorder | Unrecorded, RunRecord | Unrecorded]]:
    """Takes the folder of the run and writes down by what it goes; ends that with the block. Of
    several processes only the first does."""
    if not start.ranks.is_first:
        yield Unrecorded(), Unrecorded()
        return
    config, goes_on = start.config, start.goes_on
    from_step = None if goes_on is None else step_of(goes_on.checkpoint)
    folder = config.run.out
    teacher = next(iter(asked.clients.values())).info
    recorder = Recorder(
        folder,
        bars,
        resume_from=from_step,
        overwrite=start.replaces,
        decode=decode,
        method=Method(
            loss_has_tail=config.loss.needs.mass_outside is not None,
            weights=tuple(name for name, weight in config.weights if weight is not None),
        ),
    )
    about = {
        "from_step": from_step or 0,
        "changes": list(goes_on.lines()) if goes_on else [],
        "settings": determining(config),
        "teacher": {
            "model_id": teacher.model_id,
            "revision": teacher.revision,
            "weights_digest": teacher.weights_digest,
            "dtype": teacher.dtype,
            "engine": f"{teacher.engine} {teacher.engine_version}".strip(),
        },
        "excluded_ids": asked.excluded_ids,
    }
    with (
        closing(recorder),
        RunRecord(
            folder, config=resolved(config), resumed=goes_on is not None, about=about
        ) as record,
    ):
        for name in config.trackers.report_to:
            begin = _tracker(name, config, record, from_step)
            recorder.add(TrackerSink(name, begin, lambda text: warn(bars.console, text)))
        if start.metrics is not None:
            recorder.add(start.metrics)
        write_progress(folder, finished=False, steps_planned=config.run.steps)
        yield recorder, record


def warn(console: Console, text: str) -> None:
    """A line that a person should see before the first step, or as soon as it is true."""
    console.print(f"warning: {text}", style="yellow", highlight=False, markup=False)


def _tracker(
    name: str, config: TrainerConfig, record: RunRecord, from_step: int | None
) -> Callable[[], Tracker]:
    """What starts a tracker, with the identity that this run has there since it first began."""
    settings, folder = config.trackers, config.run.out
    called = settings.name or folder.resolve().name
    if name == "tensorboard":
        return lambda: TensorBoard(folder, resume_from=from_step)
    run_id = record.tracker_id(name) or secrets.token_hex(4)
    record.keep_tracker_id(name, run_id)
    if name == "trackio":
        return lambda: Trackio(
            project=settings.project, name=f"{called}-{run_id}", config=record.config
        )
    return lambda: Wandb(
        folder,
        run_id=run_id,
        project=settings.project,
        name=called,
        entity=settings.entity or None,
        config=record.config,
    )
