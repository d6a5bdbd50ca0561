"""The Compose files as they are, and what Compose makes of one without variables."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLIENT = tomllib.loads((ROOT / "proto" / "pyproject.toml").read_text())
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
TEACHERS = [name for name in SERVICES if name.startswith("teacher")]
TRAINERS = [name for name in SERVICES if name.startswith("trainer")]
OVERLAYS = {name: (ROOT / "docker" / f"{name}.yml") for name in ("tokens", "tls", "trainer-host")}
VARIABLE = re.compile(r"\$\{(\w+)(:?)([-?])([^}]*)\}")


def overlay(name: str) -> dict[str, Any]:
    """docker/<name>.yml."""
    content: dict[str, Any] = yaml.safe_load(OVERLAYS[name].read_text())
    return content


def interpolated(text: str, **values: str) -> str:
    """The text as Compose reads it when only these variables are set. Raises LookupError with the
    message of one that must be and is not."""

    def value(match: re.Match[str]) -> str:
        name, colon, kind, otherwise = match.groups()
        given = values.get(name)
        if given or (given is not None and not colon):
            return given
        if kind == "?":
            raise LookupError(f"{name} {otherwise}")
        return otherwise

    return VARIABLE.sub(value, text).replace("$$", "$")


def arguments(name: str, service: dict[str, Any] | None = None, **values: str) -> list[str]:
    """The words of a service's command, its program first."""
    command = (service or SERVICES[name])["command"]
    words = [interpolated(word, **values) for word in command]
    if SERVICES[name].get("entrypoint") == ["numbered-run"]:
        added = ["--set", "run.out=/runs/demo-1", "--set", "run.seed=0", "--resume", "auto"]
        return ["student-trainer", "train", *words, *added]
    return ["teacher-server", *words]
