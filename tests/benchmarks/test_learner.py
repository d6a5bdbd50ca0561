"""The learner's benchmark at a tiny size: pytest tests/benchmarks/test_learner.py"""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch import Tensor

from benchmarks import learner, learner_child, learner_growth
from benchmarks.measuring import Measured, Sample
from tests.rounds import in_the_long_round

ON_CPU = [name for name in learner_child.HEADS if name != "liger"]
SIZES = ["--rows", "40", "--vocab", "300", "--hidden", "16", "--device", "cpu"]


def gradients(arm: str) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(9000, 16, generator=draw).requires_grad_()
    hidden = torch.randn(20, 16, generator=draw).requires_grad_()
    weight.grad, hidden.grad = torch.ones_like(weight), torch.ones_like(hidden)
    ids = torch.randint(9000, (20, learner_child.IDS), generator=draw)
    factor = torch.randn(20, learner_child.IDS, generator=draw)
    learner_child.HEADS[arm](weight, hidden, ids, factor)
    return [weight.grad - 1, hidden.grad - 1]


@pytest.mark.parametrize("arm", ON_CPU[1:])
def test_every_arm_does_the_same_work(arm: str) -> None:
    for ours, naive in zip(gradients(arm), gradients("naive"), strict=True):
        assert (ours - naive).abs().max() <= 1e-5 * naive.abs().max()


def test_a_child_measures_and_an_arm_that_fails_says_why() -> None:
    sample = asyncio.run(learner.measurement(["head", "--arm", "driftline", *SIZES])(0))
    assert sample.seconds > 0
    assert sample.figures.keys() == {"cpu_seconds", "extra_gib"}
    with pytest.raises(RuntimeError, match=r"exit code 2: .*invalid choice"):
        asyncio.run(learner.measurement(["head", "--arm", "none"])(0))


def test_the_head_never_holds_all_logits() -> None:
    sizes = {"rows": 512, "vocab": 131_072, "hidden": 16}
    found = learner_child.head("driftline", **sizes, device="cpu")  # type: ignore[arg-type]
    all_logits_gib = 512 * 131_072 * 4 / 2**30
    assert found["extra_gib"] < all_logits_gib / 4


@pytest.mark.parametrize("arm", learner.LEARNERS)
def test_a_whole_student_is_measured(arm: str) -> None:
    found = learner_child.learner(arm, sequences=2, tokens=32, shape="tiny", device="cpu")
    assert found["positions_per_s"] == pytest.approx(64 / found["seconds"])


def test_ratios_are_of_medians_and_none_without_an_arm() -> None:
    def arm(seconds: float, gib: float) -> Measured:
        figures = {"cpu_seconds": 2 * seconds, "extra_gib": gib}
        return Measured(samples=[Sample(seconds=seconds, figures=figures)])

    arms = {"head_naive": arm(2.0, 3.0), "head_driftline": arm(2.2, 0.1)}
    found = learner.ratios(arms)
    assert found["naive_head_peak_over_driftline"] == pytest.approx(30)
    assert found["driftline_head_seconds_over_naive"] == pytest.approx(1.1)
    assert found["driftline_head_peak_over_liger"] is None
    assert found["checkpointing_peak_over_plain"] is None


def test_arms_of_a_cpu_are_without_liger() -> None:
    words = ["--device", "cpu", "--quick"]
    arguments = learner.settle(learner.parser().parse_args(words))
    assert arguments.rows == 2048
    assert list(learner.runs(arguments)) == [
        *(f"head_{name}" for name in ON_CPU),
        *(f"learner_{name}" for name in learner.LEARNERS),
    ]


def test_growth_is_of_every_axis_and_none_where_a_run_failed() -> None:
    arms = {
        f"tokens_{n}": Measured(description="", samples=[Sample(seconds=n / 100)])
        for n in (100, 200, 400)
    }
    arms |= {"rank_8": Measured(description="", error="no memory")}
    found = learner_growth.grown(arms, {"tokens": (100, 200, 400), "rank": (8,)})
    assert found["tokens"]["exponent"] == 1.0
    assert found["tokens"]["tokens_per_s"] == {100: 100.0, 200: 100.0, 400: 100.0}
    assert found["rank"] == {"seconds": {}, "tokens_per_s": {}, "exponent": None}


@in_the_long_round
@pytest.mark.parametrize("processes", [1, 2])
def test_an_update_is_measured_alone_and_on_two_processes(processes: int) -> None:
    run = learner_growth.measurement(processes=processes, rank=4, sequences=2, tokens=128)
    sample = asyncio.run(run(0))
    assert sample.figures["tokens_per_s"] == pytest.approx(256 / sample.seconds)
