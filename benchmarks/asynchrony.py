"""What a queue of rollouts is worth: seconds a step and staleness, by its depth.

Sampler and learner only wait, equally long, so that the queue alone is measured: with nothing else
to pay for, a learner that never waits for the sampler halves the time of a step. Depths beyond 1
are refused by the settings; they are measured here to show why. Arms are interleaved in one run.

    python -m benchmarks.asynchrony
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

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

DEPTHS = (0, 1, 2, 4)
WAIT_S = 0.25
"""Of the sampler for the rollouts of a step, and of the learner for its updates."""
NUM_STEPS, NUM_ROLLOUTS, NUM_TOKENS = 8, 8, 4


class WaitingSampler:
    """Every rollout takes as long, however many there are."""

    async def start(self) -> None:
        """Nothing to load."""

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        await asyncio.sleep(WAIT_S)
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
    """What one run of one depth came to."""

    step_s: float
    """Seconds a step, without the first, which fills the queue."""
    staleness: int
    """Optimiser rounds between the weights that sampled and those that learn, at the last step."""


def run(depth: int) -> Steps:
    """The loop of train.py, with a learner that sleeps."""
    prompts = [
        Prompt(prompt_id=str(i), text="", token_ids=np.array([i + 1], np.int32), answer=None)
        for i in range(NUM_ROLLOUTS)
    ]
    with closing(LoopThread()) as loop:
        stream = RolloutStream(
            loop=loop,
            sampler=WaitingSampler(),
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
            queue_depth=depth,
            seed=0,
            num_steps=NUM_STEPS + 1,
        )
        started = 0.0
        for step in range(NUM_STEPS + 1):
            taken = stream.take(stream.rollouts_per_step)
            time.sleep(WAIT_S)
            stream.wait_until_idle()
            stream.policy_version = step + 1
            started = started or time.monotonic()
        took_s = time.monotonic() - started
    oldest = min(rollout.policy_version for rollout in taken.rollouts)
    return Steps(step_s=took_s / NUM_STEPS, staleness=NUM_STEPS - oldest)


def main() -> None:
    """Runs the depths in turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench-asynchrony.json")
    arguments = parser.parse_args()
    runs: dict[int, list[Steps]] = {depth: [] for depth in DEPTHS}
    for repeat in range(arguments.repeats):
        turn = repeat % len(DEPTHS)
        for depth in (*DEPTHS[turn:], *DEPTHS[:turn]):
            runs[depth].append(run(depth))
    medians = {depth: median(steps.step_s for steps in runs[depth]) for depth in DEPTHS}
    table = Table(title=f"sampler and learner wait {WAIT_S} s each, {arguments.repeats} runs")
    for name in ("depth", "staleness", "s a step", "of depth 0"):
        table.add_column(name, justify="right")
    for depth in DEPTHS:
        stale, ratio = runs[depth][0].staleness, medians[depth] / medians[0]
        table.add_row(str(depth), str(stale), f"{medians[depth]:.3f}", f"{ratio:.2f}")
    Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "made": provenance(),
        "wait_s": WAIT_S,
        "arms": {
            depth: {"step_s": [s.step_s for s in steps], "staleness": steps[0].staleness}
            for depth, steps in runs.items()
        },
    }
    arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
