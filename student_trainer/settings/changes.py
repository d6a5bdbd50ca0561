"""What of the settings differs from those that a run began with, and what of that it may change.

Which settings are harmless is said where they are defined, by `MayChange`; nothing here knows one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from pydantic_core import to_jsonable_python

from student_trainer.settings.section import MayChange, Section, may_change

UNSET = "unset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One setting of a configuration; values are JSON."""

    name: str
    """Dotted."""
    value: str
    default: str | None
    """None for one that must be given."""
    mark: MayChange | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting that differs; a value is JSON, None for one that the other side does not have."""

    name: str
    before: str | None
    now: str | None
    harmless: bool

    def __str__(self) -> str:
        return f"{self.name} {self.before or UNSET} -> {self.now or UNSET}"

    def is_within(self, keys: Collection[str]) -> bool:
        """Whether one of the keys names it, or a group that holds it."""
        return any(f"{self.name}.".startswith(f"{key}.") for key in keys)


def leaves(section: Section, prefix: str = "", mark: MayChange | None = None) -> Iterator[Leaf]:
    """Every setting below a group; a mark of the group holds for all that it has."""
    for key, field in type(section).model_fields.items():
        name, value, own = f"{prefix}{key}", getattr(section, key), mark or may_change(field)
        if isinstance(value, Section):
            yield from leaves(value, f"{name}.", own)
            continue
        if isinstance(value, Mapping) and any(isinstance(v, Section) for v in value.values()):
            for inner, group in value.items():
                yield from leaves(group, f"{name}.{inner}.", own)
            continue
        default = (
            None if field.is_required() else _json(field.get_default(call_default_factory=True))
        )
        yield Leaf(name=name, value=_json(value), default=default, mark=own)


def written(section: Section) -> dict[str, str]:
    """Dotted name -> JSON of every setting: what a checkpoint keeps to compare with."""
    return {leaf.name: leaf.value for leaf in leaves(section)}


def determining(section: Section) -> dict[str, object]:
    """Dotted name -> value of every setting that what is learnt depends on."""
    found = leaves(section)
    return {
        leaf.name: json.loads(leaf.value)
        for leaf in found
        if leaf.mark is None or leaf.mark.only_upward
    }


def changes(before: Mapping[str, str], section: Section) -> list[Change]:
    """What differs from what was written then, by name.

    A setting that was not there yet, in an older version, had what is its default now.
    """
    now = {leaf.name: leaf for leaf in leaves(section)}
    found = [
        Change(
            name=name,
            before=before.get(name),
            now=leaf.value,
            harmless=leaf.mark is not None and _is_allowed(leaf.mark, before.get(name), leaf.value),
        )
        for name, leaf in now.items()
        if before.get(name, leaf.default) != leaf.value
    ]
    gone = [
        Change(name=n, before=before[n], now=None, harmless=False) for n in before if n not in now
    ]
    return sorted([*found, *gone], key=lambda change: change.name)


def _is_allowed(mark: MayChange, before: str | None, now: str) -> bool:
    if not mark.only_upward or before is None:
        return True
    return bool(json.loads(now) > json.loads(before))


def _json(value: object) -> str:
    return json.dumps(to_jsonable_python(value))
