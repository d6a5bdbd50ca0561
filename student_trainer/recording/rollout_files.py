"""The rollouts of a run as Parquet files: written in a thread of their own, beside the loop.

The loop hands over references and goes on; texts, columns and compression are the thread's. Two
steps may wait for it, then the loop does: what is recorded is never dropped in silence. A disk that
refuses is told of once, and costs the run nothing else.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rollout_records.schema import Origin
from rollout_records.writing import thin_out, write_step
from student_trainer.errors import one_line
from student_trainer.recording.rollout_rows import RowMaker, chosen
from student_trainer.records import Rollout

MAX_WAITING = 2
"""Steps, besides the one that is being written."""
NICENESS = 10
"""Of the thread: where cores are few, what trains goes before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Of one step what is to be written."""

    step: int
    rollouts: Mapping[int, Rollout]
    """By their place in the step."""
    weights: Mapping[int, NDArray[np.float32]]


class RolloutFiles:
    """Those that one process writes; begins with the first step that is handed over."""

    def __init__(
        self,
        folder: Path,
        *,
        per_step: int | None,
        max_bytes: int,
        rank: int,
        maker: RowMaker,
        origin: Callable[[], Origin],
        say: Callable[[str], None],
    ) -> None:
        """`per_step`: rollouts recorded of each, None for all of them, 0 for none. `max_bytes`: of
        the files that this process writes. `origin` is asked once, in the thread. `say`: to a
        person, from the thread."""
        self._folder = folder
        self._per_step = per_step
        self._max_bytes = max_bytes
        self._rank = rank
        self._maker = maker
        self._origin = origin
        self._say = say
        self._told: set[str] = set()
        self._queue: Queue[Recorded | None] = Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def chosen(self, rollouts: Sequence[Rollout]) -> dict[int, Rollout]:
        """Those of a step that are to be recorded, by their place in it."""
        return chosen(rollouts, self._per_step)

    def write(
        self,
        step: int,
        rollouts: Mapping[int, Rollout],
        weights: Mapping[int, NDArray[np.float32]],
    ) -> None:
        """Of the chosen ones those that this process has learnt from, and so knows the weights of;
        one in which no token counts is the first process's."""
        own = {
            index: rollout
            for index, rollout in rollouts.items()
            if index in weights or (self._rank == 0 and not rollout.mask.any())
        }
        if not own:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rollout files", daemon=True)
            self._thread.start()
        self._queue.put(Recorded(step=step, rollouts=own, weights=weights))

    def close(self) -> None:
        """Returns once all that was handed over is on the disk."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        with suppress(OSError, AttributeError):  # not Linux: there the nice value is a process's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        origin: Origin | None = None
        while (recorded := self._queue.get()) is not None:
            try:
                origin = origin or self._origin()
                self._write(recorded, origin)
            except (OSError, pa.ArrowException) as error:
                self._say_once(
                    f"recording: the rollouts of step {recorded.step} could not be written to "
                    f"{self._folder}: {one_line(error)[:200]}; the run goes on"
                )
            except Exception as error:  # noqa: BLE001 - what is written beside the run ends no run
                self._say_once(
                    f"recording: the rollouts of step {recorded.step} could not be made rows: "
                    f"{type(error).__name__}: {one_line(error)[:200]}; please report it"
                )

    def _write(self, recorded: Recorded, origin: Origin) -> None:
        rows = [
            self._maker.row(
                rollout, step=recorded.step, index=index, weight=recorded.weights.get(index)
            )
            for index, rollout in recorded.rollouts.items()
        ]
        write_step(self._folder, recorded.step, self._rank, rows, origin)
        if thin_out(self._folder, self._max_bytes, self._rank):
            self._say_once(
                f"recording.max_bytes: {self._folder} has reached {self._max_bytes / 1e6:.0f} MB; "
                "from here on older steps are thinned out"
            )

    def _say_once(self, text: str) -> None:
        kind = text.partition(":")[0]
        if kind not in self._told:
            self._told.add(kind)
            self._say(text)
