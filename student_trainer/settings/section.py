"""The base of every group of settings: frozen, unknown keys refused, docstrings kept, and a setting
that the chosen kind does not read refused.

A choice that changes what is read is written in one of two ways: as a union of groups, told apart
by one field (`[budget]`, `[loss]`), or, where the kinds share most settings, as one group in which
`ReadBy` marks the few that are not for all.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

UNREAD = "unread_setting"
"""Type of the error of a setting that is given and not read; ctx holds its name and the reason."""


@dataclass(frozen=True, slots=True)
class ReadBy:
    """Marks a setting, within Annotated, that only some values of another setting of its group
    read."""

    selector: str
    kinds: tuple[str, ...]

    def __init__(self, selector: str, *kinds: str) -> None:
        object.__setattr__(self, "selector", selector)
        object.__setattr__(self, "kinds", kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class MayChange:
    """Marks a setting or a whole group, within Annotated, that a resumed run may change: it says
    where things are, who is told, or what a step costs, and not what is learnt."""

    only_upward: bool = False


class Section(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="after")
    def _given_settings_are_read(self) -> Self:
        for name in sorted(self.model_fields_set):
            rule = read_by(type(self).model_fields[name])
            if rule is not None and getattr(self, rule.selector) not in rule.kinds:
                chosen = getattr(self, rule.selector)
                raise PydanticCustomError(
                    UNREAD,
                    "{name} {reason}",
                    {"name": name, "reason": unread(rule.selector, rule.kinds, chosen)},
                )
        return self


def read_by(field: FieldInfo) -> ReadBy | None:
    """The mark of a setting; None for one that is always read."""
    return next((rule for rule in field.metadata if isinstance(rule, ReadBy)), None)


def may_change(field: FieldInfo) -> MayChange | None:
    """The mark of a setting that a resumed run may change; None for one that it may not."""
    return next((rule for rule in field.metadata if isinstance(rule, MayChange)), None)


def resolved(section: BaseModel) -> dict[str, Any]:
    """A group with every default, as JSON; without what its kind does not read, so that it may be
    read again."""
    found: dict[str, Any] = {}
    dumped = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value, rule = getattr(section, name), read_by(field)
        if rule is not None and getattr(section, rule.selector) not in rule.kinds:
            continue
        found[name] = resolved(value) if isinstance(value, BaseModel) else dumped[name]
    return found


def unread(selector: str, kinds: typing.Sequence[str], chosen: str) -> str:
    """Why a setting has no effect, to be said behind its name."""
    *others, last = kinds
    readers = f"{', '.join(others)} and {last}" if others else last
    return f"is read by {selector} {readers} only; {selector} is {chosen}"


def default_kind(selector: str, kind: str) -> BeforeValidator:
    """For a union of groups: what a table is that does not say."""

    def named(table: Any) -> Any:
        return {selector: kind, **table} if isinstance(table, Mapping) else table

    return BeforeValidator(named)


def groups(annotation: object) -> list[type[BaseModel]]:
    """The groups of settings that a field may hold: none for a value, several for a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [group for part in typing.get_args(annotation) for group in groups(part)]


def is_by_name(field: FieldInfo) -> bool:
    """Whether a field holds groups under names of the user's choice."""
    return typing.get_origin(field.annotation) is dict and bool(groups(field.annotation))


def alternatives(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The groups of a union by what tells them apart; empty for everything else."""
    selector = field.discriminator
    if not isinstance(selector, str):
        return {}
    return {
        kind: group
        for group in groups(field.annotation)
        for kind in typing.get_args(group.model_fields[selector].annotation)
    }
