"""THE loop. What it uses is put together in assembly/; what it says goes to recording/.

A step: take a batch of rollouts that the teacher has scored while they were generated, learn from
it, put the new weights into the sampler, write it down.
"""

from __future__ import annotations

from student_trainer.assembly.run import Run
from student_trainer.diagnostics import (
    effective_lengths,
    phase_seconds,
    rollout_metrics,
    step_profile,
    warnings_of,
)
from student_trainer.learner.batch import collate, recompute_behavior, split_micro, split_updates
from student_trainer.losses import (
    StepSums,
    merge,
    needs_normalization,
    objective,
    step_scale,
    sum_over_processes,
)
from student_trainer.recording.run_log import PhaseClock
from student_trainer.records import Rollout
from student_trainer.rollouts.stream import RolloutBatch


def train(run: Run) -> None:
    """Runs the steps that are left. Raises TeacherError and TrainerError."""
    config = run.config
    if run.first_step == 0 and run.heldout:
        run.evaluate(0)
    for step in range(run.first_step, config.run.steps):
        clock = PhaseClock()
        with clock.phase("rollout"):
            scored = next(run.source)
        if scored.rollouts:
            take_step(run, scored, clock)
        else:
            # Nothing to learn from: weights, optimizer and budget stay as they are.
            run.log.skipped(step + 1, scored.num_unscored, clock.seconds["rollout"])
            run.log.alarms(
                step + 1, warnings_of({"unscored_rollouts": scored.num_unscored}, first={})
            )
        run.bars.update("steps", step + 1, config.run.steps)

        if run.evaluation_due(step + 1):
            run.evaluate(step + 1)
        if run.checkpoint_due(step + 1):
            run.save_checkpoint(step + 1)


def take_step(run: Run, scored: RolloutBatch, clock: PhaseClock) -> None:
    """Learns from a batch, moves the weights into the sampler, writes it down."""
    step, rollouts = scored.step, scored.rollouts
    generate_s, teacher_wait_s = phase_seconds(rollouts)
    with clock.phase("learn"):
        metrics = learn(run, rollouts, step)
    with clock.phase("sync"):
        run.source.wait_until_idle()
        metrics["sync_gap_nats"] = run.push_weights(step + 1)

    metrics |= run.budget.update(effective_lengths(rollouts))
    metrics |= rollout_metrics(rollouts, overlap_k=run.overlap_k)
    metrics["unscored_rollouts"] = scored.num_unscored
    metrics["max_tokens"] = run.budget.max_tokens
    rollout_s = clock.seconds.pop("rollout")
    clock.add("generate", max(0.0, rollout_s - teacher_wait_s))
    clock.add("teacher_wait", min(rollout_s, teacher_wait_s))
    metrics["generation_span_s"] = generate_s
    run.log.step(step + 1, metrics, clock.seconds)
    profile = step_profile(rollouts, overlap_k=run.overlap_k)
    run.log.profile(step + 1, profile)
    alarms = warnings_of(
        metrics,
        first=run.log.first_step,
        mismatched=profile["mismatched_tokens"],
        decode=lambda token_ids: str(run.tokenizer.decode(token_ids)),
    )
    run.log.alarms(step + 1, alarms)


def learn(run: Run, rollouts: list[Rollout], step: int) -> dict[str, float]:
    """All optimiser updates of one batch of rollouts; returns the means to log."""
    optim = run.config.optim
    temperature = run.config.rollout.temperature
    normalize = needs_normalization(run.weights)
    if run.config.needs_learner_behavior:
        rollouts = recompute_behavior(
            run.student,
            rollouts,
            micro_batch_tokens=optim.micro_batch_tokens,
            temperature=temperature,
            device=run.device,
        )
    all_sums: list[StepSums] = []
    grad_norms: list[float] = []
    for epoch in range(optim.epochs):
        seed = (run.config.run.seed, step, epoch)
        for update in split_updates(rollouts, optim.updates_per_epoch, seed=seed):
            parts: list[StepSums] = []
            for micro in split_micro(update, optim.micro_batch_tokens):
                batch = collate(micro, run.device)
                gathered = batch.forward(run.student, temperature=temperature)
                sums = objective(
                    batch.loss_inputs(gathered), divergence=run.divergence, weights=run.weights
                )
                sums.loss_sum.backward()
                parts.append(sums.detached())
            totals = sum_over_processes(merge(parts))
            scale = step_scale(totals.weight_sum.item(), totals.num_tokens.item(), normalize)
            grad_norms.append(run.optimizer.step(scale))
            all_sums.append(totals)
    return merge(all_sums).metrics(normalize=normalize) | {
        "grad_norm": sum(grad_norms) / len(grad_norms),
        "learning_rate": run.optimizer.learning_rate,
        "updates": len(grad_norms),
    }
