"""Rollouts to tensors to one gradient. Run: python -m pytest tests/trainer/learner/test_batch.py"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3ForCausalLM

from student_trainer.errors import NonFiniteLossError
from student_trainer.learner import student
from student_trainer.learner.batch import (
    Batch,
    collate,
    recompute_behavior,
    split_micro,
    split_updates,
)
from student_trainer.learner.head import Head
from student_trainer.losses.objective import (
    Divergence,
    merge,
    needs_normalization,
    objective,
    step_scale,
)
from student_trainer.losses.weight_choice import (
    BlockGate,
    PositionWeight,
    PrefixImportanceWeight,
    PruneWeight,
)
from student_trainer.records import Finish, Prompt, Rollout, RolloutTimes
from teacher_wire.id_ranges import ranges_of
from teacher_wire.records import ScoreRows
from tests.trainer.learner.tiny_student import VOCAB_SIZE, tiny_student
from tests.trainer.losses.loss_cases import DIVERGENCES
from tests.trainer.made_rollouts import random_rollout

CPU = torch.device("cpu")


def golden(prompt: list[int], response: list[int], start: float) -> Rollout:
    """Every array holds numbers that say which token they belong to."""
    at = start + np.arange(len(response), dtype=np.float32)
    pair = np.stack([at + 0.1, at + 0.2], axis=1)
    ids = np.stack([response, np.add(response, 1)], axis=1).astype(np.int32)
    return Rollout(
        prompt=Prompt(prompt_id="", text="", token_ids=np.array(prompt, np.int32), answer=None),
        response_ids=np.array(response, np.int32),
        behavior_logprobs=-at,
        student_topk_ids=ids,
        student_topk_logprobs=-pair,
        mask=np.arange(len(response)) != 0,
        teacher=ScoreRows(
            offset=0,
            topk_ids=ids[:, ::-1],
            topk_logprobs=-pair - 0.5,
            token_logprobs=-at - 0.5,
            candidate_logprobs=-pair - 0.7,
            bad_events=np.arange(len(response)) == 1,
            entropies=at + 0.25,
        ),
        behavior_logprobs_at_teacher_topk=-pair - 0.9,
        drift=None,
        finish=Finish.STOP,
        num_generated=len(response),
        policy_version=0,
        times=RolloutTimes(
            started_s=0.0, generated_s=0.0, scored_s=0.0, round_trip_tokens=0, verdict_span_tokens=0
        ),
    )


def same(tensor: Tensor | None, expected: object) -> bool:
    """True when the tensor holds these numbers, to float32."""
    assert tensor is not None
    return np.allclose(tensor.numpy(), np.array(expected), atol=1e-6)


def test_row_t_of_every_tensor_belongs_to_response_token_t() -> None:
    batch = collate([golden([5, 6, 7], [8, 9], 1.0), golden([10], [11, 12, 13], 4.0)], CPU)
    assert batch.input_ids_BS.tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 0]]
    assert batch.prompt_lengths_B.tolist() == [3, 1]
    assert batch.response_ids_BT.tolist() == [[8, 9, 0], [11, 12, 13]]
    assert batch.response_mask_BT.tolist() == [[True, True, False], [True, True, True]]
    assert batch.mask_BT.tolist() == [[False, True, False], [False, True, True]]
    assert same(batch.behavior_logprobs_BT, [[-1, -2, 0], [-4, -5, -6]])
    assert same(batch.teacher_logprobs_BT, [[-1.5, -2.5, 0], [-4.5, -5.5, -6.5]])
    assert batch.teacher_topk_ids_BTK[1].tolist() == [[12, 11], [13, 12], [14, 13]]
    assert batch.student_topk_ids_BTJ[0].tolist() == [[8, 9], [9, 10], [0, 0]]
    assert same(batch.teacher_topk_logprobs_BTK[0], [[-1.6, -1.7], [-2.6, -2.7], [0, 0]])
    assert same(batch.behavior_topk_logprobs_BTJ[0], [[-1.1, -1.2], [-2.1, -2.2], [0, 0]])
    at_student = batch.teacher_logprobs_at_student_topk_BTJ
    assert same(
        at_student,
        [
            [[-1.8, -1.9], [-2.8, -2.9], [0, 0]],
            [[-4.8, -4.9], [-5.8, -5.9], [-6.8, -6.9]],
        ],
    )
    assert same(
        batch.behavior_logprobs_at_teacher_topk_BTK,
        [
            [[-2.0, -2.1], [-3.0, -3.1], [0, 0]],
            [[-5.0, -5.1], [-6.0, -6.1], [-7.0, -7.1]],
        ],
    )
    assert same(batch.teacher_entropies_BT, [[1.25, 2.25, 0], [4.25, 5.25, 6.25]])
    assert batch.bad_events_BT is not None
    assert batch.bad_events_BT.tolist() == [[False, True, False], [False, True, False]]


def test_what_the_teacher_did_not_send_is_none() -> None:
    rollout = random_rollout(np.random.default_rng(0), has_candidates=False, j=0)
    rollout = replace(rollout, teacher=replace(rollout.teacher, bad_events=None, entropies=None))
    batch = collate([rollout, rollout], CPU)
    assert batch.teacher_logprobs_at_student_topk_BTJ is None
    assert batch.behavior_logprobs_at_teacher_topk_BTK is None
    assert batch.teacher_entropies_BT is None
    assert batch.bad_events_BT is None
    inputs = batch.loss_inputs(batch.forward(tiny_student(), temperature=1.0))
    assert inputs.student_topk is None
    assert inputs.teacher_topk is not None
    assert inputs.teacher_topk.in_student_topk_BTN is None
    assert inputs.sampled.in_student_topk_BTN is None


def test_losses_see_who_named_which_token() -> None:
    rollout = golden([5], [8, 9, 10], 1.0)
    rollout = replace(
        rollout,
        mask=np.array([True, True, False]),
        student_topk_ids=np.array([[8, 3], [4, 5], [10, 3]], np.int32),
        teacher=replace(rollout.teacher, topk_ids=np.array([[3, 8], [9, 2], [10, 3]], np.int32)),
    )
    batch = collate([rollout], CPU)
    gathered = batch.forward(tiny_student(), temperature=1.0)
    inputs = batch.loss_inputs(gathered)
    flags = {
        "sampled.in_student_topk_BTN": [[True], [False], [False]],
        "sampled.in_teacher_topk_BTN": [[True], [True], [False]],
        "student_topk.in_teacher_topk_BTN": [[True, True], [False, False], [False, False]],
        "teacher_topk.in_student_topk_BTN": [[True, True], [False, False], [False, False]],
    }
    for name, expected in flags.items():
        assert attrgetter(name)(inputs)[0].tolist() == expected, name
    assert inputs.response_ids_BT is not None
    assert inputs.response_ids_BT.tolist() == [[8, 9, 0]]
    assert same(inputs.student_entropies_BT, (gathered.entropy_BT * batch.mask_BT).numpy())
    assert same(inputs.teacher_entropies_BT, [[1.25, 2.25, 0]])


def rollouts_of(lengths: list[tuple[int, int]]) -> list[Rollout]:
    """One rollout for each pair of prompt and response length."""
    rng = np.random.default_rng(0)
    return [random_rollout(rng, num_prompt=p, num_response=r, k=1, j=1) for p, r in lengths]


LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=8)


@settings(deadline=None)
@given(lengths=LENGTHS, max_tokens=st.integers(1, 60))
def test_micro_batches_hold_every_rollout_once_within_their_size(
    lengths: list[tuple[int, int]], max_tokens: int
) -> None:
    rollouts = rollouts_of(lengths)
    parts = split_micro(rollouts, max_tokens)
    assert sorted(id(r) for part in parts for r in part) == sorted(map(id, rollouts))
    for part in parts:
        padded = collate(part, CPU).input_ids_BS.numel()
        assert padded <= max_tokens or len(part) == 1


def positions(parts: list[list[Rollout]]) -> int:
    """To compute, padding included."""
    return sum(collate(part, CPU).input_ids_BS.numel() for part in parts)


def divisions(rollouts: list[Rollout]) -> Iterator[list[list[Rollout]]]:
    """Every way to cut a list into parts."""
    if not rollouts:
        yield []
    for end in range(1, len(rollouts) + 1):
        for rest in divisions(rollouts[end:]):
            yield [rollouts[:end], *rest]


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, max_tokens=st.integers(1, 60), part_costs=st.integers(0, 30))
def test_no_other_micro_batches_of_neighbours_in_length_cost_less(
    lengths: list[tuple[int, int]], max_tokens: int, part_costs: int
) -> None:
    def cost(parts: list[list[Rollout]]) -> int:
        return positions(parts) + part_costs * len(parts)

    rollouts = rollouts_of(lengths)
    found = split_micro(rollouts, max_tokens, part_costs=part_costs)
    by_length = sorted(rollouts, key=lambda r: len(r.prompt.token_ids) + len(r))
    allowed = [
        cost(parts)
        for parts in divisions(by_length)
        if all(len(part) == 1 or positions([part]) <= max_tokens for part in parts)
    ]
    assert cost(found) == min(allowed)


def test_a_short_rollout_is_not_padded_to_a_far_longer_one() -> None:
    rollouts = rollouts_of([(10, 290)] * 3 + [(10, 20)] * 3)
    parts = split_micro(rollouts, 16_384)
    assert sorted(map(len, parts)) == [3, 3]
    assert positions(parts) == 3 * 300 + 3 * 30


def test_what_does_not_count_has_no_row_in_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the gradient is the same to the bit of the sums that are left."""
    rows: list[int] = []
    plain = student.head_logprobs

    def counted(head: Head, hidden_RD: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows.append(len(hidden_RD))
        return plain(head, hidden_RD, *args, **kwargs)

    monkeypatch.setattr(student, "head_logprobs", counted)
    model, divergence = tiny_student(), next(iter(DIVERGENCES.values()))
    rng = np.random.default_rng(3)
    batch = collate([random_rollout(rng, num_response=n, masked=2) for n in (5, 9, 3)], CPU)
    found = []
    for only_counted in (False, True):
        model.zero_grad()
        gathered = batch.forward(model, temperature=1.0, only_counted=only_counted)
        objective(batch.loss_inputs(gathered), divergence=divergence).loss_sum.backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert rows == [17, 11]
    assert (found[0] - found[1]).norm() <= 1e-6 * found[0].norm()


def test_rollouts_of_which_nothing_counts_have_a_gradient_of_nought() -> None:
    model, divergence = tiny_student(), next(iter(DIVERGENCES.values()))
    rng = np.random.default_rng(3)
    batch = collate([random_rollout(rng, num_response=3, masked=3)], CPU)
    gathered = batch.forward(model, temperature=1.0, only_counted=True)
    sums = objective(batch.loss_inputs(gathered), divergence=divergence)
    sums.loss_sum.backward()
    assert sums.num_tokens.item() == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    num_updates=st.integers(1, 10),
    seed=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_updates_hold_every_rollout_once_and_are_determined_by_the_seed(
    lengths: list[tuple[int, int]], num_updates: int, seed: tuple[int, int]
) -> None:
    rollouts = rollouts_of(lengths)
    updates = split_updates(rollouts, num_updates, seed=seed)
    assert sorted(id(r) for part in updates for r in part) == sorted(map(id, rollouts))
    assert len(updates) == min(num_updates, len(rollouts))
    sizes = [len(part) for part in updates]
    assert max(sizes) - min(sizes) <= 1
    again = split_updates(rollouts, num_updates, seed=seed)
    assert [[id(r) for r in part] for part in updates] == [[id(r) for r in p] for p in again]


def test_epochs_shuffle_differently() -> None:
    rollouts = rollouts_of([(1, 2)] * 20)
    orders = [
        [id(r) for part in split_updates(rollouts, 4, seed=(0, 0, epoch)) for r in part]
        for epoch in range(2)
    ]
    assert orders[0] != orders[1]


def step_gradient(
    model: Qwen3ForCausalLM,
    parts: list[Batch],
    divergence: Divergence,
    weights: list[PositionWeight],
) -> Tensor:
    """The gradient that the optimiser gets, flat, as train.learn makes it."""
    model.zero_grad()
    sums = []
    for batch in parts:
        outside = divergence.needs.mass_outside  # type: ignore[attr-defined]
        gathered = batch.forward(model, temperature=0.8, mass_outside=outside)
        inputs = batch.loss_inputs(gathered)
        part = objective(inputs, divergence=divergence, weights=weights)
        part.loss_sum.backward()
        sums.append(part.detached())
    totals = merge(sums)
    scale = step_scale(
        totals.weight_sum.item(), totals.num_tokens.item(), needs_normalization(weights)
    )
    return scale * torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def padded_wider(batch: Batch, extra: int) -> Batch:
    """The same batch with `extra` more columns of padding everywhere, garbage where it may be."""

    def wider(tensor: Tensor, fill: float) -> Tensor:
        block = tensor.new_full((tensor.shape[0], extra, *tensor.shape[2:]), fill)
        return torch.cat([tensor, block], dim=1)

    changes = {}
    for name in Batch.__slots__:
        tensor = getattr(batch, name)
        if tensor is not None and tensor.ndim > 1:
            changes[name] = wider(tensor, -7.0 if tensor.is_floating_point() else 0)
    return replace(batch, **changes)


WEIGHTS: list[PositionWeight] = [
    PruneWeight(w_drop=0.3, w_base=0.5),
    PrefixImportanceWeight(gamma=0.5),
    BlockGate(block_size=2, tau=1.0),
]


@pytest.mark.parametrize("weights", [[], WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_split_padding_and_order_leave_the_gradient_of_a_step_unchanged(
    divergence: Divergence, weights: list[PositionWeight]
) -> None:
    model = tiny_student()
    rng = np.random.default_rng(3)
    shapes = [(3, 5), (1, 9), (6, 2), (2, 7), (4, 4)]
    rollouts = [
        random_rollout(rng, num_prompt=p, num_response=r, masked=i % 3)
        for i, (p, r) in enumerate(shapes)
    ]
    # Near on policy, so that the ratios are inside and outside of the clip but the gate is alive.
    rollouts = recompute_behavior(
        model, rollouts, micro_batch_tokens=1000, temperature=0.9, device=CPU
    )
    whole = step_gradient(model, [collate(rollouts, CPU)], divergence, weights)
    assert whole.abs().max() > 1e-3
    ways = {
        "one by one": [collate([r], CPU) for r in rollouts],
        "split_micro": [collate(part, CPU) for part in split_micro(rollouts, 24)],
        "reversed": [collate(rollouts[::-1], CPU)],
        "wider": [padded_wider(collate(rollouts, CPU), 6)],
    }
    for way, parts in ways.items():
        got = step_gradient(model, parts, divergence, weights)
        # float32, the same sums in another order: seen 2e-7; and where attention runs over a wider
        # row 1.1e-6, with AVX-512 3.6e-6. Padding that counts comes to 0.1 and more.
        gap = ((got - whole).norm() / whole.norm()).item()
        assert gap <= (1e-5 if way == "wider" else 1e-6), f"{way}: {gap}"


@pytest.mark.parametrize("max_tokens", [1, 12, 20, 33, 1000])
def test_any_budget_of_tokens_gives_the_same_gradient(max_tokens: int) -> None:
    model, divergence = tiny_student(), next(iter(DIVERGENCES.values()))
    rng = np.random.default_rng(3)
    shapes = [(3, 5), (1, 9), (6, 2), (2, 7), (4, 4)]
    rollouts = [random_rollout(rng, num_prompt=p, num_response=r) for p, r in shapes]
    whole = step_gradient(model, [collate(rollouts, CPU)], divergence, [])
    parts = split_micro(rollouts, max_tokens)
    found = step_gradient(model, [collate(part, CPU) for part in parts], divergence, [])
    assert (found - whole).norm() <= 3e-6 * whole.norm()


@pytest.mark.parametrize("leaves_out", [False, True])
def test_recomputed_behavior_is_the_learners_at_the_temperature_of_the_rollout(
    leaves_out: bool,
) -> None:
    """And over the ids that take part."""
    model = tiny_student()
    rng = np.random.default_rng(0)
    rollouts = [random_rollout(rng, num_response=n) for n in (6, 2, 4)]
    said = [(r.response_ids, r.student_topk_ids, r.teacher.topk_ids) for r in rollouts]
    held = {int(i) for arrays in said for array in arrays for i in array.flat}
    unsaid = sorted(set(range(VOCAB_SIZE)) - held) if leaves_out else []
    changed = recompute_behavior(
        model,
        rollouts,
        micro_batch_tokens=16,
        temperature=0.7,
        device=CPU,
        excluded_ids=ranges_of(unsaid),
    )  # two rollouts in one pass, one alone
    assert bool(unsaid) is leaves_out
    by_prompt = {r.prompt.token_ids.tobytes(): r for r in changed}
    for rollout in rollouts:
        got = by_prompt[rollout.prompt.token_ids.tobytes()]
        sequence = np.concatenate([rollout.prompt.token_ids, rollout.response_ids])
        with torch.no_grad():
            logits = model(torch.from_numpy(sequence).long()[None]).logits[0] / 0.7
            logits[:, unsaid] = -torch.inf
        expected = logits.log_softmax(-1)[len(rollout.prompt.token_ids) - 1 : -1].numpy()
        rows = np.arange(len(rollout))
        # 1e-5 nats: the same float32 sums in other shapes.
        assert np.allclose(got.behavior_logprobs, expected[rows, rollout.response_ids], atol=1e-5)
        topk = np.take_along_axis(expected, rollout.student_topk_ids.astype(np.int64), axis=1)
        assert np.allclose(got.student_topk_logprobs, topk, atol=1e-5)
        at_teacher = got.behavior_logprobs_at_teacher_topk
        assert at_teacher is not None
        teacher_ids = rollout.teacher.topk_ids.astype(np.int64)
        topk = np.take_along_axis(expected, teacher_ids, axis=1)
        assert np.allclose(at_teacher, topk, atol=1e-5)
        assert np.array_equal(got.teacher.token_logprobs, rollout.teacher.token_logprobs)


def test_student_that_has_diverged_is_a_typed_error() -> None:
    model = tiny_student()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    batch = collate([random_rollout(np.random.default_rng(0))], CPU)
    with pytest.raises(NonFiniteLossError, match="student"):
        batch.loss_inputs(batch.forward(model, temperature=1.0))
