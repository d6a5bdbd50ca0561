"""Puts the learner's weights into the sampler, and proves that they arrived.

The learner gives its weights one after another, in the sampler's own arithmetic; how they come to
the sampler's process is the sampler's. Knows no model: the learner says what its log-probs are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from student_trainer.errors import WeightSyncError, some
from student_trainer.records import AS_LEARNT, Announced, SamplingOptions, WeightFormat
from student_trainer.rollouts.probe import (
    PROBE_TOKENS,
    SYNC_TOKENS,
    Proof,
    StartGaps,
    cause_after_push,
    cause_as_loaded,
    cause_of_plain,
    gap_of,
    sync_prompts,
)
from student_trainer.rollouts.samplers.base import Sampler, Weights
from teacher_wire.id_ranges import IdRanges

LEARNER, PLAIN = "the learner's log-probs", "plain model(ids).logits"
Logprobs = Callable[[NDArray[np.int32], NDArray[np.int32]], NDArray[np.float32]]
Progress = Callable[[int, int, str], None]


class WeightOwner(Protocol):
    """Whose weights travel."""

    @property
    def name_prefix(self) -> str:
        """Of the base model: checkpoints have their names with or without it."""

    def weights(self, written: WeightFormat) -> Weights:
        """Names and tensors, each once."""

    def tied_names(self, written: WeightFormat) -> Mapping[str, str]:
        """Names that are not among them, and of which each is another one's (a tied head)."""

    def export_bytes(self, written: WeightFormat) -> int:
        """How many bytes of tensors that will be."""

    def logprobs(
        self, prompt_ids: NDArray[np.int32], token_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """[T] of a prompt's continuation at temperature 1."""

    def logprobs_of(
        self, prompts: Sequence[NDArray[np.int32]], continuations: Sequence[NDArray[np.int32]]
    ) -> Sequence[NDArray[np.float32]]:
        """The same of several, in one pass."""

    def plain_logprobs(
        self, prompt_ids: NDArray[np.int32], token_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """The same by the model's own code and nothing of the learner's."""

    def about(self) -> str:
        """Family and arithmetic, for a person."""

    def changed(self) -> AbstractContextManager[None]:
        """Within it every weight is a little different, behind it as before."""


@dataclass(frozen=True, slots=True)
class _Continued:
    """Prompts, the tokens that the sampler added to each, and its log-probs of them."""

    prompts: Sequence[NDArray[np.int32]]
    sampled: Sequence[tuple[NDArray[np.int32], NDArray[np.float32]]]

    @property
    def logprobs(self) -> list[NDArray[np.float32]]:
        return [logprobs for _, logprobs in self.sampled]

    def judged_by(self, logprobs: Logprobs) -> list[NDArray[np.float32]]:
        """The log-probs of another of the same tokens."""
        pairs = zip(self.prompts, self.sampled, strict=True)
        return [logprobs(prompt, tokens) for prompt, (tokens, _) in pairs]


class WeightSync:
    """Moves one learner's weights into one sampler, step after step."""

    def __init__(
        self,
        learner: WeightOwner,
        sampler: Sampler,
        *,
        probe_prompts: Sequence[NDArray[np.int32]],
        max_logprob_gap: float,
        written: WeightFormat | None = AS_LEARNT,
        say: Callable[[str], None] = print,
        excluded_ids: IdRanges = (),
    ) -> None:
        """The gap is in nats; it is measured on a few tokens sampled after each probe prompt.

        `excluded_ids` take no part in the learner's distributions. `written` is None where the
        sampler has the learner's own weights: nothing is sent, and all else is proven. Raises
        ConfigError when the weights have no room on their way.
        """
        self._learner = learner
        self._sampler = sampler
        self._probe_prompts = probe_prompts
        self._max_logprob_gap = max_logprob_gap
        self._written = written
        self._excluded_ids = excluded_ids
        self._say = say
        if written is not None:
            sampler.make_room(learner.export_bytes(written), say)

    async def prove(
        self,
        version: int,
        proof: Proof,
        *,
        progress: Progress = lambda done, total, note: None,
    ) -> StartGaps:
        """Holds learner and sampler against each other before the first rollout.

        As the sampler loaded the checkpoint (not for one that has run before), and then with
        changed weights: unchanged ones would not show what the sampler passes over. In the end it
        has the learner's own. Raises WeightSyncError naming gap, limit and likely cause.
        """
        dtype = None if self._written is None else self._written.dtype
        about = self._learner.about()
        # Long prompts once: they tell how the sampler computes, any prompt which weights it has.
        short = self._probe_prompts if proof.is_as_loaded else proof.prompts
        plain = loaded = None
        if proof.is_as_loaded:
            progress(0, 3, "as loaded")
            said = await self._continued("probe-loaded", proof.prompts)
            own = said.judged_by(self._learner.logprobs)
            if proof.is_fresh:
                plain = gap_of(own, said.judged_by(self._learner.plain_logprobs))
                self._check(plain, "the learner", cause_of_plain(about), PLAIN)
            loaded = gap_of(own, said.logprobs)
            cause = cause_as_loaded(about, dtype, plain)
            self._check(loaded, "the sampler as it loaded the checkpoint", cause)
        cause = cause_after_push(about, dtype, was_equal=proof.is_as_loaded)
        progress(1, 3, "with changed weights")
        with self._learner.changed():
            sent = await self._load()
            said = await self._continued("probe-changed", short)
            own = said.judged_by(self._learner.logprobs)
        changed = gap_of(own, said.logprobs)
        self._check_names(sent, proof.checkpoint_names)
        self._check(changed, "the sampler, sent changed weights,", cause)
        self._check_arrived(changed, gap_of(own, said.judged_by(self._learner.logprobs)), cause)
        progress(2, 3, "with its own weights")
        await self._load()
        pushed = self._gap(await self._continued(f"probe-start-{version}", short))
        self._check(pushed, "the sampler, sent the weights,", cause)
        progress(3, 3, "learner and sampler are equal")
        return StartGaps(plain=plain, loaded=loaded, changed=changed, pushed=pushed)

    async def push(self, version: int) -> float:
        """Loads the learner's weights into the sampler and returns the largest log-prob gap.

        Raises WeightSyncError when it passes `max_logprob_gap`.
        """
        await self._load()
        said = await self._continued_at_once(f"probe-{version}", sync_prompts(self._probe_prompts))
        tokens = [ids for ids, _ in said.sampled]
        gap = gap_of(self._learner.logprobs_of(said.prompts, tokens), said.logprobs)
        self._check(gap, f"after the sync of step {version} the sampler")
        return gap

    async def _load(self) -> Mapping[str, str | None]:
        """Returns the names that were sent, and those of what was not sent again."""
        if (written := self._written) is None:
            return {}
        sent: dict[str, str | None] = {}

        weights = self._learner.weights(written)

        def noted() -> Weights:
            for name, tensor in weights:
                sent[name] = None
                yield name, tensor

        known = weights.tensors if isinstance(weights, Announced) else None
        await self._sampler.load_weights(noted() if known is None else Announced(noted(), known))
        return sent | dict(self._learner.tied_names(written))

    def _check(self, gap: float, who: str, cause: str = "", whom: str = LEARNER) -> None:
        if not gap <= self._max_logprob_gap:
            raise WeightSyncError(
                f"{who} differs from {whom} by {gap:.3g} nats, more than "
                f"{self._max_logprob_gap:.3g} (optim.max_sync_gap_nats)"
                f"{': ' if cause else ''}{cause}"
            )

    def _check_arrived(self, gap: float, change: float, cause: str) -> None:
        """A limit as wide as bfloat16 needs may be wider than what the change makes of a token."""
        if not gap <= change / 2:
            raise WeightSyncError(
                f"the sampler, sent changed weights, differs from the learner by {gap:.3g} nats, "
                f"where the change itself is of {change:.3g}: {cause}"
            )

    def _check_names(self, sent: Mapping[str, str | None], known: Collection[str] | None) -> None:
        """What the sampler's checkpoint does not have its model passes over without a word."""
        if known is None:
            return
        prefix = self._learner.name_prefix
        there = {name.removeprefix(prefix): name for name in known}
        found = {name for name in sent if name.removeprefix(prefix) in there}
        found |= {first for name in found if (first := sent[name]) is not None}
        unknown = sorted(name for name, first in sent.items() if not first and name not in found)
        kept = sorted({*there.values()} - {there.get(n.removeprefix(prefix)) for n in sent})
        if unknown:
            others = f"; the checkpoint has {some(kept)} instead" if kept else ""
            raise WeightSyncError(
                f"{len(unknown)} tensors of the student have names that the sampler's checkpoint "
                f"does not have, and would not reach it: {some(unknown)}{others}. Save the student "
                'once with transformers and train that, or sampler.kind = "hf_batched"'
            )
        if kept:
            self._say(
                f"{len(kept)} tensors of the checkpoint are no part of the student and stay as "
                f"they are in the sampler, whose log-probs were equal without them: {some(kept)}"
            )

    def _gap(self, said: _Continued) -> float:
        return gap_of(said.judged_by(self._learner.logprobs), said.logprobs)

    async def _continued(self, name: str, prompts: Sequence[NDArray[np.int32]]) -> _Continued:
        # One after the other: the second reads its beginning from the sampler's cache.
        return _Continued(
            prompts,
            [
                await self._sampled(f"{name}-{i}", ids, PROBE_TOKENS)
                for i, ids in enumerate(prompts)
            ],
        )

    async def _continued_at_once(
        self, name: str, prompts: Sequence[NDArray[np.int32]]
    ) -> _Continued:
        asked = (
            self._sampled(f"{name}-{i}", ids, SYNC_TOKENS, seed=i) for i, ids in enumerate(prompts)
        )
        return _Continued(prompts, await asyncio.gather(*asked))

    async def _sampled(
        self, request_id: str, prompt_ids: NDArray[np.int32], num_tokens: int, seed: int = 0
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        options = SamplingOptions(
            max_tokens=num_tokens, temperature=1.0, seed=seed, excluded_ids=self._excluded_ids
        )
        deltas = [delta async for delta in self._sampler.generate(request_id, prompt_ids, options)]
        return (
            np.concatenate([delta.token_ids for delta in deltas]),
            np.concatenate([delta.logprobs for delta in deltas]),
        )
