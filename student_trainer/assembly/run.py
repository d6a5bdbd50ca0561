"""Puts a run together from its configuration: the only place that knows every part.

Order matters: what is cheap and can refuse comes first (data, tokenizer, memory). Then the sampler,
which takes tens of seconds, is begun; while its process loads, the learner does, and the handshake
with the teacher is made. What fails of these ends the sampler too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from student_trainer.assembly import (
    checkpoints,
    early,
    evaluating,
    from_settings,
    parts,
    syncing,
    teachers,
)
from student_trainer.assembly.evaluating import Evaluator
from student_trainer.assembly.from_settings import Problems
from student_trainer.assembly.metering import trainer_metrics
from student_trainer.assembly.own_loss import with_declared_needs
from student_trainer.assembly.parts import Start
from student_trainer.assembly.recording import recorded, warn
from student_trainer.assembly.restarting import SamplerRestart
from student_trainer.assembly.rollout_recording import rollout_files
from student_trainer.assembly.sampling import RunningSampler, loop_on
from student_trainer.assembly.spreading import refuse_spread
from student_trainer.diagnostics.step_report import EvalReport, LearnReport, SampleText
from student_trainer.errors import SamplerDiedError
from student_trainer.evaluation.evaluate import rollout_text
from student_trainer.learner.learner import Learner
from student_trainer.learner.token_weights import TokenWeights
from student_trainer.pretrained import load_tokenizer, load_vocab_size
from student_trainer.process.ranks import ALONE, Ranks
from student_trainer.process.stopping import Stopped, StopRequest
from student_trainer.recording.failed_update import kept_if_not_finite
from student_trainer.recording.model_card import write_model_card
from student_trainer.recording.recorder import Recorder
from student_trainer.recording.rollout_files import RolloutFiles
from student_trainer.recording.run_folder import STUDENT, Resume, RunRecord, checkpoint_to_resume
from student_trainer.recording.summary import write_progress
from student_trainer.recording.terminal import Bars
from student_trainer.recording.unrecorded import Unrecorded
from student_trainer.records import Rollout
from student_trainer.rollouts.stream import RolloutStream
from student_trainer.rollouts.weight_sync import WeightSync
from student_trainer.saved_student import save_or_rescue
from student_trainer.settings.changes import written
from student_trainer.settings.config import TrainerConfig
from student_trainer.settings.sampler import VllmSamplerSettings
from student_trainer.train_state import TrainState, complete_checkpoints, step_of
from teacher_wire.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the loop uses: the four owners, and how they meet the sampler that is running."""

    config: TrainerConfig
    learner: Learner
    stream: RolloutStream
    recorder: Recorder | Unrecorded
    record: RunRecord | Unrecorded
    state: TrainState
    problems: Problems
    evaluator: Evaluator
    sync: WeightSync
    running: RunningSampler
    restart: SamplerRestart
    stop: StopRequest
    rollout_files: RolloutFiles
    ranks: Ranks = ALONE

    def may_give_up(self) -> AbstractContextManager[None]:
        """Within, the request to stop ends what is done, unless other processes wait for it."""
        return self.stop.may_give_up() if self.ranks.world == 1 else nullcontext()

    @property
    def overlap_k(self) -> int | None:
        """Entries compared by the overlap; None when no candidates are sent."""
        return self.config.overlap_k

    def learn(self, rollouts: Sequence[Rollout], step: int) -> LearnReport:
        """All updates of one step, and its rollouts on their way to the disk; an update that is
        not finite is kept for a person to look at.

        Raises NonFiniteLossError.
        """
        self._give_the_gpu_to_the_learner()
        recorded = self.rollout_files.chosen(rollouts)
        noted = TokenWeights(recorded) if recorded else None
        with kept_if_not_finite(
            self.config.run.out, step + 1, lambda: self.learner.update_under_way
        ):
            report = self.learner.learn(rollouts, step, noted)
        if noted is not None:
            self.rollout_files.write(step + 1, recorded, noted.by_number())
        return report

    def _give_the_gpu_to_the_learner(self) -> None:
        """Where the settings say so; the sampler has its share again with the next weights."""
        settings = self.config.sampler
        if isinstance(settings, VllmSamplerSettings) and settings.sleep_level:
            # One that has died is replaced where it is to have weights.
            with suppress(SamplerDiedError):
                self.running.loop.run(self.running.sampler.sleep())

    def swap_weights(self, version: int) -> float | None:
        """Moves the learner's weights into the sampler; returns the log-prob gap, in nats.

        What is under way goes on with them. None when the run was asked to stop meanwhile, or one
        of several processes was: then nobody will sample from them.
        """
        if self.ranks.any(self.stop.requested):
            self.stop.requested = True
            return None
        gap: float | None
        try:
            with self.may_give_up():
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
        return due and self.ranks.agreed(lambda: self.recorder.last_evaluation != step)

    def evaluate(self) -> None:
        """What the sampler's weights make of the held-out problems; at both ends with samples. Of
        several processes the first asks its own sampler, and the others wait."""
        if not self.ranks.is_first:
            return
        try:
            with self.stop.may_give_up():
                report = self.restart.surviving(self, self._evaluation)
        except Stopped:
            if self.ranks.world == 1:
                raise
            return  # where the others wait for rollouts, all stop
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
        every = self.config.checkpoint
        return self.ranks.agreed(lambda: self.state.is_due(every.every_steps, every.every_minutes))

    def finish(self) -> None:
        """Saves the trained student, in Hugging Face format, and says that the run is finished.

        Raises CheckpointError, which says where its weights are, when it cannot be saved.
        """
        folder = self.config.run.out
        with self.stop.whole():
            if not self.ranks.is_first:
                self.learner.save(None)
                return
            save_or_rescue(folder / STUDENT, self.learner.save, self.learner.save_what_can_be)
            self.state.drop_old()
            self._write_progress(finished=True)
            self.record.finish()
            write_model_card(folder)

    def give_up(self) -> None:
        """Saves what the finished steps came to, for a run that was asked to stop."""
        with self.stop.whole():
            if self.ranks.agreed(self._is_unsaved):
                self.state.save()
            if self.ranks.is_first:
                self._write_progress(finished=False)
            self.stop.say_last_words(aloud=self.ranks.is_first)
            # Whoever started them may end them all as soon as the first of them has ended.
            self.ranks.gathered(None)

    def _is_unsaved(self) -> bool:
        """Whether steps are finished since the last checkpoint."""
        written = complete_checkpoints(self.config.run.checkpoints)
        return self.state.step > 0 and (not written or self.state.step != step_of(written[-1]))

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
    ranks: Ranks = ALONE,
) -> Iterator[Run]:
    """A run ready for its first step; ends everything it started when the block is left.

    It goes on where its folder has a checkpoint and `resume` says so ("auto": if there is one),
    with the settings of then but for the harmless ones and `accept_changes`; it takes the place of
    an earlier run only to `overwrite` it. A sampler that is `running` already is given the run's
    weights and left running. Of several processes (`ranks`) each calls this, with the same.
    """
    config = with_declared_needs(config)
    early.check_folder(config)
    early.check_sampler(config)
    early.check_student_files(config)
    refuse_spread(config, ranks)
    ranks.check_same(written(config))
    stop = stop or StopRequest()
    checkpoint = ranks.agreed(
        lambda: checkpoint_to_resume(config.run.out, resume=resume, overwrite=overwrite)
    )
    goes_on = (
        None if checkpoint is None else checkpoints.goes_on(config, checkpoint, accept_changes)
    )
    with ExitStack() as stack:
        metrics = stack.enter_context(trainer_metrics(config, ranks))
        with stop.may_give_up():
            begins = Start(
                config=config,
                goes_on=goes_on,
                replaces=overwrite or resume == "auto",
                running=running,
                stop=stop,
                ranks=ranks,
                metrics=metrics,
            )
            run = _assemble(begins, stack)
        yield run


def _assemble(begins: Start, stack: ExitStack) -> Run:
    config, ranks = begins.config, begins.ranks
    bars = stack.enter_context(Bars(None if ranks.is_first else Console(quiet=True)))
    say = partial(warn, bars.console)
    bars.note(f"reading the data, then loading {begins.model}")
    problems = from_settings.problems(config, load_tokenizer(config.student.model))
    tokenizer = problems.tokenizer
    answers = early.refuse_early(config, {prompt.teacher for prompt in problems.all})
    specials = from_settings.special_tokens(config, tokenizer)
    grader = evaluating.checked_grader(config, problems.heldout, stack)
    _say_all(say, from_settings.check_student(config, begins.model))
    made = begins.running.loop if begins.running else None
    loop = made or stack.enter_context(closing(loop_on(from_settings.device(config))))
    own, width = Vocabulary.of(tokenizer), load_vocab_size(begins.model)
    early.refuse_strangers(config, loop, answers, own, width)
    begin = partial(parts.sampler, begins, tokenizer, loop, bars, stack)
    shares = begins.shares_weights
    at_once = None if shares else begin(None)
    learner = parts.learner(begins, tokenizer, say)
    sampler, start = at_once or begin(learner.lent_model)
    bars.note(f"connecting to {', '.join(config.teacher.endpoints)}")
    asked = stack.enter_context(
        teachers.connected(config, loop, problems.all, learner.vocab_size, tokenizer)
    )
    learner.excluded_ids = asked.excluded_ids
    sync = syncing.sync(config, learner, sampler, problems, say, shares_weights=shares)
    running = RunningSampler(loop, sampler)
    stream = parts.stream(begins, problems.train, specials, running, asked, bars)
    state = checkpoints.train_state(config, learner, stream, ranks)
    for line in checkpoints.gone_on(state, begins.goes_on):
        bars.console.print(line, highlight=False, markup=False)
    _say_all(say, parts.warnings(begins, learner, tokenizer, asked))
    recorder, record = stack.enter_context(recorded(begins, bars, asked, problems.decode))
    if start:
        start.wait()
    proof = syncing.proof(
        config, learner, problems, begins.model, begins.goes_on is None, begins.running is None
    )
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
        evaluator=evaluating.evaluator(config, problems.heldout, grader, tokenizer, asked),
        sync=sync,
        running=running,
        restart=SamplerRestart(say),
        stop=begins.stop,
        rollout_files=stack.enter_context(
            closing(rollout_files(begins, tokenizer, asked, grader, say))
        ),
        ranks=ranks,
    )


def _say_all(say: Callable[[str], None], lines: Iterable[str]) -> None:
    for line in lines:
        say(line)
