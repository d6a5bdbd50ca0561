"""THE loop. What it uses is put together in assembly/; what it says goes to recording/.

A step: take the rollouts that the teacher has scored while they were generated, learn from them,
swap the weights in the sampler, write it down.
"""

from __future__ import annotations

from student_trainer.assembly.run import Run
from student_trainer.diagnostics.step import (
    lengths_in_budget,
    phase_seconds,
    rollout_report,
    step_profile,
)
from student_trainer.diagnostics.step_report import PhaseSeconds, StepReport
from student_trainer.process.stopping import Stopped
from student_trainer.recording.phase_clock import PhaseClock


def train(run: Run) -> None:
    """Runs the steps that are left. Raises TeacherError and TrainerError, and Stopped on SIGTERM.

    Whatever it raises, `run.state.step` steps are finished and learner, budget and stream are as
    they were after the last of them: a step that is given up has changed nothing.
    """
    if run.evaluation_due():
        run.evaluate()
    for step in range(run.state.step, run.config.run.steps):
        report = take_step(run, step)
        run.stream.settle()
        run.state.step = report.step
        run.recorder.step(report)
        run.recorder.progress("steps", report.step, run.config.run.steps)
        if run.evaluation_due():
            run.evaluate()
        if run.checkpoint_due():
            run.state.save()
    if run.evaluation_due():
        raise Stopped  # the last one was given up by the process that does it for all


def take_step(run: Run, step: int) -> StepReport:
    """Takes rollouts, learns from them, swaps the weights in the sampler; what came of it."""
    clock = PhaseClock()
    with clock.phase("rollout"), run.may_give_up():
        taken = run.restart.surviving(run, run.stream.take_step)
    rollouts, rollout_s = taken.rollouts, clock.seconds["rollout"]
    if not rollouts:
        # Nothing to learn from: weights, optimizer and budget stay as they are.
        seconds = PhaseSeconds(teacher_wait=rollout_s)
        return StepReport(step=step + 1, unscored_rollouts=taken.num_unscored, seconds=seconds)

    with clock.phase("learn"):
        learning = run.learn(rollouts, step)
    with clock.phase("sync"):
        sync_gap_nats = run.swap_weights(step + 1)

    generation_span_s, teacher_wait_s = phase_seconds(rollouts)
    return StepReport(
        step=step + 1,
        unscored_rollouts=taken.num_unscored,
        learning=learning,
        generation=rollout_report(rollouts, overlap_k=run.overlap_k),
        sync_gap_nats=sync_gap_nats,
        budget_hit_share=run.stream.budget.update(lengths_in_budget(rollouts)),
        max_tokens=run.stream.budget.max_tokens,
        generation_span_s=generation_span_s,
        seconds=PhaseSeconds(
            generate=max(0.0, rollout_s - teacher_wait_s),
            teacher_wait=min(rollout_s, teacher_wait_s),
            learn=clock.seconds["learn"],
            sync=clock.seconds["sync"],
        ),
        profile=step_profile(rollouts, overlap_k=run.overlap_k),
        samples=run.texts(rollouts),
    )
