"""The prompts: everyday instructions, which are in the repository, and tasks of reasoning-gym.

The tasks are made anew by seed, with their answers; a prompt is in one of the three parts only.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from student_trainer.train_state import replaced

INSTRUCTIONS = Path(__file__).parent / "instructions"
TASKS: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2},
    "calendar_arithmetic": {},
    "family_relationships": {},
    "leg_counting": {"min_animals": 1, "max_animals": 3, "min_instances": 1, "max_instances": 5},
    "number_filtering": {"min_numbers": 3, "max_numbers": 5},
    "time_intervals": {},
}
"""Name in reasoning-gym -> its settings: short questions with short answers."""
PARTS = {"train": 4, "tune": 1, "heldout": 2}
"""How many tasks of each kind a part has. Settings are chosen on `tune`; `heldout` is reported."""
SEED = 20261127


def write(folder: Path) -> None:
    """train.jsonl, tune.jsonl and heldout.jsonl: the instructions of each part, then its tasks."""
    tasks = _tasks()
    with replaced(folder) as partial:
        for part in PARTS:
            rows = (INSTRUCTIONS / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            rows += [json.dumps(task, ensure_ascii=False) for task in tasks[part]]
            (partial / f"{part}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def is_task(prompt_id: str) -> bool:
    """Whether a prompt is one of reasoning-gym's."""
    return prompt_id.startswith("task-")


def _tasks() -> dict[str, list[dict[str, Any]]]:
    made: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for kind, settings in TASKS.items():
        questions = _distinct(kind, settings)
        for part, number in PARTS.items():
            for place in range(number):
                question, answer = next(questions)
                made[part].append(
                    {
                        "id": f"task-{part}-{kind}-{place}",
                        "messages": [{"role": "user", "content": question}],
                        "answer": answer,
                    }
                )
    return made


def _distinct(kind: str, settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of cellpylib, when it is compiled
        import reasoning_gym

    seen = set()
    for entry in reasoning_gym.create_dataset(kind, size=1000, seed=SEED, **settings):
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield entry["question"], entry["answer"]
