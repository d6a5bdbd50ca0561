"""Puts a run together from its configuration: the only place that knows every part.

Order matters: what is cheap and can refuse comes first (data, tokenizer, memory). Then the sampler,
which takes tens of seconds, is begun; while its process loads, the learner does, and the handshake
with the teacher is made. What fails of these ends the sampler too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.assembly import (
    adapting,
    checkpoints,
    evaluating,
    from_settings,
    methods,
    syncing,
    teachers,
)
from student_trainer.assembly.evaluating import Evaluator
from student_trainer.assembly.from_settings import Problems
from student_trainer.assembly.own_loss import with_declared_needs
from student_trainer.assembly.recording import recorded, warn
from student_trainer.assembly.restarting import SamplerRestart, replaceable
from student_trainer.assembly.sampling import RunningSampler, SamplerStart, begun
from student_trainer.data import PromptOrder
from student_trainer.diagnostics.step_report import EvalReport, LearnReport, SampleText
from student_trainer.errors import SamplerDiedError
from student_trainer.evaluation.evaluate import rollout_text
from student_trainer.learner.learner import Learner
from student_trainer.pretrained import load_student, load_tokenizer
from student_trainer.process.stopping import Stopped, StopRequest
from student_trainer.recording.failed_update import kept_if_not_finite
from student_trainer.recording.model_card import write_model_card
from student_trainer.recording.recorder import Recorder
from student_trainer.recording.run_folder import (
    STUDENT,
    Resume,
    RunRecord,
    checkpoint_to_resume,
)
from student_trainer.recording.summary import write_progress
from student_trainer.recording.terminal import Bars
from student_trainer.records import Prompt, Rollout
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.rollouts.stream import LoopThread, RolloutStream
from student_trainer.rollouts.weight_sync import WeightSync
from student_trainer.saved_student import check_saveable, save_or_rescue
from student_trainer.settings.config import TrainerConfig
from student_trainer.special_tokens import SpecialTokens
from student_trainer.train_state import TrainState, complete_checkpoints, step_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the loop uses: the four owners, and how they meet the sampler that is running."""

    config: TrainerConfig
    learner: Learner
    stream: RolloutStream
    recorder: Recorder
    record: RunRecord
    state: TrainState
    problems: Problems
    evaluator: Evaluator
    sync: WeightSync
    running: RunningSampler
    restart: SamplerRestart
    stop: StopRequest

    @property
    def overlap_k(self) -> int | None:
        """Entries compared by the overlap; None when no candidates are sent."""
        return self.config.drift.k if self.config.collected_topk > 0 else None

    def learn(self, rollouts: Sequence[Rollout], step: int) -> LearnReport:
        """All updates of one step; one that is not finite is kept for a person to look at.

        Raises NonFiniteLossError.
        """
        with kept_if_not_finite(
            self.config.run.out, step + 1, lambda: self.learner.update_under_way
        ):
            return self.learner.learn(rollouts, step)

    def swap_weights(self, version: int) -> float | None:
        """Moves the learner's weights into the sampler; returns the log-prob gap, in nats.

        What is under way goes on with them. None when the run was asked to stop meanwhile: then
        nobody will sample from them.
        """
        gap: float | None
        try:
            with self.stop.may_give_up():
                try:
                    gap = self.running.loop.run(self.sync.push(version))
                except SamplerDiedError as error:
                    gap = self.restart.restart(self, error, version, learnt=True)
        except Stopped:
            return None
        self.stream.use_version(version)
        return gap

    def evaluation_due(self) -> bool:
        """After every so many steps and after the last, unless it was done before a resume."""
        step, settings = self.state.step, self.config.eval
        at_an_end = step in (0, self.config.run.steps)
        due = bool(self.problems.heldout) and (step % settings.every_steps == 0 or at_an_end)
        return due and self.recorder.last_evaluation != step

    def evaluate(self) -> None:
        """What the sampler's weights make of the held-out problems; at both ends with samples."""
        with self.stop.may_give_up():
            report = self.restart.surviving(self, self._evaluation)
        self.recorder.evaluation(report)
        self.state.evaluated(report.values())

    def _evaluation(self) -> EvalReport:
        step, ends = self.state.step, (0, self.config.run.steps)
        with self.stream.idle():
            return self.evaluator.report(
                self.running.loop,
                self.running.sampler,
                step=step,
                with_samples=step in ends,
                progress=lambda done, total: self.recorder.progress("evaluation", done, total),
            )

    def texts(self, rollouts: Sequence[Rollout]) -> tuple[SampleText, ...]:
        """The first few of a step's rollouts, for a person to read."""
        return tuple(
            rollout_text(rollout, number, self.config.rollout.temperature, self.evaluator.decode)
            for number, rollout in enumerate(rollouts[: self.config.run.texts])
        )

    def checkpoint_due(self) -> bool:
        settings = self.config.checkpoint
        return self.state.is_due(settings.every_steps, settings.every_minutes)

    def finish(self) -> None:
        """Saves the trained student, in Hugging Face format, and says that the run is finished.

        Raises CheckpointError, which says where its weights are, when it cannot be saved.
        """
        folder = self.config.run.out
        with self.stop.whole():
            save_or_rescue(folder / STUDENT, self.learner.save, self.learner.save_what_can_be)
            self.state.drop_old()
            self._write_progress(finished=True)
            self.record.finish()
            write_model_card(folder)

    def give_up(self) -> None:
        """Saves what the finished steps came to, for a run that was asked to stop."""
        with self.stop.whole():
            written = complete_checkpoints(self.config.run.checkpoints)
            if self.state.step > 0 and (not written or self.state.step != step_of(written[-1])):
                self.state.save()
            self._write_progress(finished=False)
            self.stop.say_last_words()

    def _write_progress(self, *, finished: bool) -> None:
        planned = self.config.run.steps
        write_progress(self.config.run.out, finished=finished, steps_planned=planned)


@contextmanager
def assembled(
    config: TrainerConfig,
    *,
    resume: Resume = False,
    overwrite: bool = False,
    accept_changes: Collection[str] = (),
    running: RunningSampler | None = None,
    stop: StopRequest | None = None,
) -> Iterator[Run]:
    """A run ready for its first step; ends everything it started when the block is left.

    It goes on where its folder has a checkpoint and `resume` says so ("auto": if there is one),
    with the settings of then but for the harmless ones and `accept_changes`; it takes the place of
    an earlier run only to `overwrite` it. A sampler that is `running` already is given the run's
    weights and left running.
    """
    config = with_declared_needs(config)
    stop = stop or StopRequest()
    checkpoint = checkpoint_to_resume(config.run.out, resume=resume, overwrite=overwrite)
    goes_on = (
        None if checkpoint is None else checkpoints.goes_on(config, checkpoint, accept_changes)
    )
    with ExitStack() as stack:
        with stop.may_give_up():
            run = _assemble(config, stack, goes_on, overwrite or resume == "auto", running, stop)
        yield run


def _assemble(
    config: TrainerConfig,
    stack: ExitStack,
    goes_on: checkpoints.GoesOn | None,
    overwrite: bool,
    running: RunningSampler | None,
    stop: StopRequest,
) -> Run:
    bars = stack.enter_context(Bars())
    say = partial(warn, bars.console)
    problems = from_settings.problems(config, load_tokenizer(config.student.model))
    tokenizer = problems.tokenizer
    specials = from_settings.special_tokens(config, tokenizer)
    grader = evaluating.checked_grader(config, problems.heldout, stack)
    checkpoint = None if goes_on is None else goes_on.checkpoint
    start_from = adapting.model_of(config, checkpoint)
    _say_all(say, from_settings.check_student(config, start_from))
    loop = running.loop if running else stack.enter_context(closing(LoopThread()))
    begin = partial(_sampler, config, start_from, tokenizer, running, loop, bars, stack)
    shares = running is None and from_settings.shares_weights(config)
    at_once = None if shares else begin(None)
    learner = _learner(config, tokenizer, start_from, checkpoint, stop, say)
    sampler, start = at_once or begin(learner.lent_model)
    asked = stack.enter_context(
        teachers.connected(config, loop, problems.all, learner.vocab_size, tokenizer)
    )
    learner.excluded_ids = asked.excluded_ids
    evaluator = evaluating.evaluator(config, problems.heldout, grader, tokenizer, asked)
    sync = syncing.sync(config, learner, sampler, problems, say, shares_weights=shares)
    stream = _stream(config, problems.train, specials, RunningSampler(loop, sampler), asked, bars)
    state = checkpoints.train_state(config, learner, stream)
    for line in checkpoints.gone_on(state, goes_on):
        bars.console.print(line, highlight=False, markup=False)
    _say_all(say, _warnings(config, learner, start_from, tokenizer, asked))
    recorder, record = stack.enter_context(
        recorded(
            config, bars, goes_on=goes_on, overwrite=overwrite, asked=asked, decode=problems.decode
        )
    )
    write_progress(config.run.out, finished=False, steps_planned=config.run.steps)
    if start:
        start.wait()
    proof = syncing.proof(config, learner, problems, start_from, goes_on is None, running is None)
    gaps = loop.run(sync.prove(state.step, proof, progress=partial(bars.update, "probe")))
    record.keep_probe(gaps.figures())
    stack.callback(stream.close)
    return Run(
        config=config,
        learner=learner,
        stream=stream,
        recorder=recorder,
        record=record,
        state=state,
        problems=problems,
        evaluator=evaluator,
        sync=sync,
        running=RunningSampler(loop, sampler),
        restart=SamplerRestart(say),
        stop=stop,
    )


def _warnings(
    config: TrainerConfig,
    learner: Learner,
    start_from: str,
    tokenizer: PreTrainedTokenizerBase,
    asked: teachers.Teachers,
) -> Iterator[str]:
    """What to know of this run before its first step."""
    yield from checkpoints.warnings(config, learner)
    yield from syncing.warnings(config, learner)
    yield from teachers.warnings(config, start_from, tokenizer, asked)


def _say_all(say: Callable[[str], None], lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def _learner(
    config: TrainerConfig,
    tokenizer: PreTrainedTokenizerBase,
    start_from: str,
    checkpoint: Path | None,
    stop: StopRequest,
    say: Callable[[str], None],
) -> Learner:
    weights = methods.weights(config, newline_ids=from_settings.newline_ids(config, tokenizer))
    torch.manual_seed(config.run.seed)
    dtype = from_settings.dtype(config)
    model = load_student(
        start_from,
        # A base that stays as it is need not be held in more than it is computed in.
        dtype=torch.float32 if config.student.lora is None else dtype,
        device=from_settings.device(config),
        attention=config.student.attention,
        gradient_checkpointing=config.student.gradient_checkpointing,
        computes_in=dtype,
    )
    if mended := check_saveable(model, tokenizer, start_from):
        say(mended)
    adapter = adapting.adapter(config, model, checkpoint)
    return Learner(
        model,
        tokenizer,
        from_settings.optimizer(config, model),
        divergence=methods.divergence(config),
        weights=weights,
        epochs=config.optim.epochs,
        updates_per_epoch=config.optim.updates_per_epoch,
        micro_batch_tokens=config.optim.micro_batch_tokens,
        temperature=config.rollout.temperature,
        seed=config.run.seed,
        dtype=dtype,
        recomputes_behavior=config.needs_learner_behavior,
        stop_ids=from_settings.stop_ids(config, start_from, tokenizer),
        stop=stop,
        copied_to=getattr(torch, from_settings.sampler_dtype(config)),
        adapter=adapter,
        say=say,
    )


def _sampler(
    config: TrainerConfig,
    start_from: str,
    tokenizer: PreTrainedTokenizerBase,
    running: RunningSampler | None,
    loop: LoopThread,
    bars: Bars,
    stack: ExitStack,
    lent: PreTrainedModel | None,
) -> tuple[Sampler, SamplerStart | None]:
    """What generates, begun; with a model that is lent to it, where it can do without its own."""
    if running is not None:
        return running.sampler, None
    made = replaceable(config, start_from, tokenizer, lent)
    return made, stack.enter_context(begun(config, made, loop, bars))


def _stream(
    config: TrainerConfig,
    prompts: list[Prompt],
    specials: SpecialTokens,
    running: RunningSampler,
    asked: teachers.Teachers,
    bars: Bars,
) -> RolloutStream:
    return RolloutStream(
        loop=running.loop,
        sampler=running.sampler,
        open_session=teachers.sessions(config, asked),
        prompts=PromptOrder(
            prompts, prompts_per_step=config.rollout.prompts_per_step, seed=config.run.seed
        ),
        rules=teachers.rules(config, specials, asked),
        budget=methods.budget(config),
        options=lambda max_tokens: from_settings.sampling_options(
            config, max_tokens, asked.excluded_ids
        ),
        rollouts_per_prompt=config.rollout.rollouts_per_prompt,
        max_staleness=config.rollout.max_staleness,
        tokens_per_step=config.rollout.tokens_per_step,
        seed=config.run.seed,
        num_steps=config.run.steps,
        progress=lambda done, total: bars.update("rollouts", done, total),
    )
