"""What a checkpoint is: the student's weights, and beside them what each part of a run needs.

A checkpoint appears under its final name only when it is complete, so a killed run never leaves one
that half loads. Old ones go after the new one is there. Knows no part: each has state() and load().
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

from student_trainer import best_checkpoints
from student_trainer.best_checkpoints import Best, write_figures
from student_trainer.errors import CheckpointError
from student_trainer.process.writing import writing_to

STATE_FILE = "trainer_state.pt"
REMEDY = "make room or choose another run.out; `train --resume` goes on from the last whole one"
MAX_SHARE = 1 / 20
"""Of the wall time, for checkpoints that come by the clock."""
PROBE_BYTES = 64 << 20
SLOWEST_DISK = 10 << 20
"""Bytes a second that any disk manages: below what this writes in time nothing is measured."""


class Part(Protocol):
    """What of a run has a state; it is made of tensors, numbers, strings, lists and dicts."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. Raises ValueError for a state that this part could not have had."""


class TrainState:
    """The state of a run after its last finished step, and its numbered checkpoints."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        save_weights: Callable[[Path | None], None],
        parts: Mapping[str, Part],
        settings: Mapping[str, str],
        writes: bool = True,
        best: Best = best_checkpoints.NONE,
    ) -> None:
        """`settings` of the run, by their dotted names, are kept for whoever goes on from it. The
        `best` stay besides the newest `keep`. Of several processes one `writes`; the others give it
        what they have of weights and parts."""
        self._folder = folder
        self._keep = keep
        self._save_weights = save_weights
        self._parts = parts
        self._settings = dict(settings)
        self._writes = writes
        self._best = best
        self._evaluated: tuple[int, Mapping[str, float]] | None = None
        self.step = 0
        """Finished steps."""
        self._saved_at = time.monotonic()
        self._save_took_s = 0.0

    def save(self) -> Path:
        """Writes a checkpoint and drops the oldest ones beyond `keep` that are not the best."""
        import torch

        began = time.monotonic()
        if not self._writes:
            self._save_weights(None)
            for part in self._parts.values():
                part.state()
            return self._present
        self._drop_halves()
        final = self._present
        with replaced(final) as partial:
            self._save_weights(partial)
            states = {name: part.state() for name, part in self._parts.items()}
            written = {"step": self.step, "settings": self._settings, **states}
            torch.save(written, partial / STATE_FILE)
            if self._evaluated is not None and self._evaluated[0] == self.step:
                write_figures(partial, self._evaluated[1])
        self.drop_old()
        self._saved_at = time.monotonic()
        self._save_took_s = self._saved_at - began
        return final

    def evaluated(self, figures: Mapping[str, float]) -> None:
        """The weights of this step came to these: its checkpoint, written or not, is rated by
        them. Raises CheckpointError where the disk refuses."""
        self._evaluated = (self.step, figures)
        if self._present.is_dir():
            with writing_to(self._present, CheckpointError, remedy=REMEDY):
                write_figures(self._present, figures)

    @property
    def _present(self) -> Path:
        return self._folder / f"step-{self.step:06d}"

    def drop_old(self) -> None:
        """Deletes the oldest beyond `keep` that are not the best, and what a killed run left."""
        self._drop_halves()
        complete = complete_checkpoints(self._folder)
        best = self._best.of(complete)
        for old in complete[: -self._keep]:
            if old not in best:
                # Under another name first: half of one would look like a checkpoint.
                dropped = old.with_name(f".{old.name}.old")
                old.rename(dropped)
                shutil.rmtree(dropped)

    def _drop_halves(self) -> None:
        """What a killed run has half written or half deleted."""
        _remove(*self._folder.glob(".step-*"))

    def is_due(self, every_steps: int | None, every_minutes: float | None) -> bool:
        """Every so many steps, else after so many minutes, and MAX_SHARE of the time at most."""
        if every_steps is not None:
            return self.step % every_steps == 0
        if every_minutes is None:
            return False
        wait_s = max(60 * every_minutes, self._save_took_s / MAX_SHARE)
        return time.monotonic() - self._saved_at >= wait_s

    def load(self, folder: Path, *, may_begin_anew: Collection[str] = ()) -> list[str]:
        """Goes on from a checkpoint; names the parts that began anew because they could not.

        Raises CheckpointError when it cannot be read, or another part cannot go on from it.
        """
        written = read_state(folder)
        anew = []
        for name, part in self._parts.items():
            try:
                part.load(written[name])
            except (KeyError, ValueError) as error:
                if name in may_begin_anew:
                    anew.append(name)
                    continue
                raise CheckpointError(
                    f"{folder}: the state of {name} does not fit the settings of this run: {error}"
                ) from error
        self.step = written["step"]
        return anew


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def latest(folder: Path) -> Path:
    """The newest complete checkpoint. Raises CheckpointError when there is none."""
    if complete := complete_checkpoints(folder):
        return complete[-1]
    raise CheckpointError(f"{folder}: no checkpoint to resume from")


def step_of(checkpoint: Path) -> int:
    """Steps that were finished when it was written."""
    return int(checkpoint.name.removeprefix("step-"))


@contextmanager
def replaced(final: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `final` when the block ends without an error.

    With an error, such as of a full disk, nothing of it is left and `final` stays what it was.
    Raises CheckpointError where the disk refuses.
    """
    partial, old = (final.with_name(f".{final.name}.{part}") for part in ("partial", "old"))
    _remove(partial, old)
    try:
        with writing_to(final, CheckpointError, remedy=REMEDY):
            partial.mkdir(parents=True)
            yield partial
            if final.exists():
                final.rename(old)
            partial.rename(final)
    finally:
        _remove(partial, old)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def settings_of(folder: Path) -> dict[str, str]:
    """The settings that a checkpoint was made with, without reading a tensor into memory.

    Raises CheckpointError.
    """
    return dict(read_state(folder, lazily=True)["settings"])


def read_state(folder: Path, *, lazily: bool = False) -> dict[str, Any]:
    """What stands beside the weights: `step`, `settings`, and a state for each part.

    Raises CheckpointError.
    """
    import torch

    try:
        return dict(torch.load(folder / STATE_FILE, weights_only=True, mmap=lazily))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {STATE_FILE}, not a checkpoint of a run") from None
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"{folder}: cannot read {STATE_FILE}: {error}") from error


def seconds_to_write(folder: Path, num_bytes: int, *, limit_s: float) -> float | None:
    """How long the disk of a folder takes for so much, by a probe; None if surely within a limit.

    The probe is written and flushed: what fits into memory at first is not what a large model does.
    """
    if num_bytes < SLOWEST_DISK * limit_s:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".write-probe"
    started = time.monotonic()
    try:
        with path.open("wb") as probe:
            probe.write(os.urandom(1 << 20) * (PROBE_BYTES >> 20))
            os.fsync(probe.fileno())
    finally:
        path.unlink(missing_ok=True)
    took_s = time.monotonic() - started
    seconds = num_bytes / PROBE_BYTES * took_s
    return seconds if seconds > limit_s else None
