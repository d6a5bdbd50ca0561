"""The settings in words, from the classes that define them: what `student-trainer settings` prints
and docs/settings.md holds.

It knows pydantic models and nothing of what the settings mean.
"""

from __future__ import annotations

import difflib
import json
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from student_trainer.errors import ConfigError
from student_trainer.settings.section import alternatives, groups, is_by_name, may_change, read_by

WIDTH = 100
_WORDS: dict[object, str] = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    NoneType: "none",
}
_MAY_CHANGE = {False: "A resumed run may change it.", True: "A resumed run may raise it."}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting."""

    name: str
    """Without its table."""
    values: str
    """What may stand there: type and range."""
    default: str
    effect: str

    def text(self) -> str:
        """A list item: first what may stand there, then what it does."""
        item = f"- `{self.name}` ({self.values}; {self.default}): {self.effect}"
        return textwrap.fill(
            item, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The settings of one table of the file, or of one kind of it."""

    name: str
    """Dotted; empty for settings that stand in no table."""
    kind: str = ""
    """What chooses it among the tables of that name, such as `kind = "prune"`."""
    about: str
    settings: tuple[Setting, ...]

    def text(self) -> str:
        """A heading, a sentence, a list."""
        level = "###" if self.kind or "." in self.name else "##"
        title = f"{level} [{self.name}]{' ' * bool(self.kind)}{self.kind}" if self.name else ""
        about = textwrap.fill(self.about, WIDTH, break_on_hyphens=False)
        items = "\n".join(setting.text() for setting in self.settings)
        return "\n\n".join(filter(None, (title, about, items))) + "\n"


def tables(
    root: type[BaseModel], name: str = "", about: str = "", *, resumed: str = ""
) -> Iterator[Table]:
    """The tables of a model in the order of the file, each kind of a union as one."""
    prefix = f"{name}." * bool(name)
    leaves = {
        key: field for key, field in root.model_fields.items() if not groups(field.annotation)
    }
    if name or leaves:
        yield Table(
            name=name,
            about=_sentences(about, _about(root) if name else "", resumed),
            settings=tuple(setting(key, field) for key, field in leaves.items()),
        )
    for key, field in root.model_fields.items():
        if kinds := alternatives(field):
            yield from _kinds(f"{prefix}{key}", field, kinds)
            continue
        resumed = "A resumed run may change all of it." if may_change(field) else ""
        below = f"{prefix}{key}{'.NAME' * is_by_name(field)}"
        for group in groups(field.annotation):
            yield from tables(group, below, field.description or "", resumed=resumed)


def _kinds(name: str, field: FieldInfo, kinds: dict[str, type[BaseModel]]) -> Iterator[Table]:
    """A table for what chooses, and one for each choice."""
    selector = str(field.discriminator)
    told = (group.model_fields[selector].description for group in kinds.values())
    chosen = getattr(field.get_default(), selector, None)
    choice = Setting(
        name=selector,
        values=_listed(kinds),
        default="required" if field.is_required() else f"default {_default(chosen)}",
        effect=next(filter(None, told), ""),
    )
    yield Table(name=name, about=field.description or "", settings=(choice,))
    for kind, group in kinds.items():
        for table in tables(group, name):
            own = tuple(s for s in table.settings if s.name != selector)
            chooses = f"{selector} = {json.dumps(kind)}" if table.name == name else ""
            yield Table(name=table.name, kind=chooses, about=table.about, settings=own)


def reference(root: type[BaseModel], section: str = "") -> str:
    """The text of all tables, of one and what is below it, or of one setting.

    Raises ConfigError for a name that is neither, with the nearest one.
    """
    found = list(tables(root))
    if not section:
        return "\n".join(table.text() for table in found)
    chosen = [t for t in found if f"{t.name}.".startswith(f"{section}.")]
    if chosen:
        return "\n".join(table.text() for table in chosen)
    parent, _, leaf = section.rpartition(".")
    items = [
        f"[{table.name}]{' ' * bool(table.kind)}{table.kind}\n{setting.text()}\n"
        for table in found
        for setting in table.settings
        if (table.name, setting.name) == (parent, leaf)
    ]
    if items:
        return "\n".join(items)
    known = {table.name for table in found}
    known |= {f"{table.name}.{setting.name}" for table in found for setting in table.settings}
    near = difflib.get_close_matches(section, sorted(known), n=1)
    top = ", ".join(dict.fromkeys(table.name.partition(".")[0] for table in found))
    meant = f"; did you mean {near[0]!r}?" if near else f"; there are {top}"
    raise ConfigError(f"{section!r} is no section and no setting{meant}")


def setting(name: str, field: FieldInfo) -> Setting:
    """One field of a model."""
    rule = read_by(field)
    only = f"Only with {rule.selector} {_or(rule.kinds)}." if rule else ""
    resumed = _MAY_CHANGE[mark.only_upward] if (mark := may_change(field)) else ""
    return Setting(
        name=name,
        values=_values(field.annotation, field.metadata),
        default="required" if field.is_required() else f"default {_default(field.get_default())}",
        effect=_sentences(field.description or "", only, resumed),
    )


def _sentences(*texts: str) -> str:
    return " ".join(" ".join(text.split()) for text in texts if text)


def _about(group: type[BaseModel]) -> str:
    # pydantic and Python inherit docstrings; the base's says nothing of this group.
    return group.__dict__.get("__doc__") or ""


def _values(annotation: Any, metadata: Sequence[object]) -> str:
    """A type and its range in words."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner = [
            rule
            for part in parts[1:]
            for rule in (part.metadata if isinstance(part, FieldInfo) else [part])
        ]
        return _values(parts[0], [*inner, *metadata])
    if origin in (Union, UnionType):
        return _or([_values(part, [] if part is NoneType else metadata) for part in parts])
    if origin is Literal:
        return _listed(parts)
    if origin is tuple:
        item = _values(parts[0], [])
        bounds = _range(metadata)
        return f"list of {item}{bounds}" if parts[-1] is ... else f"list of {len(parts)}: {item}"
    if origin is dict or annotation is dict:
        return "table"
    if isinstance(annotation, type) and issubclass(annotation, PurePath):
        return "path"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _listed(member.value for member in annotation)
    return _WORDS.get(annotation, str(annotation)) + _range(metadata)


def _range(metadata: Sequence[object]) -> str:
    bounds = [
        f"{word} {getattr(rule, limit)}"
        for limit, word in _BOUNDS.items()
        for rule in metadata
        if getattr(rule, limit, None) is not None
    ]
    lengths = [getattr(rule, "min_length", None) for rule in metadata]
    bounds += [f"of {length} or more" for length in lengths if length is not None]
    return f" {', '.join(bounds)}" if bounds else ""


def _or(words: Sequence[str]) -> str:
    *others, last = words
    if not others:
        return last
    comma = "," if any("," in word for word in others) else ""
    return f"{', '.join(others)}{comma} or {last}"


def _listed(values: typing.Iterable[object]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in values)


def _default(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, PurePath):
        value = str(value)
    return f"`{json.dumps(value)}`"
