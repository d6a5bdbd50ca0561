"""What ends a command, in one line: cause and remedy. The traceback goes to a file.

Errors of ours are typed and worded where they arise. Here is what the system may say anywhere: the
disk, the memory; and what nobody foresaw.
"""

from __future__ import annotations

import errno
import os
import tempfile
import traceback
from pathlib import Path

from preflight.network import is_network
from student_trainer.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    LossError,
    TrainerError,
    one_line,
)
from teacher_client.access import AccessError
from teacher_wire.errors import (
    FingerprintMismatchError,
    InvalidRequestError,
    PermissionDeniedError,
    TeacherError,
    UnauthenticatedError,
)

ERROR_LOG = "error.log"
_DISK = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there: the quota is used up",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that may be written",
    errno.EPERM: "choose a folder that may be written",
    errno.EEXIST: "a part of the path is a file: choose another",
    errno.ENOTDIR: "a part of the path is a file: choose another",
    errno.EISDIR: "this is a folder: name a file",
    errno.ENOENT: "check the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


EXIT_FAILED, EXIT_LASTING = 1, 2
LASTING = (
    ConfigError,
    LossError,
    DatasetError,
    AccessError,
    InvalidRequestError,
    FingerprintMismatchError,
    UnauthenticatedError,
    PermissionDeniedError,
)
"""Starting the same again ends the same: settings, data, tokens, certificates, another teacher."""
_LASTING_ON_DISK = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
}


def exit_code(error: Exception) -> int:
    """2 where starting it again will not help, else 1: a teacher that is away, a full disk, memory
    that others have, an engine that died, and what nobody foresaw."""
    if isinstance(error, CheckpointError):
        passes = error.may_pass or is_network(error)
        return EXIT_FAILED if passes else EXIT_LASTING
    if isinstance(error, LASTING):
        return EXIT_LASTING
    if isinstance(error, OSError) and error.errno in _LASTING_ON_DISK:
        return EXIT_LASTING
    return EXIT_FAILED


def failure_line(error: Exception) -> str:
    """One line; only a configuration's list of problems has more."""
    name = type(error).__name__
    if isinstance(error, TrainerError | TeacherError | AccessError):
        text = str(error) if isinstance(error, ConfigError) else _cut(error)
        return f"{name}: {text}"
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{name}: {where}{error.strerror}; {_DISK[error.errno]}"
    if name == "OutOfMemoryError":  # torch's, which is not imported for its sake
        return (
            f"{name}: {_cut(error)}; lower optim.micro_batch_tokens, the budget or "
            "sampler.gpu_memory_utilization"
        )
    if isinstance(error, MemoryError):
        return f"{name}: out of memory; lower optim.micro_batch_tokens or the budget"
    return f"unexpected failure: {name}: {_cut(error)}; please report it with the traceback"


def _cut(error: BaseException) -> str:
    """What an error says, in one line and without the end of a very long message."""
    text = one_line(error)
    return text if len(text) <= 600 else f"{text[:600]} ..."


def needs_traceback(error: Exception) -> bool:
    """Whether more than the line is worth keeping: something of others' lies beneath."""
    ours = isinstance(error, TrainerError | TeacherError | AccessError)
    return not ours or error.__cause__ is not None


def keep_traceback(error: Exception, folder: Path | None) -> Path | None:
    """Writes it to the run's folder where there is one, else to a temporary file; None when there
    is no place for it either."""
    text = "".join(traceback.format_exception(error))
    for place in (folder, None):
        if place is not None and not place.is_dir():
            continue
        try:
            if place is not None:
                path = place / ERROR_LOG
            else:
                number, name = tempfile.mkstemp(prefix="driftline-", suffix=".log")
                os.close(number)
                path = Path(name)
            path.write_text(text, encoding="utf-8")
        except OSError:
            continue
        return path
    return None
