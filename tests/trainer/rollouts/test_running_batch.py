"""Rows that come and go: what a step computes, who joins when, and that no row knows the others.

Run: python -m pytest tests/trainer/rollouts/test_running_batch.py

Tolerance 1e-5 nats: float32, rows together against rows alone; log-probs are of order 1 to 10.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedModel

from student_trainer.errors import SamplerError
from student_trainer.records import Delta, Finish, SamplingOptions
from student_trainer.rollouts.samplers.batch_check import check_batch, check_state
from student_trainer.rollouts.samplers.running_batch import Request, RunningBatch
from student_trainer.rollouts.samplers.sampling import Uniforms, drawn
from student_trainer.rollouts.samplers.slot_cache import SPARE_COLUMNS, columns_for
from tests.trainer.learner.tiny_student import VOCAB_SIZE, tiny_student

CLOSE = 1e-5
MODEL = tiny_student().eval()
BYTES_PER_TOKEN = 2 * 2 * 32 * 4
"""Of the tiny student: keys and values, layers, their width, float32."""


def batch_of(model: PreTrainedModel = MODEL, **changes: Any) -> RunningBatch:
    """Four rows at once and three tokens a delta, unless told."""
    settings: dict[str, Any] = {
        "max_num_seqs": 4,
        "stream_interval": 3,
        "max_cache_bytes": 2**24,
        "end_ids": (),
    }
    return RunningBatch(model, **(settings | changes))


def request(prompt: Iterable[int], max_tokens: int, **options: Any) -> Request:
    """Of a prompt of these ids."""
    return Request(
        prompt_ids=np.array([*prompt], np.int32),
        options=SamplingOptions(max_tokens=max_tokens, num_topk=2, **options),
    )


def joined(parts: list[Delta], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(part, name) for part in parts])


def run(
    batch: RunningBatch,
    joining: dict[int, list[Request]],
    aborted: dict[int, Request] | None = None,
) -> dict[Request, list[Delta]]:
    """All deltas of requests that join, and some that are aborted, before a step of this number."""
    parts: dict[Request, list[Delta]] = defaultdict(list)
    aborted = aborted or {}
    for step in range(2000):
        for new in joining.get(step, []):
            batch.add(new)
        events = batch.abort([aborted[step]]) if step in aborted else []
        if not batch.is_idle:
            events += batch.step()
        for one, delta in events:
            parts[one].append(delta)
        if batch.is_idle and step >= max(joining):
            break
    return parts


def shapes_of(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Rows and tokens of every forward pass from here on."""
    shapes: list[tuple[int, int]] = []

    def seen(_: torch.nn.Module, __: object, options: dict[str, Any]) -> None:
        shapes.append(tuple(options["input_ids"].shape))

    model.get_decoder().register_forward_pre_hook(seen, with_kwargs=True)
    return shapes


requests = st.builds(
    request,
    st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=30),
    st.integers(1, 2 * SPARE_COLUMNS),
    seed=st.integers(0, 100),
    temperature=st.sampled_from([1.0, 0.7, 0.0]),
    excluded_ids=st.sampled_from([(), ((4, 9),)]),
)


@settings(max_examples=15, deadline=None, phases=[Phase.generate])
@given(st.lists(st.tuples(st.integers(0, 60), requests), min_size=1, max_size=9), st.data())
def test_a_row_says_beside_others_what_it_says_alone(
    arrivals: list[tuple[int, Request]], data: st.DataObject
) -> None:
    """Whoever joins and leaves when; the longest pass the end of the buffers, which move."""
    joining: dict[int, list[Request]] = defaultdict(list)
    for step, one in arrivals:
        joining[step].append(one)
    stopped = data.draw(st.sampled_from([one for _, one in arrivals]), label="aborted")
    at = data.draw(st.integers(0, 100), label="at step")
    together = run(batch_of(), joining, {at: stopped})
    for _, one in arrivals:
        again = Request(prompt_ids=one.prompt_ids, options=one.options)
        alone, beside = run(batch_of(max_num_seqs=1), {0: [again]})[again], together[one]
        said = joined(beside, "token_ids")
        finish = beside[-1].finish
        assert finish is Finish.LENGTH or (one is stopped and finish is Finish.TRUNCATED)
        assert [part.finish for part in beside[:-1]] == [None] * (len(beside) - 1)
        if finish is Finish.LENGTH:
            assert len(said) == one.options.max_tokens
        # A draw within rounding of the border between two ids may go either way.
        same = joined(alone, "token_ids")[: len(said)] == said
        upto = len(said) if same.all() else int(same.argmin())
        for name in ("logprobs", "topk_logprobs"):
            gap = joined(alone, name)[:upto] - joined(beside, name)[:upto]
            assert np.abs(np.nan_to_num(gap)).max(initial=0.0) < CLOSE


def test_each_step_computes_the_rows_that_are_there() -> None:
    model = tiny_student().eval()
    batch = batch_of(model)
    shapes = shapes_of(model)
    run(batch, {0: [request([5, 6, 7], 2), request([8], 4), request([9, 10], 5)]})
    prefill, *steps = shapes
    assert prefill == (3, 2)
    assert steps == [(3, 1)] * 2 + [(2, 1)] * 2 + [(1, 1)]


def test_equal_prompts_are_computed_once_and_again_never_while_one_is_there() -> None:
    model = tiny_student().eval()
    batch = batch_of(model, max_num_seqs=3)
    shapes = shapes_of(model)
    same = [request([5, 6, 7, 8], 3 + seed, seed=seed) for seed in range(5)]
    other = request([9, 9], 4)
    parts = run(batch, {0: [*same[:2], other, *same[2:]]})
    assert [shape for shape in shapes if shape[1] != 1] == [(2, 3)]
    assert len(parts) == 6


def test_those_that_wait_join_in_order_as_rows_become_free() -> None:
    batch = batch_of(max_num_seqs=2)
    waiting = [request([5 + index], 3 + index % 2, seed=index) for index in range(6)]
    for one in waiting:
        batch.add(one)
    ends: list[Request] = []
    rows: list[int] = []
    while not batch.is_idle:
        events = batch.step()
        rows.append(batch.num_rows)
        ends += [one for one, delta in events if delta.finish]
    assert ends == waiting
    assert max(rows) == 2
    # Lengths 3 and 4 in turn, two at a time: a row that is free is taken at the next step.
    assert len(rows) == 12


def test_no_more_rows_join_than_the_cache_holds_to_their_ends() -> None:
    for_two = 2 * columns_for(30) * BYTES_PER_TOKEN
    batch = batch_of(max_cache_bytes=for_two)
    short = [request([5], 9, seed=seed) for seed in range(2)]
    long = request([5] * 10, 20)
    for one in (*short, long, request([6], 2)):
        batch.add(one)
    batch.step()
    assert batch.num_rows == 2
    held = sum(buffer.nbytes for layer in batch._cache._slots for buffer in layer.buffers)
    assert held <= for_two
    assert batch.longest_request == 2 * columns_for(30) - columns_for(0)


def test_an_aborted_request_gives_what_it_has_and_one_that_waits_gives_nothing() -> None:
    batch = batch_of(max_num_seqs=1)
    running, waiting = request([5, 6], 50, seed=1), request([7], 50)
    batch.add(running)
    batch.add(waiting)
    for _ in range(2):
        assert batch.step() == []
    ((one, delta),) = batch.abort([waiting])
    assert one is waiting
    assert (len(delta), delta.topk_ids.shape, delta.finish) == (0, (0, 2), Finish.TRUNCATED)
    ((one, delta),) = batch.abort([running, waiting])
    assert one is running
    assert (len(delta), delta.finish) == (2, Finish.TRUNCATED)
    assert batch.is_idle
    assert batch.abort([running]) == []


def test_deltas_have_as_many_tokens_as_the_interval_but_the_last() -> None:
    one = request([5, 6], 10)
    parts = run(batch_of(), {0: [one]})[one]
    assert [len(part) for part in parts] == [3, 3, 3, 1]
    exact = request([5, 6], 6)
    parts = run(batch_of(), {0: [exact]})[exact]
    assert [(len(part), part.finish) for part in parts] == [(3, None), (3, Finish.LENGTH)]


def test_an_end_token_is_the_last_one() -> None:
    free = request([5, 6], 40, seed=3)
    said = joined(run(batch_of(), {0: [free]})[free], "token_ids").tolist()
    end_id = said[7]
    ended = request([5, 6], 40, seed=3)
    parts = run(batch_of(end_ids=[end_id, 10**6]), {0: [ended]})[ended]
    assert joined(parts, "token_ids").tolist() == said[: said.index(end_id) + 1]
    assert parts[-1].finish is Finish.STOP


@settings(deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_numbers_of_a_seed_are_the_same_however_many_are_taken_at_once(
    seed: int, counts: list[int]
) -> None:
    uniforms, singly = Uniforms(seed), Uniforms(seed)
    taken = torch.cat([uniforms.take(count) for count in counts])
    assert torch.equal(taken, torch.cat([singly.take(1) for _ in range(sum(counts))]))


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    """20,000 draws of each of two rows: chi-squared with 4 and 3 degrees of freedom. The 1e-6
    quantiles are 33.4 and 30.7; the seed is fixed."""
    logits_RV = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5], [3.0, -torch.inf, 1.0, 1.0, 0.0]])
    count = 20_000
    options = SamplingOptions(max_tokens=1)
    uniforms = Uniforms(7).take(2 * count).view(2, count)
    for row, logits_V in enumerate(logits_RV):
        got = drawn(logits_V.expand(count, -1), options, uniforms[row]).token_ids
        seen_V = torch.bincount(got, minlength=5).double()
        expected_V = count * logits_V.double().softmax(-1)
        there = expected_V > 0
        assert seen_V[~there].sum() == 0
        statistic = ((seen_V - expected_V)[there] ** 2 / expected_V[there]).sum()
        assert statistic < 30


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_interval_draw_ids_that_can_be_drawn(uniform: float) -> None:
    logits_RV = torch.full((3, 9), -torch.inf)
    logits_RV[:, 2:5] = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    got = drawn(logits_RV, SamplingOptions(max_tokens=1), torch.full((3,), uniform).double())
    assert got.token_ids.tolist() == [2 if uniform == 0.0 else 4] * 3


def test_logits_that_are_no_numbers_are_an_error() -> None:
    logits_RV = torch.zeros(2, 5)
    logits_RV[1, 3] = torch.nan
    with pytest.raises(SamplerError, match="NaN"):
        drawn(logits_RV, SamplingOptions(max_tokens=1), torch.full((2,), 0.5).double())


def test_a_family_that_a_batch_gets_wrong_is_refused_by_name() -> None:
    model = tiny_student().eval()
    check_batch(model)

    def without_mask(_: torch.nn.Module, args: Any, options: dict[str, Any]) -> Any:
        return args, {**options, "attention_mask": None}

    model.register_forward_pre_hook(without_mask, with_kwargs=True)
    with pytest.raises(SamplerError, match=r"qwen3 .*nats off .*sampler\.kind"):
        check_batch(model)


def test_a_family_with_another_past_than_keys_and_values_is_refused_by_name() -> None:
    config = Lfm2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    with pytest.raises(SamplerError, match=r"lfm2 .*keeps .* of its past.*sampler\.kind"):
        check_state(Lfm2ForCausalLM(config))
    check_state(MODEL)
