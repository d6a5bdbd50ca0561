"""Exit code 2 says that starting it again will not help: every class of error has its place.

Run: pytest tests/trainer/test_exit_codes.py
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from student_trainer import errors
from student_trainer.errors import CheckpointError, TrainerError
from student_trainer.process.failures import EXIT_FAILED, EXIT_LASTING, exit_code
from student_trainer.process.writing import writing_to
from teacher_client.access import AccessError
from teacher_client.retry import BrokenStreamError
from teacher_wire.errors import ERROR_CODES, TeacherError

LASTING = {
    "ConfigError",
    "LossError",
    "DatasetError",
    "AccessError",
    "InvalidRequestError",
    "FingerprintMismatchError",
    "UnauthenticatedError",
    "PermissionDeniedError",
}
"""A setting, data, a token, a certificate, another teacher."""
PASSING = {
    "HubError": "the network",
    "SamplerError": "an engine that did not start, for want of memory perhaps",
    "SamplerDiedError": "an engine that died",
    "GraderError": "processes that did not start",
    "ProcessLostError": "another process",
    "WeightSyncError": "a disk without room",
    "LearnerMemoryError": "memory that others have",
    "NonFiniteLossError": "a batch",
    "SessionNotFoundError": "a teacher that was restarted",
    "SessionOffsetError": "a teacher that was restarted",
    "CapacityError": "a teacher that is full",
    "RateLimitedError": "a limit by the minute",
    "QuotaError": "other runs of the tenant",
    "SlowConsumerError": "a slow network",
    "MessageTooLargeError": "never met: the client cuts what it sends",
    "NotReadyError": "a teacher that is away",
    "DeadlineError": "a busy teacher",
    "EngineError": "a teacher whose engine failed",
    "NonFiniteError": "a batch",
}


def classes() -> list[type[Exception]]:
    """Every error of the trainer and of a teacher."""
    ours = [
        found
        for found in vars(errors).values()
        if isinstance(found, type) and issubclass(found, TrainerError) and found is not TrainerError
    ]
    return [*ours, *ERROR_CODES, AccessError]


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_every_class_of_errors_has_one_exit_code(kind: type[Exception]) -> None:
    error = kind("it says so")
    if kind is CheckpointError:
        assert exit_code(error) == EXIT_LASTING
        error.__cause__ = OSError("We couldn't connect to load the files")
        error.__cause__.__cause__ = ConnectionRefusedError()
        assert exit_code(error) == EXIT_FAILED
        return
    assert (kind.__name__ in LASTING) != (kind.__name__ in PASSING), "give it a row here"
    assert exit_code(error) == (EXIT_LASTING if kind.__name__ in LASTING else EXIT_FAILED)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EACCES, EXIT_LASTING),
        (errno.EROFS, EXIT_LASTING),
        (errno.ENOENT, EXIT_LASTING),
        (errno.ENOSPC, EXIT_FAILED),
        (errno.EDQUOT, EXIT_FAILED),
        (errno.EMFILE, EXIT_FAILED),
        (errno.ECONNRESET, EXIT_FAILED),
    ],
)
def test_what_the_system_says_is_told_apart_by_its_number(number: int, code: int) -> None:
    assert exit_code(OSError(number, "it says so", "/runs/one")) == code


def test_what_could_not_be_written_may_be_another_time(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError) as caught,
        writing_to(tmp_path, CheckpointError, remedy="make room"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert exit_code(caught.value) == EXIT_FAILED


def test_what_nobody_foresaw_may_help_to_start_again() -> None:
    for error in (RuntimeError(), MemoryError(), BrokenStreamError("cut"), TeacherError("none")):
        assert exit_code(error) == EXIT_FAILED
