"""What is wrong with a configuration, in words: the setting, the reason, the nearest name."""

from __future__ import annotations

import difflib

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line a problem: the setting, what is wrong, the value; for a typo the nearest name."""
    lines = []
    for problem in error.errors():
        place = [str(part) for part in problem["loc"]]
        line = f"  {'.'.join(place) or 'settings'}: {problem['msg']}"
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(place[-1], sorted(leaf_names(root)), n=1)
            line = f"  {'.'.join(place)}: unknown setting" + (
                f"; did you mean {near[0]!r}?" if near else ""
            )
        elif not isinstance(problem["input"], dict):
            line += f" (got {problem['input']!r})"
        lines.append(line)
    return "\n".join(lines)


def leaf_names(root: type[BaseModel]) -> set[str]:
    """Names of all settings and sections below a model."""
    names: set[str] = set()
    for section in [root, *_sections(root)]:
        names |= set(section.model_fields)
    return names


def _sections(root: type[BaseModel]) -> list[type[BaseModel]]:
    found = []
    pending = [field.annotation for field in root.model_fields.values()]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
            pending += [field.annotation for field in annotation.model_fields.values()]
        else:
            pending += getattr(annotation, "__args__", ())
    return found
