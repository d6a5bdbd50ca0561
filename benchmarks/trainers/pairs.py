"""The pairs of models, the arms, and the task that every arm of a pair is given.

What a task says is taken from our configuration of the pair by our own code: prompts in the order
of the seed, learning rates of the schedule. TRL is given the same, so that nothing of it is chosen
twice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT
from benchmarks.trainer_work import CHECKPOINTS, LANGUAGE, PLAYGROUND, Work
from benchmarks.trainers.task import Task
from student_trainer.records import Prompt
from student_trainer.settings.config import TrainerConfig, load_config

DEMO = ROOT / "runs" / "language"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(Work):
    """Two models, what they work on, and how our trainer is configured for them."""

    name: str
    teacher: Path
    student: Path
    heldout: Path
    steps: int
    """Of a run unless told."""
    rounds: int
    save_every: int
    """Steps; the last is saved too."""
    num_heldout: int
    """Prompts of the held-out measurement."""
    missing: str = ""
    """How the models are made, where they are not part of the repository."""


PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            name="playground",
            teacher=CHECKPOINTS / "teacher",
            student=CHECKPOINTS / "student",
            heldout=CHECKPOINTS / "heldout.jsonl",
            **PLAYGROUND.as_fields(),
            steps=16,
            rounds=2,
            save_every=2,
            num_heldout=128,
        ),
        Pair(
            name="smollm2",
            teacher=DEMO / "teacher",
            student=DEMO / "student",
            heldout=DEMO / "data" / "heldout.jsonl",
            **LANGUAGE.as_fields(),
            steps=4,
            rounds=2,
            save_every=4,
            num_heldout=32,
            missing="python -m examples.language --prepare",
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str
    description: str
    mode: str | None = None
    """How TRL generates; None for an arm of ours."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings of ours."""
    asked: bool = False
    """Only runs when it is named."""
    steps: int | None = None
    """Of a run at most; None where the pair says it."""


TRLS = "trl.DistillationTrainer, teacher in its process, float32, {}"
OURS = "teacher server and trainer as processes, {} sampler, {} in flight"
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "driftline": ("vLLM", {}),
    "driftline_batched": ("batched transformers", {"sampler": {"kind": "hf_batched"}}),
    "driftline_hf": ("transformers", {"sampler": {"kind": "hf"}}),
}
"""Our arms without the stop: a sampler, and the settings that say so; the first is the default."""
STOPS = {"": False, "_stop": True}
ARMS = {
    arm.name: arm
    for arm in (
        Arm(
            name="trl",
            description=TRLS.format("transformers generation"),
            mode="transformers",
        ),
        Arm(
            name="trl_static",
            description=TRLS.format('transformers generation, cache_implementation="static"'),
            mode="static",
        ),
        Arm(
            name="trl_vllm",
            description=TRLS.format("vLLM in its process"),
            mode="vllm",
        ),
        *(
            Arm(
                name=name + ending,
                description=OURS.format(words, "stop" if stops else "no stop"),
                changes={"drift.stop_in_flight": stops} | changes,
                asked=bool(changes),
            )
            for name, (words, changes) in SAMPLERS.items()
            for ending, stops in STOPS.items()
        ),
        Arm(
            name="driftline_updates",
            description=OURS.format("batched transformers", "stop")
            + "; eight updates a step, loss over the teacher's 32 and a rest",
            changes={
                "sampler": {"kind": "hf_batched"},
                "loss": {"kind": "truncated_reverse_kl", "tail": True},
                "teacher.k": 32,
                "drift.stop_in_flight": True,
                "optim.epochs": 2,
                "optim.updates_per_epoch": 4,
            },
            asked=True,
            steps=6,
        ),
    )
}


def chosen(names: Sequence[str] | None) -> list[Arm]:
    """The arms of these names, or all that run unasked."""
    if names is None:
        return [arm for arm in ARMS.values() if not arm.asked]
    return [ARMS[name] for name in names]


def overrides(pair: Pair, arm: Arm, *, seed: int, steps: int, out: Path, teacher: str) -> list[str]:
    """Of our configuration of the pair."""
    changes = {
        # A whole table comes before its settings.
        **{key: value for key, value in arm.changes.items() if "." not in key},
        **pair.step_settings(out, pair.student, teacher, steps),
        "run.seed": seed,
        "rollout.rollouts_per_prompt": 1,
        **{key: value for key, value in pair.changes.items() if not _of(key, arm.changes)},
        **{key: value for key, value in arm.changes.items() if "." in key},
    }
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _of(key: str, tables: dict[str, Any]) -> bool:
    """Whether a setting belongs to a table that is replaced as a whole."""
    return key.partition(".")[0] in tables


def task(pair: Pair, arm: Arm, *, seed: int, steps: int, out: Path, teacher: str) -> Task:
    """What an arm is to do. Raises ConfigError, DatasetError."""
    from student_trainer.data import PromptOrder

    lines = overrides(pair, arm, seed=seed, steps=steps, out=out, teacher=teacher)
    config = load_config(pair.config, lines)
    asked = _train_prompts(pair.config, pair.student, pair.max_tokens, pair.max_context)
    order = PromptOrder(asked, prompts_per_step=pair.rollouts, seed=seed)
    prompts = [order.step(step) for step in range(steps)]
    saves = [*range(pair.save_every, steps, pair.save_every), steps]
    return Task(
        pair=pair.name,
        arm=arm.name,
        seed=seed,
        student=str(pair.student),
        teacher=str(pair.teacher),
        prompts=[[prompt.text for prompt in step] for step in prompts],
        prompt_ids=[[prompt.token_ids.tolist() for prompt in step] for step in prompts],
        max_tokens=pair.max_tokens,
        max_context=pair.max_context,
        temperature=config.rollout.temperature,
        updates=config.optim.epochs * config.optim.updates_per_epoch,
        learning_rates=learning_rates(config),
        betas=config.optim.betas,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.max_grad_norm,
        save_at=saves,
        out=str(out),
        overrides=lines,
        config=str(pair.config.relative_to(ROOT)),
    )


@cache
def _train_prompts(path: Path, student: Path, max_tokens: int, max_context: int) -> list[Prompt]:
    """As our trainer reads them."""
    from student_trainer.assembly import from_settings
    from student_trainer.pretrained import load_tokenizer

    lengths = [f"rollout.max_context={max_context}", f"budget.max_tokens={max_tokens}"]
    config = load_config(path, [*lengths, "data.heldout=null"])
    return from_settings.problems(config, load_tokenizer(str(student))).train


def learning_rates(config: TrainerConfig) -> list[float]:
    """Of every update of a run, by our own optimiser."""
    import torch

    from student_trainer.assembly import from_settings

    model: Any = torch.nn.Linear(1, 1)
    optimizer, found = from_settings.optimizer(config, model), []
    for _ in range(config.run.steps * config.optim.epochs * config.optim.updates_per_epoch):
        found.append(optimizer.learning_rate)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(1.0)
    return found


def heldout_prompts(pair: Pair) -> list[Prompt]:
    """Of the held-out measurement, and of no training."""
    from student_trainer.assembly import from_settings
    from student_trainer.pretrained import load_tokenizer

    lines = [
        f"data.heldout={pair.heldout}",
        f"eval.num_prompts={pair.num_heldout}",
        f"eval.max_tokens={pair.max_tokens}",
        f"rollout.max_context={pair.max_context}",
        f"budget.max_tokens={pair.max_tokens}",
    ]
    config = load_config(pair.config, lines)
    return from_settings.heldout_problems(config, load_tokenizer(str(pair.student)))
