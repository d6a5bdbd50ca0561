"""The rollouts of an update that came to no finite gradient, kept for whoever looks for the cause.

`python -m student_trainer.recording.failed_update FILE` shows them, `read_update` gives them back
as they were learnt from: with the checkpoint before it and the settings in config.json the update
can be done again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from student_trainer.errors import DatasetError, NonFiniteLossError, one_line
from student_trainer.records import Finish, Prompt, Rollout, RolloutTimes
from teacher_wire.records import DriftState, ScoreRows

FAILED_UPDATE = "nonfinite_update.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedUpdate:
    """One update of a step, and what it was to learn from."""

    step: int
    """As metrics.jsonl counts: the first is 1."""
    update: int
    """Of the step; the first is 1."""
    rollouts: Sequence[Rollout]


@contextmanager
def kept_if_not_finite(
    folder: Path, step: int, under_way: Callable[[], tuple[int, Sequence[Rollout]]]
) -> Iterator[None]:
    """A NonFiniteLossError within names the file in which the update that was `under_way` is kept.

    A disk that refuses is told of in the same error, and hides nothing.
    """
    try:
        yield
    except NonFiniteLossError as error:
        number, rollouts = under_way()
        failed = FailedUpdate(step=step, update=number, rollouts=rollouts)
        path = folder / FAILED_UPDATE
        try:
            write_update(path, failed)
        # PyTorch turns the system's errors into its own.
        except (OSError, RuntimeError) as refused:
            where = f"could not be kept in {path}: {one_line(refused)[:200]}"
        else:
            where = f"are in {path}; look at them with `python -m {__name__} {path}`"
        raise NonFiniteLossError(
            f"{error} (step {step}, update {number}); its {len(rollouts)} rollouts {where}"
        ) from None


def write_update(path: Path, failed: FailedUpdate) -> None:
    """Whole or not at all. Raises OSError and RuntimeError where the disk refuses."""
    import torch

    # Each of several processes has the same.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    rollouts = [_plain(asdict(rollout)) for rollout in failed.rollouts]
    try:
        torch.save({"step": failed.step, "update": failed.update, "rollouts": rollouts}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_update(path: Path) -> FailedUpdate:
    """What `write_update` wrote. Raises DatasetError for any other file."""
    import torch

    try:
        written = torch.load(path, weights_only=True)
        rollouts = [_rollout(_arrays(values)) for values in written["rollouts"]]
        return FailedUpdate(step=written["step"], update=written["update"], rollouts=rollouts)
    # PyTorch, pickle and the records each have errors of their own for what is none of these.
    except Exception as error:
        raise DatasetError(
            f"{path}: not the rollouts of an update: {one_line(error)[:200]}"
        ) from error


def described(failed: FailedUpdate) -> Iterator[str]:
    """A line for the update, and one a rollout: whose, how long, and what of it is not finite."""
    yield f"step {failed.step}, update {failed.update}: {len(failed.rollouts)} rollouts"
    for number, rollout in enumerate(failed.rollouts):
        odd = [name for name, array in _columns(rollout) if not np.isfinite(array).all()]
        yield (
            f"{number}: {rollout.prompt.prompt_id}, {len(rollout)} tokens of weights "
            f"{rollout.policy_version}, not finite: {', '.join(odd) or 'nothing'}"
        )


def _columns(rollout: Rollout) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Every row of numbers, by a dotted name."""
    for prefix, values in (("", asdict(rollout)), ("teacher.", asdict(rollout.teacher))):
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                yield f"{prefix}{name}", value


def _plain(value: Any) -> Any:
    """Tensors for arrays and values for names: what can be read without running anything."""
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _arrays(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, Mapping):
        return {key: _arrays(item) for key, item in value.items()}
    return tuple(map(_arrays, value)) if isinstance(value, list) else value


def _rollout(values: Mapping[str, Any]) -> Rollout:
    drift = values["drift"]
    return Rollout(
        **{
            **values,
            "prompt": Prompt(**values["prompt"]),
            "teacher": ScoreRows(**values["teacher"]),
            "drift": None if drift is None else DriftState(**drift),
            "finish": Finish(values["finish"]),
            "times": RolloutTimes(**values["times"]),
        }
    )


def main(paths: Sequence[str]) -> None:
    """Shows files."""
    for path in paths:
        sys.stdout.writelines(f"{line}\n" for line in described(read_update(Path(path))))


if __name__ == "__main__":
    main(sys.argv[1:])
