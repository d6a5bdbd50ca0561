"""Combinations that run, but not as somebody who writes them down may expect."""

from __future__ import annotations

from collections.abc import Iterator

from student_trainer.settings.best_metric import is_of_samples
from student_trainer.settings.config import TrainerConfig, table_of

MIN_K_OF_RANK_NOISE = 8
"""With so many entries the last ranks change places with the arithmetic alone."""


def warnings(config: TrainerConfig) -> list[str]:
    """One sentence each, naming the settings; said once when a run starts."""
    return [
        *_about_drift(config),
        *_about_reuse(config),
        *_about_weights(config),
        *_about_rounded_tails(config),
        *_about_nothing_to_do(config),
        *_about_best(config),
    ]


def _about_drift(config: TrainerConfig) -> Iterator[str]:
    """A rule that the same model, in another arithmetic, does not keep."""
    drift = config.drift
    if (
        drift.metric == "overlap_ratio"
        and drift.k >= MIN_K_OF_RANK_NOISE
        and drift.threshold > 1 - 1 / drift.k
    ):
        yield (
            f"drift.threshold {drift.threshold} with drift.k {drift.k}: one differing entry of "
            f"{drift.k} is a bad event. A model against itself in bfloat16 has an overlap of 0.985 "
            "at 16, and at a threshold of 0.99 24 % bad events: at most "
            f"{1 - 1 / drift.k:.3g} says something about the student"
        )


def _about_rounded_tails(config: TrainerConfig) -> Iterator[str]:
    """A reverse KL divides by the teacher's mass outside its list: what 16 bits leave of it."""
    loss = config.loss
    reverse = ("truncated_reverse_kl", "local_support_matching", "entropy_aware_kl")
    if loss.needs.mass_outside is None or loss.kind not in reverse:
        return
    if loss.kind == "entropy_aware_kl" and loss.has_a_ratio:
        return
    for tag, teacher in config.teachers_by_tag.items():
        if teacher.logprob_dtype == "f16":
            yield (
                f"{table_of(tag)}.logprob_dtype is f16 and loss {loss.kind} has a tail: the "
                "teacher's mass outside its top-k is right to 2e-4 only, and a token on which it "
                'keeps less may cost up to 1 nat too much or too little; "f32" has no such error'
            )


def _about_nothing_to_do(config: TrainerConfig) -> Iterator[str]:
    """Settings that are given, and that nothing in this run reads: harmless, so not refused."""
    if config.data.heldout is None:
        given = [f"eval.{name}" for name in sorted(config.eval.model_fields_set)]
        of_heldout = ("answer_field", "heldout_split")
        given += [f"data.{name}" for name in of_heldout if name in config.data.model_fields_set]
        if given:
            yield f"{', '.join(given)}: without data.heldout nothing is evaluated"
    elif not config.eval.pass_k and "temperature" in config.eval.model_fields_set:
        yield "eval.temperature: it is that of pass@k, and eval.pass_k is 0"
    if not config.special_tokens.tokens and config.special_tokens.model_fields_set:
        yield "special_tokens: without special_tokens.tokens nothing is masked"
    every, steps = config.checkpoint.every_steps, config.run.steps
    of_checkpoint = config.checkpoint.model_fields_set
    if every is None and config.checkpoint.every_minutes is None and "keep" in of_checkpoint:
        yield (
            "checkpoint.keep: without checkpoint.every_steps and checkpoint.every_minutes none is "
            "written as the run goes"
        )
    if every is not None and "every_minutes" in of_checkpoint:
        yield f"checkpoint.every_minutes: checkpoint.every_steps is {every}, and it alone counts"
    rollout = config.rollout
    if rollout.top_p < 1.0 and "student_topk" in rollout.model_fields_set and rollout.student_topk:
        yield (
            f"rollout.student_topk is {rollout.student_topk}: with rollout.top_p "
            f"{rollout.top_p} the student's candidates outside its nucleus are arbitrary, "
            "and none are collected"
        )
    if every is not None and every > steps:
        yield f"checkpoint.every_steps is {every} and run.steps {steps}: none is due"
    if config.optim.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps is {config.optim.warmup_steps} and run.steps {steps}: the "
            "learning rate only rises, and optim.final_learning_rate is never reached"
        )


def _about_best(config: TrainerConfig) -> Iterator[str]:
    """Checkpoints that are never rated, because nothing is evaluated at their step."""
    settings, evaluated = config.checkpoint, config.eval.every_steps
    if settings.keep_best == 0:
        if "best_metric" in settings.model_fields_set:
            yield "checkpoint.best_metric: without checkpoint.keep_best no checkpoint is kept by it"
    elif is_of_samples(settings.best_metric):
        yield (
            f"checkpoint.best_metric {settings.best_metric}: it is in the first and the last "
            "evaluation alone, and no other checkpoint is ever the best"
        )
    elif settings.every_steps is None or settings.every_steps % evaluated:
        come = f"every {settings.every_steps} steps" if settings.every_steps else "by the clock"
        yield (
            f"checkpoint.keep_best is {settings.keep_best}: checkpoints come {come} and "
            f"evaluations every {evaluated} steps (eval.every_steps), and one without the other "
            "is never the best: make checkpoint.every_steps a multiple"
        )


def _about_reuse(config: TrainerConfig) -> Iterator[str]:
    """Weights of the student's drift where the student cannot have drifted."""
    optim = config.optim
    single = optim.epochs * optim.updates_per_epoch == 1
    fresh = config.rollout.max_staleness == 0
    for name, weight in config.weights:
        if weight is None or name not in ("block_gate", "importance_ratio"):
            continue
        if fresh and single:
            yield (
                f"weights.{name}: one update a batch (optim.epochs, optim.updates_per_epoch) of "
                "rollouts that are never older than it (rollout.max_staleness = 0): the student is "
                "still the behavior policy, and the weight is 1 but for what sampler and learner "
                "differ"
            )
        if not fresh and config.needs_learner_behavior:
            so = "so with one update a batch it is 1" if single else "not the rollouts' age"
            yield (
                f"weights.{name}: with loss {config.loss.kind} at rollout.top_p "
                f"{config.rollout.top_p} the learner recomputes the behavior log-probs when it "
                f"takes up a batch, so the weight sees the updates within the batch only: {so}"
            )


def _about_weights(config: TrainerConfig) -> Iterator[str]:
    """Weights that say the same thing twice, or cancel what was paid for."""
    weights = config.weights
    if weights.prune is not None and weights.prefix_importance is not None:
        yield (
            "weights.prune and weights.prefix_importance are redundant: both fall as teacher and "
            "student drift apart, and their product falls faster than either paper's"
        )
    if weights.prune is not None and weights.prune.w_base == 0 and not config.drift.stop_in_flight:
        yield (
            "weights.prune.w_base is 0 and drift.stop_in_flight is off: tokens past a reliability "
            "of 0 are generated and scored, and count nothing"
        )
