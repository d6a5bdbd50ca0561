"""A loss of the user's own, from `package.module:function`: imported, and tried before it is used.

The current directory is importable, as with `python -m`. A user's guide is docs/own-loss.md.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from functools import partial

from student_trainer.errors import LossError
from student_trainer.losses import DeclaredLoss
from student_trainer.losses.laws import LawBrokenError, check_laws
from student_trainer.losses.objective import Divergence
from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.loss import ImportedLossSettings
from teacher_wire.errors import InvalidRequestError
from teacher_wire.records import flags_for


def with_declared_needs(config: TrainerConfig) -> TrainerConfig:
    """The configuration, its imported loss saying what it needs; unchanged for any other loss.

    Raises LossError where it cannot be imported, ConfigError where the run does not have it.
    """
    if not isinstance(config.loss, ImportedLossSettings):
        return config
    needs = declared_loss(config.loss.path).needs
    try:
        flags_for(needs.teacher_columns)
    except InvalidRequestError as error:
        raise LossError(f"{config.loss.path}: its needs: {error}") from None
    return config.with_needs(needs)


def imported_loss(path: str, options: Mapping[str, object]) -> Divergence:
    """The loss with its options, tried. Raises LossError naming what is wrong with it."""
    declared = declared_loss(path)
    try:
        inspect.signature(declared.function).bind(None, **options)
    except TypeError as error:
        raise LossError(
            f"{path} is called as function(inputs, **options) with the options "
            f"{', '.join(options) or 'none'}: {error}; it takes "
            f"{inspect.signature(declared.function)}"
        ) from None
    found = partial(declared.function, **options)
    try:
        check_laws(found, kind=declared.kind, needs=declared.needs)
    except LawBrokenError as error:
        raise LossError(f"{path} breaks a law of a {declared.kind}: {error}") from error
    return found


def declared_loss(path: str) -> DeclaredLoss:
    """What stands at the path. Raises LossError."""
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise LossError(f"{path!r} must look like package.module:function")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = (isinstance(error, ModuleNotFoundError) and error.name) or ""
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise LossError(
                f"{path}: there is no module {missing}; looked in {here} and where Python looks"
            ) from None
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise LossError(
            f"{path}: importing it raised {type(error).__name__}: {error} "
            f"({last.filename}:{last.lineno})"
        ) from error
    found = getattr(module, name, None)
    if isinstance(found, DeclaredLoss):
        return found
    if found is None:
        there = [key for key, value in vars(module).items() if isinstance(value, DeclaredLoss)]
        raise LossError(
            f"{path}: {module_name} has no {name}; losses there: {', '.join(there) or 'none'}"
        )
    if not callable(found):
        raise LossError(f"{path} is a {type(found).__name__}, not a function")
    raise LossError(
        f"{path} does not say what it is: put @loss(kind=..., needs=...) of "
        "student_trainer.losses above it"
    )


def describe(path: str, options: Mapping[str, object]) -> str:
    """One line about a loss that obeys its laws. Raises LossError."""
    imported_loss(path, options)
    declared = declared_loss(path)
    needs = {name: value for name, value in vars(declared.needs).items() if value}
    listed = ", ".join(
        f"{name} {value}" if name == "teacher_k" else name for name, value in needs.items()
    )
    return f"{path}: a {declared.kind} that obeys the laws; needs {listed or 'nothing more'}"
