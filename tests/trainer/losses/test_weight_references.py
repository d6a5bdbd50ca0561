"""Every weight against a slow, obvious version."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.losses.prefix_weights import annealed_share
from student_trainer.losses.spans import newline_spans
from student_trainer.losses.weight_choice import (
    BlockGate,
    EntropyTop,
    ImportanceRatio,
    PositionWeight,
    PositionWindow,
    PrefixImportanceWeight,
    PruneWeight,
)
from student_trainer.losses.weights import entropy_top_weights
from tests.trainer.made_responses import (
    NEWLINE_ID,
    Response,
    collate,
    random_response,
    random_responses,
)

torch.set_num_threads(1)

law = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)

Slow = Callable[[Response], list[float]]
"""Weights of the valid tokens of one response, in plain Python."""


def numbers(response: Response, name: str) -> list[float]:
    """A field at the valid tokens."""
    values: list[float] = getattr(response, name).detach()[response.mask_T].tolist()
    return values


def advantages(response: Response, max_gap: float = math.inf) -> list[float]:
    pairs = zip(numbers(response, "teacher_T"), numbers(response, "behavior_T"), strict=True)
    return [max(-max_gap, min(max_gap, teacher - behavior)) for teacher, behavior in pairs]


def drifts(response: Response) -> list[float]:
    pairs = zip(numbers(response, "student_T"), numbers(response, "behavior_T"), strict=True)
    return [student - behavior for student, behavior in pairs]


def mean_one(weights: list[float]) -> list[float]:
    return [weight * len(weights) / sum(weights) for weight in weights]


def slow_remaining(response: Response, max_gap: float = math.inf) -> list[float]:
    gaps = [abs(a) for a in advantages(response, max_gap)]
    return [1 - sum(gaps[:t]) / (sum(gaps) + 1e-8) for t in range(len(gaps))]


def slow_cumulative(response: Response, max_gap: float = math.inf) -> list[float]:
    return [1 + 0.5 * share for share in slow_remaining(response, max_gap)]


def slow_signed(response: Response) -> list[float]:
    signed = advantages(response)
    found = []
    for t in range(len(signed)):
        remaining = 1 - sum(signed[:t]) / sum(signed)
        found.append(1 + 0.5 * min(1.0, max(0.0, remaining)))
    return found


def slow_linear(response: Response) -> list[float]:
    length = len(advantages(response))
    return [1 + 0.5 * (1 - t / length) for t in range(length)]


def slow_fixed_prefix(response: Response) -> list[float]:
    length = len(advantages(response))
    return [1.5 if 10 * t < 3 * length else 1.0 for t in range(length)]


def slow_ratio(response: Response) -> list[float]:
    signed = advantages(response)
    return [math.exp(0.3 * sum(signed[:t])) for t in range(len(signed))]


def slow_blend(response: Response) -> list[float]:
    return [1 + 0.5 * share for share in mean_one(slow_ratio(response))]


def slow_causal(response: Response) -> list[float]:
    gaps = [abs(a) for a in advantages(response)]
    return [1 + 0.5 * math.exp(-sum(gaps[:t]) / 5.0) for t in range(len(gaps))]


def slow_prune(response: Response) -> list[float]:
    events = numbers(response, "bad_events_T")
    return [max(0.0, 1 - 0.1 * sum(events[: t + 1])) + 0.5 for t in range(len(events))]


def slow_window(response: Response) -> list[float]:
    length = len(advantages(response))
    return [1.0 if 2 * length <= 10 * t < 7 * length else 0.0 for t in range(length)]


def slow_entropy_top(response: Response) -> list[float]:
    entropies = numbers(response, "entropies_T")
    if not entropies:
        return []
    lowest = sorted(entropies, reverse=True)[max(1, len(entropies) // 5) - 1]
    return [1.0 if entropy >= lowest else 0.0 for entropy in entropies]


def slow_spans(ids: list[int], min_span: int, max_span: int, block_size: int) -> list[list[int]]:
    """Positions of the valid tokens, by span."""
    positions = list(range(len(ids)))
    if NEWLINE_ID not in ids:
        return [positions[i : i + block_size] for i in range(0, len(ids), block_size)]
    lines: list[list[int]] = [[]]
    for position in positions:
        lines[-1].append(position)
        if ids[position] == NEWLINE_ID:
            lines.append([])
    joined: list[list[int]] = [[]]
    for line in lines:
        joined[-1] = joined[-1] + line
        if len(joined[-1]) >= min_span:
            joined.append([])
    last = joined.pop()
    if joined:
        joined[-1] += last
    else:
        joined = [last]
    spans = []
    for span in joined:
        num_parts = math.ceil(len(span) / max_span)
        for part in range(num_parts):
            start, end = (len(span) * k // num_parts for k in (part, part + 1))
            spans.append(span[start:end])
    return spans


def slow_gate(spans_of: Callable[[Response], list[list[int]]], aggregate: str) -> Slow:
    def weigh(response: Response) -> list[float]:
        drift = drifts(response)
        found = [math.nan] * len(drift)
        for span in spans_of(response):
            inside = [drift[t] for t in span]
            if aggregate == "signed_mean":
                shift = abs(sum(inside) / len(inside))
            elif aggregate == "mean_abs":
                shift = sum(abs(d) for d in inside) / len(inside)
            else:
                shift = math.sqrt(sum(d * d for d in inside) / len(inside))
            for t in span:
                found[t] = math.exp(-0.7 * shift)
        return found

    return weigh


def blocks(size: int) -> Callable[[Response], list[list[int]]]:
    def split(response: Response) -> list[list[int]]:
        positions = list(range(int(response.mask_T.sum())))
        return [positions[i : i + size] for i in range(0, len(positions), size)]

    return split


def lines(response: Response) -> list[list[int]]:
    return slow_spans(response.ids_T[response.mask_T].tolist(), 2, 5, 3)


def slow_importance(response: Response, *, mask: bool, granularity: str) -> list[float]:
    drift = drifts(response)
    ratios = [math.exp(d) for d in drift]
    if granularity != "token" and ratios:
        root = 1 / len(ratios) if granularity == "geometric" else 1
        ratios = [math.prod(ratios) ** root] * len(ratios)
    if mask:
        return [ratio if 0.5 <= ratio <= 2.0 else 0.0 for ratio in ratios]
    return [min(ratio, 2.0) for ratio in ratios]


NEWLINE = {"newline_ids": (NEWLINE_ID,), "min_span": 2, "max_span": 5, "block_size": 3}
CASES: list[tuple[PositionWeight, Slow]] = [
    (PruneWeight(w_drop=0.1), slow_prune),
    (PrefixImportanceWeight(), slow_cumulative),
    (PrefixImportanceWeight(max_gap_nats=0.5), lambda r: slow_cumulative(r, 0.5)),
    (PrefixImportanceWeight(normalize="sample_mean"), lambda r: mean_one(slow_cumulative(r))),
    (PrefixImportanceWeight(kind="signed"), slow_signed),
    (PrefixImportanceWeight(kind="linear"), slow_linear),
    (PrefixImportanceWeight(kind="fixed_prefix"), slow_fixed_prefix),
    (PrefixImportanceWeight(kind="surrogate_only"), slow_remaining),
    (PrefixImportanceWeight(kind="ideal_ratio", alpha=0.3), slow_ratio),
    (PrefixImportanceWeight(kind="ideal_blend", alpha=0.3), slow_blend),
    (PrefixImportanceWeight(kind="causal", tau_nats=5.0), slow_causal),
    (PositionWindow(start_share=0.2, end_share=0.7), slow_window),
    (EntropyTop(ratio=0.2), slow_entropy_top),
    *(
        (
            BlockGate(granularity=granularity, tau=0.7, aggregate=aggregate, **constants),
            slow_gate(spans_of, aggregate),
        )
        for granularity, constants, spans_of in (
            ("block", {"block_size": 4}, blocks(4)),
            ("token", {}, blocks(1)),
            ("sequence", {}, blocks(10**6)),
            ("newline", NEWLINE, lines),
        )
        for aggregate in ("signed_mean", "mean_abs", "rms")
    ),
    *(
        (
            ImportanceRatio(
                mode=mode,
                granularity=granularity,
                max_ratio=2.0,
                **({"min_ratio": 0.5} if mode == "mask" else {}),
            ),
            lambda r, m=mode == "mask", g=granularity: slow_importance(r, mask=m, granularity=g),
        )
        for mode in ("truncate", "mask")
        for granularity in ("token", "sequence", "geometric")
    ),
]


@law
@given(seed=seeds)
def test_every_weight_equals_its_slow_version(seed: int) -> None:
    responses = random_responses(seed)
    inputs = collate(responses)
    for weight, slow in CASES:
        found = weight(inputs)
        for row, response in enumerate(responses):
            valid = found[row, : len(response.mask_T)][response.mask_T]
            expected = pytest.approx(slow(response), rel=1e-6, abs=1e-7)
            assert valid.tolist() == expected, weight


@law
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    min_span=st.integers(1, 6),
    extra=st.integers(0, 6),
    block_size=st.integers(1, 9),
)
def test_newline_spans_are_of_the_asked_lengths(
    ids: list[int], min_span: int, extra: int, block_size: int
) -> None:
    max_span = 2 * min_span + extra
    ids_BT = torch.tensor([ids])
    found = newline_spans(
        ids_BT,
        torch.ones_like(ids_BT, dtype=torch.bool),
        newline_ids=[NEWLINE_ID],
        min_span=min_span,
        max_span=max_span,
        block_size=block_size,
    )[0].tolist()
    expected = slow_spans(ids, min_span, max_span, block_size)
    assert found == [number for number, span in enumerate(expected) for _ in span]
    if NEWLINE_ID in ids:
        lengths = [len(span) for span in expected]
        assert max(lengths) <= max_span
        assert min(lengths) >= min(min_span, len(ids))


def test_newline_spans_of_a_worked_example() -> None:
    ids = torch.tensor([[0, 5, 0, 0, 5, 5, 5, 5, 5, 5, 5, 0, 5]])
    settings = {"newline_ids": [0], "min_span": 2, "max_span": 4, "block_size": 64}
    mask = torch.ones_like(ids, dtype=torch.bool)
    # Token 0 is joined to the line after, so is token 3, the last token to the one before; 3 to 12
    # is cut in three.
    found = newline_spans(ids, mask, **settings)
    assert found.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]]
    # A masked newline splits nothing and a response without one has blocks.
    found = newline_spans(ids, mask & (ids != 0), **{**settings, "block_size": 5})
    assert found[ids != 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_signed_sums_that_cancel_have_no_shares() -> None:
    response = random_response(torch.Generator().manual_seed(0), 4, holes=False)
    response.teacher_T[:] = response.behavior_T.round() + torch.tensor([1.0, -1.0, 2.0, -2.0])
    response.behavior_T[:] = response.behavior_T.round()
    found = PrefixImportanceWeight(kind="signed")(collate([response], spare=0))
    assert found.tolist() == [[1.5] * 4]


def test_signed_share_of_a_worked_example_is_clamped() -> None:
    response = random_response(torch.Generator().manual_seed(0), 4, holes=False)
    response.behavior_T[:] = -9.0
    response.teacher_T[:] = -9.0 + torch.tensor([3.0, -4.0, 2.0, 1.0])
    # sums before: 0, 3, -1, 1; total 2; remaining 1, -0.5, 1.5, 0.5
    found = PrefixImportanceWeight(kind="signed")(collate([response], spare=0))
    assert found.tolist() == [[1.5, 1.0, 1.5, 1.25]]


def test_one_huge_gap_takes_no_more_than_its_bound() -> None:
    response = random_response(torch.Generator().manual_seed(0), 3, holes=False)
    response.behavior_T[:] = 0.0
    response.teacher_T[:] = torch.tensor([-5.0, -58.0, -5.0])
    plain, bounded = (
        PrefixImportanceWeight(max_gap_nats=gap)(collate([response], spare=0))[0].tolist()
        for gap in (None, 5.0)
    )
    assert plain == pytest.approx([1.5, 1 + 0.5 * 63 / 68, 1 + 0.5 * 5 / 68])
    assert bounded == pytest.approx([1.5, 1 + 0.5 * 2 / 3, 1 + 0.5 / 3])


def test_ideal_ratio_of_a_worked_example_is_bounded() -> None:
    response = random_response(torch.Generator().manual_seed(0), 3, holes=False)
    response.behavior_T[:] = torch.tensor([-1.0, -1e9, 0.0])
    response.teacher_T[:] = torch.tensor([-0.5, 0.0, 0.0])
    found = PrefixImportanceWeight(kind="ideal_ratio", alpha=0.1)(collate([response], spare=0))
    expected = [1.0, math.exp(0.05), math.exp(20)]
    assert found[0].tolist() == pytest.approx(expected)


def test_equal_entropies_are_all_kept() -> None:
    response = random_response(torch.Generator().manual_seed(0), 5, holes=False)
    response.entropies_T[:] = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0])
    found = EntropyTop(ratio=0.4)(collate([response], spare=0))
    assert found.tolist() == [[0.0, 1.0, 1.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: PositionWindow(start_share=0.5, end_share=0.5), "below the end_share 0.5"),
        (lambda: PositionWindow(start_share=-0.1, end_share=0.5), "\nstart_share\n.*to 0 .*-0.1"),
        (lambda: PositionWindow(start_share=0.0, end_share=1.1), "\nend_share\n.*to 1 .*1.1"),
        (lambda: EntropyTop(ratio=0.0), "\nratio\n.*greater than 0"),
        (lambda: PrefixImportanceWeight(kind="other"), "\nkind\n.*'cumulative', .*'other'"),  # type: ignore[arg-type]
        (lambda: PrefixImportanceWeight(normalize="x"), "\nnormalize\n.*'none', .*'x'"),  # type: ignore[arg-type]
        (lambda: PrefixImportanceWeight(kind="causal"), "needs tau_nats"),
        (lambda: PrefixImportanceWeight(kind="causal", tau_nats=0.0), "\ntau_nats\n.*than 0"),
        (lambda: PrefixImportanceWeight(max_gap_nats=0.0), "\nmax_gap_nats\n.*than 0"),
        (lambda: PrefixImportanceWeight(kind="ideal_ratio", alpha=0.0), "\nalpha\n.*than 0"),
        (
            lambda: PrefixImportanceWeight(kind="fixed_prefix", prefix_share=0.0),
            "\nprefix_share\n.*greater than 0",
        ),
        (lambda: BlockGate(granularity="line"), "\ngranularity\n.*'block', .*'line'"),  # type: ignore[arg-type]
        (lambda: BlockGate(aggregate="median"), "\naggregate\n.*'signed_mean', .*'median'"),  # type: ignore[arg-type]
        (lambda: BlockGate(granularity="newline"), "needs newline_ids"),
        (
            lambda: BlockGate(granularity="newline", newline_ids=(1,), min_span=8, max_span=15),
            "max_span is 15 and must be at least twice the min_span 8",
        ),
        (lambda: BlockGate(block_size=0), "\nblock_size\n.*greater than 0 .*0"),
        (lambda: ImportanceRatio(mode="clip"), "\nmode\n.*'truncate' or 'mask'"),  # type: ignore[arg-type]
        (lambda: ImportanceRatio(granularity="block"), "\ngranularity\n.*'token', 'sequence' or"),  # type: ignore[arg-type]
        (lambda: ImportanceRatio(mode="mask", min_ratio=2.0), "\nmin_ratio\n.*to 1 .*2.0"),
        (lambda: ImportanceRatio(max_ratio=0.5), "\nmax_ratio\n.*to 1 .*0.5"),
    ],
)
def test_impossible_constants_are_refused(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def test_entropy_top_rounds_down_and_keeps_ties() -> None:
    """17 tokens at .5 are 8, as in the released code; 9 was seen here."""
    entropies_BT = torch.arange(17.0).unsqueeze(0)
    mask_BT = torch.ones(1, 17, dtype=torch.bool)
    assert entropy_top_weights(entropies_BT, mask_BT, ratio=0.5).sum() == 8
    assert entropy_top_weights(entropies_BT[:, :3], mask_BT[:, :3], ratio=0.2).sum() == 1
    tied_BT = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    assert entropy_top_weights(tied_BT, mask_BT[:, :5], ratio=0.4).tolist() == [[1, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("progress", "share"),
    [(0.0, 0.3), (0.25, 0.3 + 0.35 * (1 - math.sqrt(0.5))), (0.5, 0.65), (1.0, 1.0)],
)
def test_an_annealed_prefix_grows_along_half_a_cosine(progress: float, share: float) -> None:
    assert annealed_share(0.3, progress) == pytest.approx(share, abs=1e-12)
    inputs = replace(collate([random_responses(1)[0]]), progress=progress)
    found = PrefixImportanceWeight(kind="annealed_prefix")(inputs)
    fixed = PrefixImportanceWeight(kind="fixed_prefix", prefix_share=share)(inputs)
    assert torch.equal(found, fixed)
