"""What is wrong with a configuration, in words: the setting, the reason, and what was meant.

One place for every group and every union of groups: a setting that the chosen kind does not read is
refused with the kinds that do, a misspelt name with the nearest one, an old one with the new.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from student_trainer.settings.section import UNREAD, alternatives, groups, is_by_name, unread

RENAMED: dict[str, str] = {"run.queue_depth": "rollout.max_staleness"}
"""Dotted name of a setting that is no more -> the one that took its place."""
RENAMED_VALUES: dict[tuple[str, object], str] = {
    ("teacher.on_absent", "drop"): "finish_unscored",
}
"""(dotted name, value that is no more) -> the value that took its place."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a problem is, and what could have been there."""

    name: str
    """Dotted, as it is written: without the kind that a union has chosen."""
    group: type[BaseModel] | None
    """The group in which the last part of the name was looked up."""
    kinds: Mapping[str, type[BaseModel]]
    """The groups of the union that this one was chosen from, by kind; empty without a union."""
    selector: str
    """The setting that chooses."""
    chosen: str
    below: Mapping[str, type[BaseModel]]
    """The groups that may stand at this place, where it is a union."""

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line a problem: the setting as it is written, what is wrong, and what to write."""
    return "\n".join(f"  {_line(problem, root)}" for problem in error.errors())


def _line(problem: ErrorDetails, root: type[BaseModel]) -> str:
    place, given = _place(root, problem["loc"]), problem["input"]
    context: Mapping[str, Any] = problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        return _unknown(place, root)
    if problem["type"] == UNREAD:
        return f"{place.name}.{context['name']} {context['reason']}"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        selector = context["discriminator"].strip("'")
        found = repr(context["tag"]) if "tag" in context else "missing"
        return f"{place.name}.{selector} is {found}, must be one of {', '.join(place.below)}"
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"{place.name} is {given!r}, must be a table of settings"
    if isinstance(given, str) and (place.name, given) in RENAMED_VALUES:
        return f"{place.name}: {given!r} is now {RENAMED_VALUES[place.name, given]!r}"
    text = str(context["error"]) if problem["type"] == "value_error" else problem["msg"]
    text = text.replace("valid tuple", "valid list")  # TOML and JSON have no other
    got = "" if isinstance(given, dict) else f" (got {given!r})"
    return f"{place.name or 'settings'}: {text}{got}"


def _place(root: type[BaseModel], location: tuple[int | str, ...]) -> _Place:
    """Follows pydantic's location, in which the kind of a union is a part of its own."""
    place = _Place("", root, {}, "", "", {})
    group: type[BaseModel] | None = root
    names: list[str] = []
    kinds: Mapping[str, type[BaseModel]] = {}
    selector = chosen = ""
    by_name = False
    for part in map(str, location):
        if by_name:
            names.append(part)
            place = replace(place, name=".".join(names))
            by_name = False
            continue
        if group is None and part in kinds:
            group, chosen = kinds[part], part
            continue
        names.append(part)
        field = group.model_fields.get(part) if group is not None else None
        below = alternatives(field) if field is not None else {}
        place = _Place(".".join(names), group, kinds, selector, chosen, below)
        held = groups(field.annotation) if field is not None else []
        group = held[0] if len(held) == 1 and not below else None
        if by_name := field is not None and is_by_name(field):
            group = held[0]
        kinds, chosen = below, ""
        selector = str(field.discriminator) if field is not None and below else ""
    return place


def _unknown(place: _Place, root: type[BaseModel]) -> str:
    """Why there is no such setting, and which one was meant."""
    if place.name in RENAMED:
        return f"{place.name} is now {RENAMED[place.name]}"
    others = {kind: group for kind, group in place.kinds.items() if kind != place.chosen}
    readers = [kind for kind, group in others.items() if place.leaf in group.model_fields]
    if readers:
        return f"{place.name} {unread(place.selector, readers, place.chosen)}"
    return f"{place.name}: unknown setting{_meant(place, others, root)}"


def _meant(place: _Place, others: Mapping[str, type[BaseModel]], root: type[BaseModel]) -> str:
    """The nearest name of the group, else of the kind that has one, else of another group."""
    if near := _nearest(place.leaf, place.group.model_fields if place.group else {}):
        return f"; did you mean {near!r}?"
    for kind, group in others.items():
        if near := _nearest(place.leaf, group.model_fields):
            reason = unread(place.selector, [kind], place.chosen)
            return f"; did you mean {near!r}? It {reason}"
    elsewhere = names(root)
    near = place.leaf if place.leaf in elsewhere else _nearest(place.leaf, elsewhere)
    meant = sorted(elsewhere.get(near, ()))
    return f"; did you mean {' or '.join(map(repr, meant))}?" if 1 <= len(meant) <= 2 else ""


def _nearest(word: str, known: Mapping[str, object]) -> str:
    """The known word that is most like one that is not known; empty when none is."""
    return next(iter(difflib.get_close_matches(word, known, n=1)), "")


def names(group: type[BaseModel], prefix: str = "") -> dict[str, set[str]]:
    """Dotted names of all settings and groups below a group, by their last part."""
    found: dict[str, set[str]] = {}
    for name, field in group.model_fields.items():
        found.setdefault(name, set()).add(prefix + name)
        # What stands under a name of the user's own is a copy of what stands elsewhere.
        for below in [] if is_by_name(field) else groups(field.annotation):
            for leaf, dotted in names(below, f"{prefix}{name}.").items():
                found.setdefault(leaf, set()).update(dotted)
    return found
