"""Writes docs/settings.md from the classes that define the settings of trainer and teacher.

Run: make docs. A test compares the file with `document()`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.reference import Table, reference, setting
from teacher_server.settings import ReadBy, TeacherConfig

PATH = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

HEAD = """\
<!-- Written by `make docs` from the docstrings of the settings. Change them there. -->

# Settings

Each item says what may stand there, what stands there when nothing is given, and what it does.
Lengths are tokens; names that end in `_s` are seconds, in `_nats` nats. "none" is written by
leaving the setting out.

[The trainer](#the-trainer) reads one TOML file; [the teacher](#the-teacher) flags, environment and
a TOML file.

# The trainer

    student-trainer train --config FILE --set run.steps=20 --set 'sampler={"kind": "hf"}'
    student-trainer settings budget         # this page, or a part of it
    student-trainer show-config --config FILE

`--set` overrides one setting, or a whole table; a value is JSON where it parses as JSON, else text,
and `null` is none. What the chosen kind of a table does not read is refused, and so is a name that
is not here.

"""

TEACHER_HEAD = """
# The teacher

    teacher-server serve --config FILE --max-sessions 512
    teacher-server show-config              # every setting and where it came from

A setting `max_sessions` is the flag `--max-sessions`, the variable `TEACHER_MAX_SESSIONS` and the
key `max_sessions` of the TOML file; the first of these that is given wins.

"""


def document() -> str:
    """The whole file."""
    return HEAD + reference(TrainerConfig) + TEACHER_HEAD + _teacher().text()


def _teacher() -> Table:
    """The teacher's settings: one table, of which some are of one engine alone."""
    settings = []
    for name, field in TeacherConfig.model_fields.items():
        made = setting(name, field)
        only = [
            f"Only with engine {' or '.join(rule.engines)}."
            for rule in field.metadata
            if isinstance(rule, ReadBy)
        ]
        effect = " ".join([f"{made.effect[0].upper()}{made.effect[1:]}.", *only])
        settings.append(replace(made, effect=effect))
    return Table(name="", about="", settings=tuple(settings))


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
