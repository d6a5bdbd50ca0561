"""All arms by name, and the life of those that a benchmark runs."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from benchmarks.arms.base import Arm, Job, Setup
from benchmarks.arms.driftline import Driftline
from benchmarks.arms.trl_client import TrlClient, TrlClientVllm
from benchmarks.arms.vllm_server import VllmOpenai, VllmOpenaiCached, VllmTokenIds
from benchmarks.arms.worker import CACHED, Worker
from benchmarks.measuring import Measured, Run, Sample, interleave
from benchmarks.processes import first_line
from benchmarks.progress import Progress

CLOSE_LIMIT_S = 60.0
CLIENTS = ("trl_client", "trl_client_vllm")
"""TRL's client, against us and against vLLM."""


def names(block_sizes: Sequence[int]) -> list[str]:
    """Every arm; vLLM's best hidden setting comes in several block sizes."""
    cached = [f"{CACHED}{size}" for size in block_sizes]
    servers = ["driftline", "vllm_openai", "vllm_openai_cached", "vllm_token_ids"]
    return [*servers, *cached, "transformers", "floor"]


def rivals(arms: Sequence[str]) -> list[str]:
    """The ways to use vLLM among some arms."""
    return [name for name in arms if name.startswith("vllm_")]


def made(name: str, setup: Setup) -> Arm:
    """An arm, not started. Raises ValueError for a name that is none."""
    servers: dict[str, type[Arm]] = {
        "driftline": Driftline,
        "vllm_openai": VllmOpenai,
        "vllm_openai_cached": VllmOpenaiCached,
        "vllm_token_ids": VllmTokenIds,
        "trl_client": TrlClient,
        "trl_client_vllm": TrlClientVllm,
    }
    if name in servers:
        return servers[name](setup)
    if name in ("transformers", "floor") or name.removeprefix(CACHED).isdigit():
        return Worker(name, setup, _DESCRIPTIONS.get(name, _CACHED_DESCRIPTION))
    raise ValueError(f"no arm is called {name!r}; there are {', '.join([*names([32]), *CLIENTS])}")


_DESCRIPTIONS = {
    "transformers": "teacher_server's HfEngine as a library in a process of its own: one KV cache "
    "per response, one query at a time, the same rows, no server",
    "floor": "vLLM's own embedding runner on the same checkpoint through AsyncLLM.encode in a "
    "process of its own: no LM head, the pooler returns the last token's hidden state, each text "
    "one prompt whatever the pieces, no prefix cache, no server",
}
_CACHED_DESCRIPTION = (
    "AsyncLLM.generate in a process of its own, no HTTP: prompt_logprobs=K, "
    "skip_reading_prefix_cache=False, flat_logprobs, no detokenisation, new rows to numpy. Rows "
    "whose tokens were cached are uninitialised memory, the first of a piece that follows a whole "
    "block among them"
)


async def compared(
    chosen: Sequence[str],
    common: Setup,
    jobs: Mapping[str, Job],
    *,
    repeats: int,
    said: Callable[[str], None],
    progress: Progress,
) -> dict[str, Measured]:
    """Runs every arm on every job, interleaved; results by the arm's name + the job's suffix."""
    arms = {name: made(name, common) for name in chosen}
    cells = {f"{name}{suffix}": (name, suffix) for suffix in jobs for name in chosen}
    found = {
        cell: Measured(description=arms[name].description) for cell, (name, _) in cells.items()
    }
    progress.restore(found)
    async with started(arms, said) as errors:
        for cell, (name, _) in cells.items():
            found[cell].error = errors.get(name)
        calls = {
            cell: _runs(arms[name], cell, jobs[suffix]) for cell, (name, suffix) in cells.items()
        }
        await interleave(
            calls, found, repeats=repeats, said=said, kept=lambda: progress.keep(found)
        )
    return found


@asynccontextmanager
async def started(
    arms: Mapping[str, Arm], said: Callable[[str], None]
) -> AsyncIterator[dict[str, str]]:
    """Starts the arms one after another; yields the errors of those that did not. Ends them all."""
    errors: dict[str, str] = {}
    try:
        for name, arm in arms.items():
            said(f"starting {name}")
            try:
                await arm.start()
            except Exception as error:  # noqa: BLE001 - that an arm cannot start is its result
                errors[name] = f"did not start: {first_line(error)}"
                said(f"{name} {errors[name]}")
                await _ended(arm)
        yield errors
    finally:
        for arm in arms.values():
            await _ended(arm)


async def _ended(arm: Arm) -> None:
    """Closing is bounded; what an arm's process does not do in time is done by killing it."""
    with suppress(TimeoutError, OSError):
        async with asyncio.timeout(CLOSE_LIMIT_S):
            await arm.close()


def _runs(arm: Arm, cell: str, job: Job) -> Run:
    """What the measurement calls: other texts every time, or their prefixes would be cached. To
    warm up, the first two pieces of two texts do."""

    async def once(repeat: int) -> Sample:
        asked = replace(job, seed=zlib.crc32(f"{cell} {repeat}".encode()))
        if repeat < 0:
            short = min(job.response, 2 * job.piece)
            asked = replace(asked, response=short, texts=min(job.texts, 2))
        outcome = await arm.run(asked)
        figures = {
            f"{name}_per_row": value / outcome.rows for name, value in outcome.figures.items()
        }
        figures["rows_per_s"] = outcome.rows / outcome.seconds
        return Sample(seconds=outcome.seconds, figures=figures)

    return once
