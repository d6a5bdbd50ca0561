"""The stages of `make demo-language`; each leaves its result in a folder and is not done again.

A result is used again when it was made of the same things; one that was made of others is refused
or, where it costs a minute, made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from examples.demo import BIN, DemoError, address_once_ready, starting_teacher, trained_beside
from examples.demo_trainer import waiting
from examples.language import measuring, pruning, source, tasks
from student_trainer.data import load_prompts
from student_trainer.pretrained import load_tokenizer
from student_trainer.process.writing import write_whole
from student_trainer.records import Prompt
from student_trainer.settings.config import TrainerConfig

NUM_KEPT = 24
"""Of the teacher's 30 layers: the student writes broken sentences, and no layer more is needed."""
CALIBRATION = {"every": 3, "max_tokens": 48, "seed": 0}
"""What of the training prompts the teacher answers to choose the layers."""
MEASURING_SEED = 1
SAMPLES = 1
"""Answers to each held-out prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where things are, and what is run: the trainer's configuration with its overrides."""

    out: Path
    config_file: Path
    teacher_config: Path
    overrides: tuple[str, ...]
    config: TrainerConfig
    part: str
    """Whose prompts are measured: `heldout`, or `tune` to choose settings."""
    num_prompts: int | None
    """Of these at most so many, spread over all; None: every one."""

    @property
    def teacher(self) -> Path:
        return self.out / "teacher"

    @property
    def student(self) -> Path:
        return self.out / "student"

    @property
    def trained(self) -> Path:
        return self.config.run.out / "student"


def prepared(plan: Plan, console: Console) -> None:
    """Teacher, prompts and untrained student, each made unless it is there."""
    with waiting(console, "SmolLM2-135M-Instruct: fetching 93 MB, checking its digest"):
        gguf = source.fetch(plan.out / "source")
    if not plan.teacher.is_dir():
        with waiting(console, "teacher: Q4_1 to float32, tensor by tensor"):
            source.convert(gguf, plan.teacher)
    if not (plan.out / "data").is_dir():
        with waiting(console, "prompts: instructions and tasks of reasoning-gym"):
            tasks.write(plan.out / "data")
    made_of = {"kept": NUM_KEPT, **CALIBRATION}
    path = plan.out / "pruning.json"
    if not plan.student.is_dir() or _made(path, made_of) is None:
        with waiting(
            console, f"student: {NUM_KEPT} of its layers, chosen on the teacher's answers"
        ):
            _write(path, made_of, _prune(plan))
    written = json.loads(path.read_text())
    left_out, changes = ", ".join(map(str, written["left_out"])), written["changes_left_out"]
    console.print(
        f"student: {written['parameters'] / 1e6:.1f} M parameters, without layers {left_out} "
        f"(change of the residual stream {changes[0]:.3f} to {changes[-1]:.3f}; of those kept "
        f"{written['least_kept']:.3f} or more)",
        highlight=False,
        soft_wrap=True,
    )


def _prune(plan: Plan) -> dict[str, Any]:
    tokenizer = load_tokenizer(str(plan.teacher))
    teacher = loaded(plan.teacher)
    prompts = _prompts(plan, "train", tokenizer)[:: CALIBRATION["every"]]
    answers = measuring.sampled(
        teacher,
        tokenizer,
        prompts,
        num_samples=1,
        max_tokens=CALIBRATION["max_tokens"],
        temperature=plan.config.rollout.temperature,
        seed=CALIBRATION["seed"],
    )
    changes = pruning.residual_changes(
        teacher,
        [torch.tensor(answer.prompt_ids + answer.response_ids) for answer in answers],
        skip=[len(answer.prompt_ids) for answer in answers],
    )
    kept = pruning.kept_layers(changes, NUM_KEPT)
    student = pruning.pruned(teacher, kept)
    pruning.save(student, tokenizer, plan.student)
    left_out = [layer for layer in range(len(changes)) if layer not in kept]
    inner = [changes[layer] for layer in kept if layer not in (0, 1, len(changes) - 1)]
    return {
        "changes": changes,
        "left_out": left_out,
        "changes_left_out": sorted(changes[layer] for layer in left_out),
        "least_kept": min(inner),
        "parameters": student.num_parameters(),
    }


def loaded(folder: Path) -> PreTrainedModel:
    """A model that only answers."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def measured(plan: Plan, console: Console, name: str, folder: Path) -> dict[str, Any]:
    """What a model in a folder makes of the prompts, beside the teacher: figures and texts.

    In `measured/`, and taken from there when model, prompts and settings are the same.
    """
    tokenizer = load_tokenizer(str(plan.teacher))
    prompts = _chosen(_prompts(plan, plan.part, tokenizer), plan.num_prompts)
    settings = {
        "num_samples": SAMPLES,
        "max_tokens": plan.config.longest_response,
        "temperature": plan.config.rollout.temperature,
        "seed": MEASURING_SEED,
    }
    made_of = {
        **settings,
        "prompts": sha256("\n".join(prompt.text for prompt in prompts).encode()).hexdigest(),
        "weights": source.sha256_of(folder / "model.safetensors"),
    }
    path = plan.out / "measured" / f"{name}-{plan.part}.json"
    found = _made(path, made_of)
    if found is None:
        title = f"{name}: answers to {len(prompts)} held-out prompts, read by both models"
        with waiting(console, title):
            found = _write(path, made_of, _measure(plan, folder, tokenizer, prompts, settings))
    return found


def _measure(
    plan: Plan,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
) -> dict[str, Any]:
    teacher = loaded(plan.teacher)
    student = teacher if folder == plan.teacher else loaded(folder)
    answers = measuring.sampled(student, tokenizer, prompts, **settings)
    compared = [
        measuring.positions(student, teacher, answer, temperature=settings["temperature"])
        for answer in answers
    ]
    groups: dict[str, Callable[[str], bool]] = {
        "all": lambda prompt_id: True,
        "instructions": lambda prompt_id: not tasks.is_task(prompt_id),
        "tasks": tasks.is_task,
    }
    figures = {}
    for group, member in groups.items():
        chosen = [place for place, answer in enumerate(answers) if member(answer.prompt_id)]
        if chosen:
            found = measuring.figures([answers[i] for i in chosen], [compared[i] for i in chosen])
            figures[group] = asdict(found)
    asked = {prompt.prompt_id: prompt.text for prompt in prompts}
    texts = [
        {
            "prompt_id": answer.prompt_id,
            "prompt": asked[answer.prompt_id],
            "response": tokenizer.decode(answer.response_ids, skip_special_tokens=True),
            "ended": answer.ended,
            "tokens": len(answer.response_ids),
        }
        for answer in answers
    ]
    return {"figures": figures, "texts": texts}


def refuse_other_run(plan: Plan) -> None:
    """Raises DemoError for a run that is there and that this one would not go on with."""
    run = plan.config.run.out
    if run.is_dir() and _made(plan.out / "run.json", _made_of_a_run(plan)) is None:
        raise DemoError(f"{run} is of other settings: remove it, or choose another --out")


def train(plan: Plan, console: Console) -> None:
    """The two commands, each in a process; goes on where an earlier try was cut off."""
    run = plan.config.run.out
    _write(plan.out / "run.json", _made_of_a_run(plan), {})
    if plan.trained.is_dir():
        console.print(f"trained already: {plan.trained}", highlight=False, soft_wrap=True)
        return
    run.mkdir(parents=True, exist_ok=True)
    flags = ["--model", str(plan.teacher)]
    with starting_teacher(plan.out, flags, config=plan.teacher_config) as teacher:
        command = trainer_command(plan, address_once_ready(teacher, console))
        trained_beside(teacher, command, plan.out / "trainer.log")
        console.print("ending the teacher server", highlight=False)
    # A gigabyte that nobody goes on from.
    shutil.rmtree(plan.config.run.checkpoints, ignore_errors=True)


def trainer_command(plan: Plan, address: str) -> list[str]:
    """Goes on from the last checkpoint; begins where an earlier try had not come to one."""
    overrides = [*plan.overrides, f'teacher.endpoints=["{address}"]']
    command = [str(BIN / "student-trainer"), "train", "--config", str(plan.config_file)]
    command += [part for override in overrides for part in ("--set", override)]
    return [*command, "--resume", "auto"]


def _made_of_a_run(plan: Plan) -> dict[str, Any]:
    """Settings and contents, wherever the folder lies."""
    paths: Any = {"run": {"out"}, "student": {"model"}, "data": True, "teacher": {"endpoints"}}
    return {
        "settings": plan.config.model_dump(mode="json", exclude=paths),
        "student": source.sha256_of(plan.student / "model.safetensors"),
        "data": source.sha256_of(plan.config.data.train),
    }


def _prompts(plan: Plan, part: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    room = plan.config.rollout.max_context - plan.config.longest_response
    return load_prompts(plan.out / "data" / f"{part}.jsonl", tokenizer, max_prompt_tokens=room)


def _chosen(prompts: list[Prompt], number: int | None) -> list[Prompt]:
    if number is None or number >= len(prompts):
        return prompts
    return [prompts[place * len(prompts) // number] for place in range(number)]


def _made(path: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """A result that was made of these things; None when there is none."""
    if not path.is_file():
        return None
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return written if written.get("made_of") == made_of else None


def _write(path: Path, made_of: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    whole = {"made_of": made_of, **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    return whole
