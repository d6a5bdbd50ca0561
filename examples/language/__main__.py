"""`make demo-language`: a pruned SmolLM2 learns from the whole one, before and after.

In stages, which examples/language/stages.py keeps in a folder: a second call does what is left.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from examples.demo import ROOT, DemoError, exit_code_of

NEEDED = ("gguf", "reasoning_gym")
"""Of the extra `language`."""
TRAINER_CONFIG = ROOT / "configs" / "trainer-language.toml"
TEACHER_CONFIG = ROOT / "configs" / "teacher-language.toml"
WHAT_COMES = """\
SmolLM2-135M-Instruct teaches a copy of itself that lacks 6 of its 30 layers, on this machine's CPU:
about 25 minutes on two idle cores, 9 GiB of memory, 4 GB of disk. Models and prompts (2 min), the
held-out prompts before (3 min); both engines start (2 min), 28 steps (16 min); and after (2 min).
Each stage is kept: after Ctrl-C the same command goes on."""


def main() -> int:
    """Runs what is left of the demo; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "language")
    parser.add_argument("--set", action="append", default=[], help="trainer setting, key=value")
    parser.add_argument("--part", choices=["heldout", "tune"], default="heldout")
    parser.add_argument("--prepare", action="store_true", help="models and prompts, no more")
    parser.add_argument("--prompts", type=int, help="measure on so many of them only")
    arguments = parser.parse_args()
    console = Console()
    console.print(WHAT_COMES, highlight=False, soft_wrap=True)
    started = time.monotonic()
    code = exit_code_of(lambda: run(arguments, console), console)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(f"this call: {minutes} min {seconds} s", highlight=False)
    return code


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Every stage, in order. Raises DemoError."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise DemoError(f"{', '.join(missing)}: not installed; `make demo-language` does that")
    from transformers.utils import logging

    from examples.language import report, stages
    from student_trainer.settings.config import load_config

    logging.disable_progress_bar()
    out: Path = arguments.out
    overrides = (
        f"run.out={out / 'run'}",
        f"student.model={out / 'student'}",
        f"data.train={out / 'data' / 'train.jsonl'}",
        *arguments.set,
    )
    plan = stages.Plan(
        out=out,
        config_file=TRAINER_CONFIG,
        teacher_config=TEACHER_CONFIG,
        overrides=overrides,
        config=load_config(TRAINER_CONFIG, overrides),
        part=arguments.part,
        num_prompts=arguments.prompts,
    )
    out.mkdir(parents=True, exist_ok=True)
    stages.prepared(plan, console)
    if arguments.prepare:
        return
    stages.refuse_other_run(plan)
    teacher = stages.measured(plan, console, "teacher", plan.teacher)
    before = stages.measured(plan, console, "before", plan.student)
    alike = report.with_rates_alike(teacher, before, before)
    console.print(report.table(before=alike[1], teacher=alike[0]))
    stages.train(plan, console)
    after = stages.measured(plan, console, "after", plan.trained)
    teacher, before, after = report.with_rates_alike(teacher, before, after)
    console.print(report.table(before=before, after=after, teacher=teacher))
    console.print(report.truncations(plan.config.run.out), highlight=False, soft_wrap=True)
    verdicts = report.verdicts(teacher, before, after)
    for verdict in verdicts:
        console.print(verdict.line(), highlight=False, soft_wrap=True)
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    report.draw(folder / "overlap.png", teacher, before, after)
    written = {
        "figures.md": report.markdown(teacher, before, after),
        "pairs.md": report.pairs(teacher, before, after),
        "verdicts.json": json.dumps({v.claim: v.holds for v in verdicts}, indent=1) + "\n",
    }
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    console.print(f"{folder}: overlap.png, {', '.join(written)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
