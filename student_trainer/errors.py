"""What can go wrong on the trainer's side; the teacher's errors are in teacher_wire.errors.

TrainerError
├── ConfigError       a setting is unknown, out of range, or does not fit another one
├── LossError         a loss of your own cannot be imported, or breaks a law
├── CheckpointError   a checkpoint does not exist, cannot be loaded or cannot be written
├── HubError          a student cannot be uploaded to a hub
├── DatasetError      a dataset does not exist, or a line of it is malformed
├── SamplerError      the generating engine does not start, or has died
│   └── SamplerDiedError  the engine has died: another one may do what it was doing
├── GraderError       the processes that compare mathematics do not start
├── ProcessLostError  another process of a run on several has ended
├── WeightSyncError   the sampler's log-probs are not the learner's, or weights do not reach it
├── LearnerMemoryError an update does not fit into memory, however small its micro-batches
└── NonFiniteLossError a loss or a gradient is NaN or infinite; the weights are left as they were
"""

from __future__ import annotations

from collections.abc import Sequence


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


class TrainerError(Exception):
    """Root of the trainer's own errors."""

    may_pass = False
    """What could not be written may be written another time: the disk had no room, say."""


class ConfigError(TrainerError, ValueError):
    """A setting is unknown, out of range, or does not fit another one."""


class LossError(TrainerError, ValueError):
    """A loss of your own cannot be imported, does not take its options, or breaks a law."""


class CheckpointError(TrainerError, OSError):
    """A checkpoint does not exist, cannot be loaded or cannot be written."""


class HubError(TrainerError, RuntimeError):
    """A student cannot be uploaded to a hub."""


class DatasetError(TrainerError, ValueError):
    """A dataset does not exist, or a line of it is malformed."""


class SamplerError(TrainerError, RuntimeError):
    """The generating engine does not start, or has died."""


class SamplerDiedError(SamplerError):
    """The generating engine has died; nothing is wrong with what was asked of it."""


class GraderError(TrainerError, RuntimeError):
    """The processes that compare mathematics do not start."""


class ProcessLostError(TrainerError, RuntimeError):
    """Another of the processes that train one student has ended."""


class WeightSyncError(TrainerError, RuntimeError):
    """The sampler does not generate from the learner's weights, or not by its arithmetic."""


class LearnerMemoryError(TrainerError, MemoryError):
    """An update does not fit into memory, in smaller micro-batches either."""


class NonFiniteLossError(TrainerError, ArithmeticError):
    """A loss or a gradient is not finite; nothing was learnt from it."""
