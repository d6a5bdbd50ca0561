"""The sampler with continuous batching against the reference and the learner.

Run: python -m pytest tests/trainer/rollouts/test_hf_batched_sampler.py

Tolerance 1e-5 nats for the tiny student: float32 on both sides, rows together against a rollout
alone; log-probs are of order 1 to 10. Families are of other sizes: that of check_family.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from student_trainer.errors import SamplerError, WeightSyncError
from student_trainer.records import Delta, Finish, Prompt, SamplingOptions
from student_trainer.rollouts.generation import Generation
from student_trainer.rollouts.probe import Proof
from student_trainer.rollouts.samplers.base import Sampler, Weights
from student_trainer.rollouts.samplers.hf_batched_sampler import HfBatchedSampler
from student_trainer.rollouts.samplers.hf_sampler import HfSampler
from student_trainer.rollouts.samplers.stop_strings import StopStringSampler
from student_trainer.rollouts.weight_sync import WeightSync
from teacher_wire.id_ranges import inside
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_families import FAMILIES, tiny_family
from tests.trainer.learner.tiny_student import (
    EOS_ID,
    VOCAB_SIZE,
    character_tokenizer,
    tiny_student,
    write_tiny_student,
)
from tests.trainer.rollouts.swaps_in_flight import changed_copy, newest_version
from tests.waiting import LIMIT_S

CPU = torch.device("cpu")
CLOSE = 1e-5
PROMPT = np.array([5, 6, 7, 8], np.int32)
ENDLESS = SamplingOptions(
    max_tokens=100_000, num_topk=2, seed=1, excluded_ids=((EOS_ID, EOS_ID + 1),)
)
"""It takes minutes, in which what a test does to it happens."""


def made(model: str | PreTrainedModel, **changes: Any) -> HfBatchedSampler:
    """Eight rows and four tokens a delta, unless told; not started."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": CPU,
        "max_num_seqs": 8,
        "stream_interval": 4,
        "kv_cache_gib": 0.1,
        "cpu_threads": 1,
    }
    return HfBatchedSampler(model=model, **(settings | changes))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
async def sampler(checkpoint: Path) -> AsyncIterator[HfBatchedSampler]:
    sampler = made(str(checkpoint))
    await sampler.start()
    yield sampler
    await sampler.close()


async def reference(folder: Path) -> HfSampler:
    sampler = HfSampler(model=str(folder), dtype="float32", device=CPU)
    await sampler.start()
    return sampler


async def deltas(
    sampler: Sampler, name: str, options: SamplingOptions, prompt: NDArray[np.int32] = PROMPT
) -> list[Delta]:
    """All of one generation."""
    async with asyncio.timeout(LIMIT_S):
        return [delta async for delta in sampler.generate(name, prompt, options)]


def joined(parts: list[Delta], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(part, name) for part in parts])


def check_equal(parts: list[Delta], expected: list[Delta], tolerance: float = CLOSE) -> None:
    """The same tokens and end, the same log-probs but for rounding."""
    assert joined(parts, "token_ids").tolist() == joined(expected, "token_ids").tolist()
    assert parts[-1].finish is expected[-1].finish
    for name in ("logprobs", "topk_logprobs"):
        given, wanted = joined(parts, name), joined(expected, name)
        assert given.shape == wanted.shape
        np.testing.assert_allclose(given, wanted, rtol=0, atol=tolerance)


MANY = [
    SamplingOptions(max_tokens=30, num_topk=4, seed=1),
    SamplingOptions(max_tokens=9, seed=2, temperature=0.7),
    SamplingOptions(max_tokens=40, num_topk=2, seed=3, top_p=0.8),
    SamplingOptions(max_tokens=25, num_topk=4, temperature=0.0),
    SamplingOptions(max_tokens=70, num_topk=3, seed=4, excluded_ids=((0, 2), (10, 20))),
    SamplingOptions(max_tokens=1, seed=5),
    SamplingOptions(max_tokens=30, num_topk=4, seed=None),
]


async def test_many_at_once_are_what_the_reference_says_one_by_one(
    sampler: HfBatchedSampler, checkpoint: Path
) -> None:
    """Prompts of several lengths, some the same, and more than run at once."""
    rng = np.random.default_rng(0)
    lengths = (1, 2, 7, 7, 30, 4, 90)
    prompts = [rng.integers(2, VOCAB_SIZE, length, dtype=np.int32) for length in lengths]
    asked = [*zip(prompts, MANY, strict=True), *((PROMPT, options) for options in MANY)]
    generations = (
        deltas(sampler, f"r{number}", options, prompt)
        for number, (prompt, options) in enumerate(asked)
    )
    together = await asyncio.gather(*generations)
    slow = await reference(checkpoint)
    for parts, (prompt, options) in zip(together, asked, strict=True):
        check_equal(parts, await deltas(slow, "alone", options, prompt))


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family_is_what_the_reference_says(tmp_path: Path, family: str) -> None:
    """Longer than a sliding window, beside rows of other lengths."""
    tiny_family(family).save_pretrained(tmp_path)
    sampler = made(str(tmp_path))
    await sampler.start()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 90, length, dtype=np.int32) for length in (3, 20, 11)]
    options = SamplingOptions(max_tokens=30, num_topk=3, seed=6)
    together = await asyncio.gather(
        *(deltas(sampler, f"r{n}", options, prompt) for n, prompt in enumerate(prompts))
    )
    await sampler.close()
    slow = await reference(tmp_path)
    for parts, prompt in zip(together, prompts, strict=True):
        check_equal(parts, await deltas(slow, "alone", options, prompt), tolerance=1e-4)


async def test_generation_is_reproducible_by_seed_whoever_is_beside(
    sampler: HfBatchedSampler,
) -> None:
    async def tokens(name: str, seed: int) -> list[int]:
        parts = await deltas(sampler, name, SamplingOptions(max_tokens=24, seed=seed))
        return list(joined(parts, "token_ids").tolist())

    alone = await tokens("a", 3)
    beside = await asyncio.gather(*(tokens(f"b{seed}", seed) for seed in range(6)))
    assert beside[3] == alone
    assert len({tuple(response) for response in beside}) == 6


async def test_ids_that_take_no_part_are_never_said_and_the_learner_agrees(
    sampler: HfBatchedSampler,
) -> None:
    excluded = ((2, 7), (20, 21), (40, 60))
    options = SamplingOptions(max_tokens=60, num_topk=4, seed=4, excluded_ids=excluded)
    parts, beside = await asyncio.gather(
        deltas(sampler, "without", options),
        deltas(sampler, "with", replace(options, excluded_ids=())),
    )
    tokens = joined(parts, "token_ids").astype(np.int32)
    assert not inside(excluded, tokens).any()
    assert not inside(excluded, joined(parts, "topk_ids").astype(np.int32)).any()
    assert inside(excluded, joined(beside, "topk_ids").astype(np.int32)).any()
    own = learner_of(tiny_student(), excluded_ids=excluded).logprobs(PROMPT, tokens)
    assert np.abs(joined(parts, "logprobs") - own).max() < CLOSE


async def test_budget_and_end_tokens_end_a_generation(checkpoint: Path) -> None:
    stop_id = 9
    sampler = made(str(checkpoint), stop_ids=(stop_id, 10**6))
    await sampler.start()
    runs = [
        deltas(sampler, f"r{seed}", SamplingOptions(max_tokens=30, temperature=2.0, seed=seed))
        for seed in range(20)
    ]
    ends = set()
    for parts in await asyncio.gather(*runs):
        tokens = joined(parts, "token_ids").tolist()
        if parts[-1].finish is Finish.STOP:
            ends.add(tokens[-1])
            tokens.pop()
        else:
            assert (len(tokens), parts[-1].finish) == (30, Finish.LENGTH)
        assert not {EOS_ID, stop_id} & set(tokens)
    await sampler.close()
    assert ends == {EOS_ID, stop_id}


async def test_abort_ends_soon_and_keeps_the_tokens_so_far(
    sampler: HfBatchedSampler, checkpoint: Path
) -> None:
    """The others go on as they would have."""
    options = replace(ENDLESS, max_tokens=100)
    beside = asyncio.create_task(deltas(sampler, "beside", replace(options, seed=2)))
    parts: list[Delta] = []
    async for delta in sampler.generate("aborted", PROMPT, ENDLESS):
        parts.append(delta)
        if len(parts) == 2:
            await sampler.abort(["aborted", "never heard of"])
    assert parts[-1].finish is Finish.TRUNCATED
    said = joined(parts, "token_ids").tolist()
    assert 8 <= len(said) < 100_000
    slow = await reference(checkpoint)
    alone = await deltas(slow, "alone", options)
    assert said[:100] == joined(alone, "token_ids").tolist()[: len(said)]
    check_equal(await beside, await deltas(slow, "alone", replace(options, seed=2)))


async def test_an_abandoned_generation_makes_room_and_can_be_started_again(
    checkpoint: Path,
) -> None:
    sampler = made(str(checkpoint), max_num_seqs=1)
    await sampler.start()
    endless = sampler.generate("a", PROMPT, ENDLESS)
    await anext(endless)
    await endless.aclose()
    options = SamplingOptions(max_tokens=6, seed=0)
    assert len(joined(await deltas(sampler, "a", options), "token_ids")) == 6
    await sampler.abort(["a"])
    assert len(joined(await deltas(sampler, "a", options), "token_ids")) == 6
    await sampler.close()


async def test_the_loop_goes_on_while_the_model_computes(
    sampler: HfBatchedSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that waits for something that only the loop can do."""
    model, called = sampler._loaded, threading.Event()
    assert model is not None
    loop, waited = asyncio.get_running_loop(), []

    def wait(*_: object) -> None:
        loop.call_soon_threadsafe(called.set)
        waited.append(called.wait(LIMIT_S))

    hook = model.register_forward_pre_hook(wait)
    try:
        await deltas(sampler, "a", SamplingOptions(max_tokens=2, seed=0))
    finally:
        hook.remove()
    assert waited == [True, True]


async def test_a_request_that_no_cache_could_hold_is_refused_with_the_remedy(
    checkpoint: Path,
) -> None:
    sampler = made(str(checkpoint), kv_cache_gib=1e-4)
    await sampler.start()
    limit = sampler._running().longest_request
    with pytest.raises(SamplerError, match=rf"{limit + 1} tokens.*holds {limit} "):
        await deltas(sampler, "a", SamplingOptions(max_tokens=limit + 1 - len(PROMPT)))
    parts = await deltas(sampler, "b", SamplingOptions(max_tokens=limit - len(PROMPT), seed=1))
    assert parts[-1].finish in (Finish.LENGTH, Finish.STOP)
    await sampler.close()


async def test_a_step_that_fails_is_a_typed_error_and_the_next_one_is_as_ever(
    sampler: HfBatchedSampler, checkpoint: Path
) -> None:
    model = sampler._loaded
    assert model is not None
    options = SamplingOptions(max_tokens=20, num_topk=2, seed=0)

    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    hook = model.register_forward_pre_hook(broken)
    runs = (deltas(sampler, f"r{n}", options) for n in range(12))
    failed = await asyncio.gather(*runs, return_exceptions=True)
    hook.remove()
    assert all(isinstance(error, SamplerError) for error in failed)
    assert "no memory" in str(failed[0])
    check_equal(
        await deltas(sampler, "a", options),
        await deltas(await reference(checkpoint), "a", options),
    )


async def test_a_student_of_nan_is_a_typed_error(sampler: HfBatchedSampler) -> None:
    model = sampler._loaded
    assert model is not None
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)  # type: ignore[operator,union-attr]
    with pytest.raises(SamplerError, match="NaN"):
        await deltas(sampler, "a", SamplingOptions(max_tokens=5, seed=0))


async def test_closing_ends_what_is_generated(checkpoint: Path) -> None:
    sampler = made(str(checkpoint))
    await sampler.start()
    endless = sampler.generate("a", PROMPT, ENDLESS)
    await anext(endless)
    await sampler.close()
    with pytest.raises(SamplerError, match="closed"):
        [_ async for _ in endless]
    with pytest.raises(RuntimeError, match="not started"):
        await deltas(sampler, "b", SamplingOptions(max_tokens=1))


async def test_threads_of_the_sampler_are_its_own(checkpoint: Path) -> None:
    """Nor are those of whoever begins later."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    sampler = made(str(checkpoint), cpu_threads=1)
    try:
        await sampler.start()
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (torch.get_num_threads(), later) == (2, [2])
    finally:
        await sampler.close()
        torch.set_num_threads(before)


async def test_stop_strings_end_responses_over_it(checkpoint: Path, sampler: Sampler) -> None:
    tokenizer = character_tokenizer()
    options = SamplingOptions(max_tokens=60, num_topk=2, seed=8)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    ids = joined(await deltas(sampler, "whole", options), "token_ids").tolist()
    text, stop = decode(ids), decode(ids[20:22])
    fast, slow = (
        StopStringSampler(one, [stop], decode) for one in (sampler, await reference(checkpoint))
    )
    parts = await deltas(fast, "stopped", options)
    assert decode(joined(parts, "token_ids").tolist()) == text[: text.index(stop) + len(stop)]
    assert parts[-1].finish is Finish.STOP
    check_equal(parts, await deltas(slow, "stopped", options))


async def test_a_second_answer_follows_the_first_and_what_was_said_between(
    sampler: HfBatchedSampler,
) -> None:
    turn = np.array([EOS_ID, 9, 12, 9], np.int32)
    asked = Prompt(prompt_id="", text="", token_ids=PROMPT, answer=None, turns=(turn,))
    options = SamplingOptions(max_tokens=60, temperature=2.0, num_topk=2)
    generations = [
        Generation(
            asked, request_id=f"s{seed}", options=replace(options, seed=seed), sampler=sampler
        )
        for seed in range(20)
    ]
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*(generation.run() for generation in generations))
    learner = learner_of(tiny_student())
    with_two_answers = 0
    for generation in generations:
        growing = generation.growing
        end = growing.num_tokens
        ids, sampled = growing.token_ids[:end], growing.sampled[:end]
        with_two_answers += not sampled.all()
        with torch.no_grad():
            sequence = torch.from_numpy(np.concatenate([PROMPT, ids])).long()[None]
            logits = learner.lent_model(sequence).logits[0, len(PROMPT) - 1 : -1]
        expected = (logits / 2.0).log_softmax(-1)[torch.arange(end), torch.from_numpy(ids).long()]
        assert np.abs(growing.logprobs[:end] - expected.numpy())[sampled].max() < CLOSE
    assert with_two_answers > 0


def sync_of(model: PreTrainedModel, sampler: Sampler, **changes: Any) -> WeightSync:
    probes = [PROMPT, PROMPT[:1]]
    return WeightSync(
        learner_of(model), sampler, probe_prompts=probes, max_logprob_gap=1e-3, **changes
    )


FRESH = Proof(prompts=[PROMPT, PROMPT[:1]], is_fresh=True, is_as_loaded=True, checkpoint_names=None)


def first_weights() -> Weights:
    """Those of the checkpoint."""
    return learner_of(tiny_student()).weights()


async def test_changed_weights_arrive_exactly_and_other_ones_are_noticed(
    sampler: HfBatchedSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_student()
    sync = sync_of(model, sampler)
    gaps = await sync.prove(0, FRESH)
    assert all(gap is not None and gap < CLOSE for gap in gaps.figures().values())
    for version in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        assert await sync.push(version) < 10 * CLOSE

    async def load_others(_: Weights) -> None:
        await HfBatchedSampler.load_weights(sampler, first_weights())

    monkeypatch.setattr(sampler, "load_weights", load_others)
    with pytest.raises(WeightSyncError, match="nats, more than"):
        await sync.push(7)


async def test_what_is_under_way_goes_on_with_new_weights(sampler: HfBatchedSampler) -> None:
    """Twice, with more rollouts than rows: no token is lost, said twice, or of older weights than
    the one before."""
    versions, begun = [tiny_student()], asyncio.Event()
    options = replace(ENDLESS, max_tokens=120)

    async def generated(index: int) -> list[Delta]:
        parts = []
        prompt = PROMPT[: 1 + index % 4]
        async for delta in sampler.generate(f"{index}", prompt, replace(options, seed=index)):
            parts.append(delta)
            if index == 0 and sum(map(len, parts)) >= 24 * len(versions):
                begun.set()
        return parts

    rollouts = [asyncio.create_task(generated(index)) for index in range(10)]
    for _ in range(2):
        async with asyncio.timeout(LIMIT_S):
            await begun.wait()
        begun.clear()
        changed = changed_copy(versions[-1], 0.1)
        await sampler.load_weights(learner_of(changed).weights())
        versions.append(changed)
    learners, mixed = [learner_of(model) for model in versions], 0
    excluded = ENDLESS.excluded_ids
    for learner in learners:
        learner.excluded_ids = excluded
    for index, parts in enumerate(await asyncio.gather(*rollouts)):
        tokens, seen = joined(parts, "token_ids"), joined(parts, "logprobs")
        assert (len(tokens), parts[-1].finish) == (120, Finish.LENGTH)
        prompt = PROMPT[: 1 + index % 4]
        own = [learner.logprobs(prompt, tokens) for learner in learners]
        mixed += newest_version(own, seen, 10 * CLOSE) > 0
    assert mixed >= 8


@pytest.mark.parametrize("checkpointing", [False, True])
async def test_the_learners_own_model_is_generated_with_and_given_back(
    checkpoint: Path, checkpointing: bool
) -> None:
    """In training mode, with gradient checkpointing, which leaves the cache out; changed weights
    are there without being sent."""
    model = tiny_student()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sampler = made(model)
    await sampler.start()
    assert model.training
    options = SamplingOptions(max_tokens=30, num_topk=2, seed=1)
    check_equal(
        await deltas(sampler, "a", options), await deltas(await reference(checkpoint), "a", options)
    )
    assert all(module.training for module in model.modules())
    sync = sync_of(model, sampler, written=None)
    gaps = await sync.prove(0, FRESH)
    assert all(gap is not None and gap < CLOSE for gap in gaps.figures().values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    assert await sync.push(1) < 10 * CLOSE
    after = await deltas(sampler, "b", options)
    model(torch.from_numpy(PROMPT).long()[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    own = learner_of(model).logprobs(PROMPT, joined(after, "token_ids"))
    assert np.abs(joined(after, "logprobs") - own).max() < 10 * CLOSE
    with pytest.raises(RuntimeError, match="learner's own"):
        await sampler.load_weights(first_weights())
    await sampler.close()
