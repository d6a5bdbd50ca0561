"""README.md of a trained student: what it was made from and what came of it, by one template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from student_trainer.diagnostics.step_report import StepReport
from student_trainer.recording.json_lines import read_run
from student_trainer.recording.run_folder import STUDENT, read_record
from student_trainer.recording.summary import figures, told

CARD_FILE = "README.md"
TEMPLATE = "model_card.md.jinja"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(folder: Path) -> Path:
    """The card in the saved student of a run. Raises DatasetError for a broken file of the run."""
    path = folder / STUDENT / CARD_FILE
    path.write_text(model_card(folder), encoding="utf-8")
    return path


def model_card(folder: Path) -> str:
    """The card of the run in a folder, from what the run wrote down there."""
    written, record, said = read_run(folder), read_record(folder), told(folder)
    summary = figures(written, said.get("finished"), said.get("steps_planned"))
    starts = record.get("starts", [])
    last: dict[str, Any] = starts[-1] if starts else {}
    settings = {"loss.kind": None, "data.train": None, "data.heldout": None}
    settings |= last.get("settings", {})
    student = str(settings.get("student.model"))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    return environment.get_template(TEMPLATE).render(
        name=folder.resolve().name,
        student=student,
        base_model=student if HUB_NAME.fullmatch(student) and not Path(student).exists() else None,
        teacher={"model_id": "", "revision": "", "dtype": "", "engine": "", "weights_digest": ""}
        | last.get("teacher", {}),
        is_adapter=any(name.startswith("student.lora.") for name in settings),
        settings=settings,
        starts=starts,
        summary={"wall_s": None} | summary,
        tokens=f"{summary.get('generated_tokens', 0):,}",
        pairs=_evaluated(summary) | _learnt(written.steps),
    )


def _evaluated(summary: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Whatever was measured before and after, by its name."""
    names = [name.removesuffix("_before") for name in summary if name.endswith("_before")]
    both = {name: (summary[f"{name}_before"], summary.get(f"{name}_after")) for name in names}
    return {
        name.replace("_at_", "@").replace("_", " "): (f"{before:.4g}", f"{after:.4g}")
        for name, (before, after) in both.items()
        if before is not None and after is not None
    }


def _learnt(steps: list[StepReport]) -> dict[str, tuple[str, str]]:
    """Of the first and the last step, on the student's own responses."""
    values = [step.values() for step in steps]
    ends = (values[0], values[-1]) if values else ()
    names = {"reverse_kl": "reverse KL a token, nats", "length_mean": "tokens a response"}
    return {
        text: (f"{ends[0][name]:.4g}", f"{ends[1][name]:.4g}")
        for name, text in names.items()
        if ends and name in ends[0] and name in ends[1]
    }
