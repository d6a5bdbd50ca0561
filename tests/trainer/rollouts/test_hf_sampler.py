"""The reference sampler. Run: python -m pytest tests/trainer/rollouts/test_hf_sampler.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from student_trainer.records import Delta, Finish, SamplingOptions
from student_trainer.rollouts.samplers.hf_sampler import HfSampler
from student_trainer.rollouts.samplers.sampling import sampling_logprobs
from teacher_wire.id_ranges import inside
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import EOS_ID, VOCAB_SIZE, tiny_student, write_tiny_student

PROMPT = np.array([5, 6, 7], np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student's; none of the seeds below draws <eos>."""
    return write_tiny_student(tmp_path_factory.mktemp("student"))


async def started(folder: Path) -> HfSampler:
    """Over a checkpoint, in float32."""
    sampler = HfSampler(model=str(folder), dtype="auto", device=torch.device("cpu"))
    await sampler.start()
    return sampler


async def deltas(sampler: HfSampler, name: str, options: SamplingOptions) -> list[Delta]:
    """All of one generation."""
    return [delta async for delta in sampler.generate(name, PROMPT, options)]


def ids(parts: list[Delta]) -> list[int]:
    """The tokens of a generation."""
    return [int(token) for part in parts for token in part.token_ids]


logits_lists = st.lists(st.floats(-8, 8), min_size=2, max_size=12)


@given(logits=logits_lists, top_p=st.floats(0.05, 1.0), temperature=st.floats(0.2, 3.0))
def test_sampled_distribution_is_the_smallest_nucleus_renormalised(
    logits: list[float], top_p: float, temperature: float
) -> None:
    tensor = torch.tensor(logits, dtype=torch.float64)
    options = SamplingOptions(max_tokens=1, temperature=temperature, top_p=top_p)
    full = torch.log_softmax(tensor / temperature, -1)
    got = sampling_logprobs(tensor, options)
    inside = got.isfinite()
    # 1e-9: float64 throughout.
    assert got.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    mass = full[inside].exp().sum().item()
    torch.testing.assert_close(got[inside], full[inside] - np.log(mass), atol=1e-9, rtol=0)
    if top_p == 1.0:
        assert inside.all()
        return
    assert mass >= top_p - 1e-9
    assert mass - full[inside].exp().min().item() < top_p + 1e-9
    if not inside.all():
        assert full[inside].min() >= full[~inside].max()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_log_probs_are_those_of_the_whole_sequence(
    checkpoint: Path, temperature: float
) -> None:
    options = SamplingOptions(max_tokens=12, temperature=temperature, num_topk=4, seed=3)
    parts = await deltas(await started(checkpoint), "a", options)
    tokens = ids(parts)
    with torch.no_grad():
        sequence = torch.tensor([[*PROMPT.tolist(), *tokens]])
        logits = tiny_student().eval()(sequence).logits[0, len(PROMPT) - 1 : -1]
    expected = torch.log_softmax(logits / temperature, -1)
    own = expected[torch.arange(len(tokens)), torch.tensor(tokens)]
    got = torch.from_numpy(np.concatenate([part.logprobs for part in parts]))
    # 1e-4 nats: float32, a token at a time with a cache against all at once.
    torch.testing.assert_close(got, own, atol=1e-4, rtol=0)
    topk_ids = np.concatenate([part.topk_ids for part in parts])
    assert topk_ids.tolist() == expected.topk(4).indices.tolist()


EXCLUDED = ((0, 2), (10, 11), (30, 60))
"""The tiny student has fewer ids than 60."""


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
async def test_ids_that_take_no_part_are_never_said(checkpoint: Path, temperature: float) -> None:
    """And the log-probs of the others are the learner's."""
    num_left = int((~inside(EXCLUDED, np.arange(VOCAB_SIZE))).sum())
    options = SamplingOptions(
        max_tokens=40, temperature=temperature, num_topk=num_left, seed=3, excluded_ids=EXCLUDED
    )
    parts = await deltas(await started(checkpoint), "a", options)
    tokens = np.array(ids(parts), np.int32)
    topk_ids = np.concatenate([part.topk_ids for part in parts])
    assert len(tokens) == 40
    assert not inside(EXCLUDED, tokens).any()
    assert not inside(EXCLUDED, topk_ids).any()
    topk = np.concatenate([part.topk_logprobs for part in parts])
    assert np.abs(np.exp(topk.astype(np.float64)).sum(1) - 1).max() < 1e-5
    if temperature == 1.0:
        learner = learner_of(tiny_student(), excluded_ids=EXCLUDED)
        got = np.concatenate([part.logprobs for part in parts])
        assert np.abs(got - learner.logprobs(PROMPT, tokens)).max() < 1e-4


async def test_generation_is_reproducible_by_seed(checkpoint: Path) -> None:
    sampler = await started(checkpoint)

    async def tokens(name: str, seed: int, temperature: float = 1.0) -> list[int]:
        options = SamplingOptions(max_tokens=10, seed=seed, temperature=temperature)
        return ids(await deltas(sampler, name, options))

    assert await tokens("a", 1) == await tokens("b", 1)
    assert await tokens("c", 1) != await tokens("d", 2)
    assert await tokens("e", 1, 0.0) == await tokens("f", 2, 0.0)


async def test_generation_ends_with_the_budget(checkpoint: Path) -> None:
    parts = await deltas(
        await started(checkpoint), "a", SamplingOptions(max_tokens=3, temperature=0.0)
    )
    assert len(ids(parts)) == 3
    assert [part.finish for part in parts] == [None, None, Finish.LENGTH]


async def test_nothing_follows_the_end_token(tmp_path: Path) -> None:
    model = tiny_student()
    with torch.no_grad():
        # Every token is equally likely, <eos> among them.
        model.lm_head.weight.zero_()
    write_tiny_student(tmp_path)
    model.save_pretrained(tmp_path)
    sampler = await started(tmp_path)
    for seed in range(5):
        options = SamplingOptions(max_tokens=VOCAB_SIZE * 20, seed=seed)
        parts = await deltas(sampler, f"r{seed}", options)
        tokens = ids(parts)
        if EOS_ID in tokens:
            assert tokens.index(EOS_ID) == len(tokens) - 1
            assert parts[-1].finish is Finish.STOP
            return
    pytest.fail("a uniform student never drew <eos>")


async def test_aborted_generation_ends_with_what_it_has(checkpoint: Path) -> None:
    sampler = await started(checkpoint)
    parts = []
    async for delta in sampler.generate("a", PROMPT, SamplingOptions(max_tokens=100, seed=0)):
        parts.append(delta)
        if len(parts) == 4:
            await sampler.abort(["a"])
    assert 4 <= len(parts) <= 5
    assert parts[-1].finish is Finish.TRUNCATED


async def test_abort_of_an_unknown_id_is_ignored(checkpoint: Path) -> None:
    sampler = await started(checkpoint)
    options = SamplingOptions(max_tokens=6, seed=0)
    await sampler.abort(["a"])
    assert len(ids(await deltas(sampler, "a", options))) == 6
    await sampler.abort(["a"])
    assert len(ids(await deltas(sampler, "a", options))) == 6


async def test_abandoned_generation_can_be_started_again(checkpoint: Path) -> None:
    sampler = await started(checkpoint)
    generation = sampler.generate("a", PROMPT, SamplingOptions(max_tokens=6, seed=0))
    await anext(generation)
    await sampler.abort(["a"])
    await generation.aclose()
    assert len(ids(await deltas(sampler, "a", SamplingOptions(max_tokens=6, seed=0)))) == 6


async def test_a_generation_goes_on_with_new_weights_as_if_its_tokens_were_a_prompt(
    checkpoint: Path,
) -> None:
    other = tiny_student(seed=1).eval()
    sampler = await started(checkpoint)
    options = SamplingOptions(max_tokens=12, num_topk=4, seed=3)
    parts = []
    async for delta in sampler.generate("a", PROMPT, options):
        parts.append(delta)
        if len(parts) == 5:
            await sampler.load_weights(learner_of(other).weights())
    tokens = ids(parts)
    assert len(tokens) == 12
    sequence = torch.tensor([[*PROMPT.tolist(), *tokens]])
    seen = np.array([float(part.logprobs[0]) for part in parts])
    gaps = []
    for model in (tiny_student().eval(), other):
        with torch.no_grad():
            logits = model(sequence).logits[0, len(PROMPT) - 1 : -1]
        own = torch.log_softmax(logits, -1)[torch.arange(12), torch.tensor(tokens)].numpy()
        gaps.append(np.abs(own - seen))
    assert gaps[0][:5].max() < 1e-5
    assert gaps[1][5:].max() < 1e-5
    assert min(gaps[0][5:].max(), gaps[1][:5].max()) > 0.01


async def test_sampler_that_is_not_started_says_so() -> None:
    with pytest.raises(RuntimeError, match="not started"):
        await deltas(
            HfSampler(model="", dtype="auto", device=torch.device("cpu")),
            "a",
            SamplingOptions(max_tokens=1),
        )
