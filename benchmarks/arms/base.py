"""What every arm is asked to do, and with what.

Legend: P = prompt tokens, T = response tokens, K = top-k and candidates a row.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The same for every arm of a benchmark."""

    model: str
    """Folder of the checkpoint."""
    vocab_size: int
    dtype: str = "bfloat16"
    """Arithmetic of the model in every arm."""
    k: int = 32
    max_context: int = 2048
    max_num_batched_tokens: int = 4096
    kv_cache_gib: float = 1.0
    cores: str = "auto"
    """As in the teacher's settings: "0,1", or "auto" on a GPU."""
    eager: bool = False
    """Without compiled graphs."""
    block_size: int = 32
    """Tokens a cache block of our server."""
    vllm_executor: str = "core"
    """"core" runs vLLM's model as we do, in its engine core; "default" as vLLM chooses to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`texts` random texts at once, each scored `piece` response tokens at a time."""

    seed: int
    prompt: int
    """P, not scored."""
    response: int
    """T"""
    piece: int
    texts: int = 1

    def pieces(self) -> list[tuple[int, int]]:
        """Where each piece of a response starts and ends."""
        ends = [*range(self.piece, self.response, self.piece), self.response]
        return list(pairwise([0, *ends]))


@dataclass(frozen=True, slots=True)
class Text:
    """Ids drawn at random: what an engine does with them costs the same whatever they are."""

    prompt_ids: NDArray[np.int32]
    """[P]"""
    response_ids: NDArray[np.int32]
    """[T]"""
    candidate_ids: NDArray[np.int32]
    """[T, K] distinct in a row, as a student's top-k is."""

    def upto(self, end: int) -> NDArray[np.int32]:
        """The prompt and `end` response tokens."""
        return np.concatenate([self.prompt_ids, self.response_ids[:end]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a job took."""

    seconds: float
    rows: int
    figures: dict[str, float] = field(default_factory=dict)


def made_texts(job: Job, *, vocab_size: int, k: int) -> list[Text]:
    """The texts of a job; the same job gives the same texts."""
    rng = np.random.default_rng(job.seed)
    stride = vocab_size // k
    texts = []
    for _ in range(job.texts):
        ids = rng.integers(2, vocab_size, job.prompt + job.response, dtype=np.int32)
        # One draw from each of K equal ranges of the vocabulary, in random order.
        draws = rng.integers(0, stride, (job.response, k)) + np.arange(k) * stride
        candidate_ids = rng.permuted(draws.astype(np.int32), axis=1)
        texts.append(Text(ids[: job.prompt], ids[job.prompt :], candidate_ids))
    return texts


class Arm(ABC):
    """One way to score. The clock runs from the first request of a job to its last rows."""

    description = ""
    """What exactly is measured."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.figures: dict[str, float] = {}
        """Of the job in hand."""

    @abstractmethod
    async def start(self) -> None:
        """Brings the engine up; raises whatever prevents that."""

    @abstractmethod
    async def close(self) -> None:
        """Ends all that was started; harmless when nothing was."""

    async def grow(self, text: Text, pieces: list[tuple[int, int]]) -> int:
        """Scores a response piece by piece, each when the one before is answered: rows received."""
        rows = 0
        for start, end in pieces:
            rows += await self.score(text, start, end)
        return rows

    async def score(self, text: Text, start: int, end: int) -> int:
        """The rows of response tokens start..end; for arms without a `grow` of their own."""
        raise NotImplementedError

    async def run(self, job: Job) -> Outcome:
        """Does a job. Raises ValueError when rows are missing."""
        texts = made_texts(job, vocab_size=self.setup.vocab_size, k=self.setup.k)
        self.figures = {}
        started = time.perf_counter()
        rows = sum(await asyncio.gather(*(self.grow(text, job.pieces()) for text in texts)))
        seconds = time.perf_counter() - started
        if rows != job.texts * job.response:
            raise ValueError(f"{rows} rows instead of {job.texts * job.response}")
        return Outcome(seconds=seconds, rows=rows, figures=self.figures)

    def count(self, name: str, value: float) -> None:
        """Adds to a figure of the job."""
        self.figures[name] = self.figures.get(name, 0.0) + value
