"""Learners as tests need them: plain, around a model that the test keeps."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from student_trainer.learner.learner import Learner
from student_trainer.learner.optim import Optimizer
from student_trainer.losses.divergences import LocalSupportMatching
from tests.trainer.learner.tiny_student import character_tokenizer


def optimizer_of(model: PreTrainedModel) -> Optimizer:
    """AdamW at a steady rate."""
    return Optimizer(
        model,
        learning_rate=1e-3,
        final_learning_rate=1e-3,
        warmup_updates=0,
        total_updates=10,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        max_grad_norm=1.0,
    )


def learner_of(
    model: PreTrainedModel, optimizer: Optimizer | None = None, **changes: Any
) -> Learner:
    """One update a step, unless told."""
    settings: dict[str, Any] = {
        "divergence": LocalSupportMatching(),
        "weights": [],
        "epochs": 1,
        "updates_per_epoch": 1,
        "micro_batch_tokens": 1000,
        "temperature": 1.0,
        "seed": 0,
    }
    settings |= changes
    settings["mass_outside"] = settings["divergence"].needs.mass_outside
    return Learner(model, character_tokenizer(), optimizer or optimizer_of(model), **settings)
