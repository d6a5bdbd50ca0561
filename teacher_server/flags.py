"""The settings of a teacher as flags of a command line, in groups, each with what it may be."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, get_args

from teacher_server.settings import ENGINES, ConfigError, TeacherConfig, kind_of, read_by

_FIELDS = TeacherConfig.model_fields
GROUPS = {
    "engine": "what is served",
    "block_size": "engine vllm",
    "hf_sessions": "engine hf",
    "fake_vocab_size": "engine fake",
    "host": "where, and to whom",
    "served_model_name": "clients of other trainers (docs/clients.md)",
    "max_sessions": "how much at once, and for how long",
    "ready_file": "the process",
}
"""The first setting of each group, and its title; the others follow as in TeacherConfig."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and one flag a setting; one that is not given is not in the namespace."""
    parser.add_argument("--config", metavar="PATH", help="TOML file with settings")
    group: argparse._ActionsContainer = parser
    for name, entry in _FIELDS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        readers = read_by(entry)
        note = "" if readers == ENGINES else f", {' and '.join(readers)} only"
        text = " ".join(f"{entry.description} (default {entry.default!r}{note})".split())
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if entry.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "|".join(get_args(entry.annotation)) or kind_of(entry).upper()
        group.add_argument(f"--{name.replace('_', '-')}", **options)


def refuse_unknown_flags(words: Iterable[str]) -> None:
    """Raises ConfigError for words of a command line that are no flag, naming the nearest."""
    for word in words:
        flag, _, _ = word.partition("=")
        known = [f"--{name.replace('_', '-')}" for name in ("config", *_FIELDS)]
        near = difflib.get_close_matches(flag, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near and near[0] != flag else ""
        raise ConfigError(f"unknown argument {flag!r}{hint}")
