"""docs/settings.md is what the settings' classes say, and they say something of every setting."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from scripts.settings_document import PATH, document
from student_trainer.cli import main
from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.reference import reference, tables
from student_trainer.settings.section import alternatives, groups
from teacher_server.settings import TeacherConfig
from tests.waiting import LIMIT_S


def undescribed(root: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Settings without a docstring; of a union's selector one kind must have it."""
    for name, field in root.model_fields.items():
        kinds = alternatives(field)
        selector = str(field.discriminator) if kinds else ""
        told = [group.model_fields[selector].description for group in kinds.values()]
        if kinds and not any(told):
            yield f"{prefix}{name}.{selector}"
        below = groups(field.annotation)
        for group in below:
            yield from (
                found
                for found in undescribed(group, f"{prefix}{name}.")
                if found != f"{prefix}{name}.{selector}"
            )
            if "__doc__" not in group.__dict__:
                yield f"{prefix}{name}: {group.__name__}"
        if not below and not field.description:
            yield prefix + name


def test_every_setting_and_every_group_has_a_docstring() -> None:
    assert list(undescribed(TrainerConfig)) == []
    assert [n for n, field in TeacherConfig.model_fields.items() if not field.description] == []


def test_the_document_is_what_the_classes_say() -> None:
    assert PATH.read_text(encoding="utf-8") == document(), "run: make docs"


def test_every_setting_is_in_the_document() -> None:
    shown = {
        f"{table.name}.{setting.name}"
        for table in tables(TrainerConfig)
        for setting in table.settings
    }
    assert {"budget.patience", "loss.kind", "weights.block_gate.tau", "sampler.kind"} <= shown
    assert len(shown) > 90
    teacher = PATH.read_text(encoding="utf-8").split("# The teacher\n")[1]
    assert [n for n in TeacherConfig.model_fields if f"\n- `{n}` (" not in teacher] == []


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            "checkpoint",
            "## [checkpoint]\n\nWhat a run that was cut off goes on from. A resumed run may ",
        ),
        (
            "budget.patience",
            '[budget] kind = "prune"\n- `patience` (integer above 0; default `3`): Steps in a row '
            "with fewer hits",
        ),
        ("weights.prune", "### [weights.prune]\n\n"),
    ],
)
def test_a_section_or_a_setting_is_printed(
    section: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["settings", section]) == 0
    assert capsys.readouterr().out.startswith(expected)


def test_a_union_is_printed_with_all_its_kinds() -> None:
    said = reference(TrainerConfig, "budget")
    for kind in ("fixed", "prune", "progressive", "quantile"):
        assert f'### [budget] kind = "{kind}"\n' in said
    assert "(number above 0, below 1, or none; default `0.2`)" in reference(TrainerConfig, "loss")


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ("budge", "'budge' is no section and no setting; did you mean 'budget'?"),
        ("budget.patiense", "did you mean 'budget.patience'?"),
        ("zzz", "'zzz' is no section and no setting; there are run, student, sampler, data, "),
    ],
)
def test_an_unknown_section_is_refused_with_the_nearest(
    section: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["settings", section]) == 2
    assert reason in capsys.readouterr().err


def test_the_reference_is_printed_without_torch() -> None:
    code = (
        "import sys; from student_trainer.cli import main; main(['settings']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=LIMIT_S)
    assert done.returncode == 0
