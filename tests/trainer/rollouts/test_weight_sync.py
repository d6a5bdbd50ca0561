"""Weights arrive in the sampler, or it is said.

Run: python -m pytest tests/trainer/rollouts/test_weight_sync.py

The reference sampler stands in for vLLM here; test_samplers.py does the same with a real engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from student_trainer.errors import WeightSyncError
from student_trainer.records import Delta, SamplingOptions
from student_trainer.rollouts.probe import (
    SYNC_PROMPT_TOKENS,
    SYNC_PROMPTS,
    SYNC_TOKENS,
    sync_prompts,
)
from student_trainer.rollouts.samplers.base import Weights
from student_trainer.rollouts.samplers.hf_sampler import HfSampler
from student_trainer.rollouts.weight_sync import WeightSync
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import tiny_student, write_tiny_student

PROBES = [np.array([5, 6, 7], np.int32), np.array([9], np.int32)]


async def started(folder: Path, sampler: type[HfSampler] = HfSampler) -> HfSampler:
    """A reference sampler over a checkpoint."""
    made = sampler(model=str(folder), dtype="float32", device=torch.device("cpu"))
    await made.start()
    return made


def sync_of(model: PreTrainedModel, sampler: HfSampler) -> WeightSync:
    """A sync of a learner of this model."""
    return WeightSync(learner_of(model), sampler, probe_prompts=PROBES, max_logprob_gap=1e-3)


def change(model: PreTrainedModel, seed: int) -> None:
    """Other weights everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("tied", [False, True])
async def test_changed_weights_arrive_exactly(tmp_path: Path, tied: bool) -> None:
    sampler = await started(write_tiny_student(tmp_path, tied=tied))
    learner = tiny_student(tied=tied)
    sync = sync_of(learner, sampler)
    for version in range(2):
        change(learner, version)
        # 1e-4 nats: one token at a time with a cache against all at once, in float32.
        assert await sync.push(version) < 1e-4


class Deaf(HfSampler):
    """Keeps the weights that it has."""

    async def load_weights(self, weights: Weights) -> None:
        """Does nothing."""


async def test_sampler_with_other_weights_is_an_error(tmp_path: Path) -> None:
    sampler = await started(write_tiny_student(tmp_path), Deaf)
    learner = tiny_student()
    sync = sync_of(learner, sampler)
    assert await sync.push(0) < 1e-4
    change(learner, 0)
    with pytest.raises(WeightSyncError, match=r"sync of step 3 .* nats, more than 0\.001"):
        await sync.push(3)


class Broken(HfSampler):
    """Its second probe has log-probs that are no numbers."""

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        async for delta in super().generate(request_id, prompt_ids, options):
            bad = request_id.endswith("-1")
            yield replace(delta, logprobs=delta.logprobs * np.nan) if bad else delta


async def test_log_probs_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    sampler = await started(write_tiny_student(tmp_path), Broken)
    sync = sync_of(tiny_student(), sampler)
    with pytest.raises(WeightSyncError, match="nan"):
        await sync.push(0)


class Listening(HfSampler):
    """Notes what a sync asks."""

    asked: list[tuple[list[int], int]]

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        self.asked.append((prompt_ids.tolist(), options.max_tokens))
        async for delta in super().generate(request_id, prompt_ids, options):
            yield delta


async def test_a_sync_asks_for_few_tokens_after_short_pieces_of_its_prompts(tmp_path: Path) -> None:
    sampler = await started(write_tiny_student(tmp_path), Listening)
    texts = [np.arange(2, 22, dtype=np.int32), np.arange(22, 42, dtype=np.int32)]
    sync = WeightSync(
        learner_of(tiny_student()), sampler, probe_prompts=texts, max_logprob_gap=1e-3
    )
    sampler.asked = []
    assert await sync.push(0) < 1e-4
    assert {tokens for _, tokens in sampler.asked} == {SYNC_TOKENS}
    pieces = [prompt for prompt, _ in sampler.asked]
    assert pieces == [ids.tolist() for ids in sync_prompts(texts)]
    assert len(pieces) == SYNC_PROMPTS
    assert len({*map(tuple, pieces)}) == SYNC_PROMPTS
    assert {len(piece) for piece in pieces} == {SYNC_PROMPT_TOKENS}
    assert (pieces[0][0], pieces[-1][-1]) == (2, 41)


def test_prompts_of_a_sync_may_be_shorter_than_a_piece() -> None:
    pieces = sync_prompts([np.array([5], np.int32), np.array([6], np.int32)])
    assert [piece.tolist() for piece in pieces] == [[5, 6]] * SYNC_PROMPTS


@pytest.mark.parametrize("tied", [False, True])
async def test_weights_that_the_sampler_lacks_or_does_not_know_are_named(
    tmp_path: Path, tied: bool
) -> None:
    sampler = await started(write_tiny_student(tmp_path, tied=tied))
    learner = tiny_student(tied=tied)
    change(learner, 1)
    given = dict(learner_of(learner).weights())
    assert ("lm_head.weight" in given) == (not tied)
    await sampler.load_weights(iter(given.items()))
    for name, tensor in learner.state_dict().items():
        assert torch.equal(sampler._model().state_dict()[name], tensor), name
    lacking = {name: tensor for name, tensor in given.items() if name != "model.norm.weight"}
    with pytest.raises(WeightSyncError, match=r"them: model\.norm\.weight are not sent"):
        await sampler.load_weights(iter(lacking.items()))
    with pytest.raises(WeightSyncError, match=r"other is sent of \[1\], .* it not at all"):
        await sampler.load_weights(iter([("other", torch.ones(1))]))
    with pytest.raises(WeightSyncError, match=r"norm\.weight is sent of \[1\], .* it of \[\d+\]"):
        await sampler.load_weights(iter([("model.norm.weight", torch.ones(1))]))
