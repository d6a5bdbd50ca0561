"""A sampler whose engine dies in the middle of a run: once another one takes its place.

Nothing that lasts is in an engine: weights are the learner's, seeds those of step and place. So the
new one is given the weights, they are proven, and what was being generated is generated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.assembly import adapting, from_settings, syncing
from student_trainer.errors import SamplerDiedError, SamplerError, one_line
from student_trainer.rollouts.samplers.replaceable import ReplaceableSampler
from student_trainer.settings.config import TrainerConfig
from student_trainer.train_state import complete_checkpoints

if TYPE_CHECKING:
    from student_trainer.assembly.run import Run

T = TypeVar("T")


def replaceable(
    config: TrainerConfig,
    start_from: str,
    tokenizer: PreTrainedTokenizerBase,
    lent: PreTrainedModel | None,
) -> ReplaceableSampler:
    """The sampler of a run, and how another one is made."""
    return ReplaceableSampler(
        from_settings.sampler(config, start_from, tokenizer, lent),
        lambda: from_settings.sampler(config, present_model(config), tokenizer, lent),
    )


def present_model(config: TrainerConfig) -> str:
    """What a sampler can load now: the checkpoint that a run went on from may be gone by then."""
    written = complete_checkpoints(config.run.checkpoints)
    return adapting.model_of(config, written[-1] if written else None)


class SamplerRestart:
    """The one restart that a run has."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """A person is told of it."""
        self._say = say
        self._died_before = ""
        """When; empty if it has not."""

    def surviving(self, run: Run, work: Callable[[], T]) -> T:
        """What `work` comes to, which generates; done again where the engine dies in it.

        Raises SamplerError when it dies a second time, or no other one starts.
        """
        while True:
            try:
                return work()
            except SamplerDiedError as error:
                self.restart(run, error, run.stream.policy_version, learnt=False)

    def restart(
        self, run: Run, error: SamplerDiedError, version: int, *, learnt: bool
    ) -> float | None:
        """Another engine, with the learner's weights of this version; their log-prob gap, in nats.

        What was taken since the last finished step is generated again unless it was `learnt` from.
        Raises SamplerError the second time.
        """
        loop, sampler = run.running.loop, run.running.sampler
        alone = run.ranks.world == 1 and isinstance(sampler, ReplaceableSampler)
        if run.stop.requested or not alone:
            # Ended with the whole group of processes; or other runs, or processes, use it too.
            raise error
        assert isinstance(sampler, ReplaceableSampler)
        if self._died_before:
            raise SamplerError(
                f"{one_line(error)}; one had died {self._died_before} already, and a run starts "
                "another one once: look at what it said last, and for memory that is short; "
                "`train --resume` goes on from the last checkpoint"
            ) from error
        self._died_before = f"after step {run.state.step}"
        self._say(
            f"{one_line(error)}. Another one is started, once in a run, and what was being "
            "generated is generated again from the same seeds"
        )
        run.stream.close()
        loop.run(sampler.close())
        model = present_model(run.config)
        sampler.renew()
        loop.run(sampler.start())
        proof = syncing.proof(run.config, run.learner, run.problems, model, False, False)
        gaps = loop.run(run.sync.prove(version, proof))
        run.stream.begin_again(version, learnt=learnt)
        return gaps.pushed
