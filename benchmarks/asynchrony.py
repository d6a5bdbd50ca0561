"""What it is worth to generate ahead of the learner: seconds a step and staleness, by its bound.

Sampler and learner only wait, so that the stream alone is measured: with nothing else to pay for, a
learner that never waits for the sampler halves the time of a step. Rollouts last alike, or are
long-tailed: an exponential distribution of the same mean. Arms are interleaved in one run.

    python -m benchmarks.asynchrony
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import ROOT, provenance
from student_trainer.data import PromptOrder
from student_trainer.records import Delta, Finish, Prompt, SamplingOptions
from student_trainer.rollouts.budget import FixedBudget
from student_trainer.rollouts.rollout import RolloutRules
from student_trainer.rollouts.samplers.base import Weights
from student_trainer.rollouts.stream import LoopThread, RolloutStream
from student_trainer.settings.budget import FixedBudgetSettings
from student_trainer.special_tokens import SpecialTokens
from teacher_wire.records import DriftState, ScoreRows, Scores, Timing, TokenSpan, Verdict

STALENESS = (0, 1, 2, 4)
LENGTHS = ("alike", "long-tailed")
WAIT_S = 0.25
"""Of a rollout in the mean, and of the learner for its updates."""
NUM_STEPS, NUM_ROLLOUTS, NUM_TOKENS = 16, 8, 4


class WaitingSampler:
    """A rollout takes as long as its seed says, however many there are."""

    def __init__(self, lengths: str) -> None:
        self._lengths = lengths

    async def start(self) -> None:
        """Nothing to load."""

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        share = np.random.default_rng(options.seed).exponential()
        await asyncio.sleep(WAIT_S * (share if self._lengths == "long-tailed" else 1.0))
        yield Delta(
            token_ids=np.ones(NUM_TOKENS, np.int32),
            logprobs=np.zeros(NUM_TOKENS, np.float32),
            topk_ids=np.zeros((NUM_TOKENS, 0), np.int32),
            topk_logprobs=np.zeros((NUM_TOKENS, 0), np.float32),
            finish=Finish.STOP,
        )

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Nothing runs on."""

    def make_room(self, num_bytes: int, say: Callable[[str], None]) -> None:
        """None is needed."""

    async def sleep(self) -> None:
        """It does not."""

    async def load_weights(self, weights: Weights) -> None:
        """There are none."""

    async def close(self) -> None:
        """Nothing to free."""


class InstantSession:
    """A teacher that has scored before it was asked."""

    async def append(self, span: TokenSpan) -> Scores:
        rows = ScoreRows(
            offset=span.offset,
            topk_ids=np.zeros((len(span), 1), np.int32),
            topk_logprobs=np.zeros((len(span), 1), np.float32),
            token_logprobs=np.zeros(len(span), np.float32),
        )
        return Scores(
            rows=rows,
            drift=DriftState(),
            verdict=Verdict.CONTINUE,
            keep_tokens=None,
            timing=Timing(),
        )

    async def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What one run came to, without its first step, before which nothing was generated."""

    step_s: float
    """Seconds a step."""
    mean_staleness: float
    """Optimiser rounds between the weights that began a rollout and those that learn from it."""
    max_staleness: int
    """Of all rollouts."""


def run(staleness: int, lengths: str) -> Steps:
    """The loop of train.py, with a learner that sleeps."""
    prompts = [
        Prompt(prompt_id=str(i), text="", token_ids=np.array([i + 1], np.int32), answer=None)
        for i in range(NUM_ROLLOUTS)
    ]
    with closing(LoopThread()) as loop:
        stream = RolloutStream(
            loop=loop,
            sampler=WaitingSampler(lengths),
            open_session=lambda _: InstantSession(),
            prompts=PromptOrder(prompts, prompts_per_step=NUM_ROLLOUTS, seed=0),
            rules={
                None: RolloutRules(
                    chunk_tokens=NUM_TOKENS,
                    max_span_tokens=NUM_TOKENS,
                    block_tokens=1,
                    specials=SpecialTokens((), first_only=True),
                    finish_when_absent=False,
                )
            },
            budget=FixedBudget(FixedBudgetSettings(max_tokens=NUM_TOKENS)),
            options=lambda max_tokens: SamplingOptions(max_tokens=max_tokens),
            rollouts_per_prompt=1,
            max_staleness=staleness,
            seed=0,
            num_steps=NUM_STEPS + 1,
        )
        started, ages = 0.0, []
        for step in range(NUM_STEPS + 1):
            taken = stream.take_step()
            ages += [step - rollout.policy_version for rollout in taken.rollouts if step]
            time.sleep(WAIT_S)
            stream.use_version(step + 1)
            started = started or time.monotonic()
        took_s = time.monotonic() - started
    return Steps(step_s=took_s / NUM_STEPS, mean_staleness=mean(ages), max_staleness=max(ages))


def main() -> None:
    """Runs the arms in turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench-asynchrony.json")
    arguments = parser.parse_args()
    arms = [(staleness, lengths) for lengths in LENGTHS for staleness in STALENESS]
    runs: dict[tuple[int, str], list[Steps]] = {arm: [] for arm in arms}
    for repeat in range(arguments.repeats):
        turn = repeat % len(arms)
        for arm in (*arms[turn:], *arms[:turn]):
            runs[arm].append(run(*arm))
    medians = {arm: median(steps.step_s for steps in runs[arm]) for arm in arms}
    table = Table(title=f"sampler and learner wait {WAIT_S} s each, {arguments.repeats} runs")
    for name in ("rollouts", "max_staleness", "mean", "most", "s a step", "of 0"):
        table.add_column(name, justify="right")
    for arm in arms:
        staleness, lengths = arm
        table.add_row(
            lengths,
            str(staleness),
            f"{mean(steps.mean_staleness for steps in runs[arm]):.2f}",
            str(max(steps.max_staleness for steps in runs[arm])),
            f"{medians[arm]:.3f}",
            f"{medians[arm] / medians[0, lengths]:.2f}",
        )
    Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "made": provenance(),
        "wait_s": WAIT_S,
        "arms": {
            f"{lengths}, {staleness}": [asdict(steps) for steps in runs[staleness, lengths]]
            for staleness, lengths in arms
        },
    }
    arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
