"""The student's side of a rollout: one answer, or several with turns of others between them.

A turn is ids, appended to those that were sampled; nothing sampled is ever rendered again, because
few chat templates give back the ids they were given. Knows neither vllm nor grpc.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from student_trainer.records import Delta, Finish, Prompt, SamplingOptions, last_answer_ids
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.special_tokens import SpecialTokens

_SEEDS = 2**31


class GrowingResponse:
    """The tokens of one rollout so far, with room for all it may have.

    Those of a turn stand among the sampled ones with a log-prob of 0 and the candidates of the last
    sampled one, which the teacher takes; what tells them apart is `sampled`.
    """

    def __init__(self, options: SamplingOptions, *, num_prompt: int) -> None:
        room, num_topk = options.max_tokens, options.num_topk
        self.num_prompt = num_prompt
        """What the teacher was given before the response."""
        self.token_ids = np.empty(room, np.int32)
        self.logprobs = np.empty(room, np.float32)
        self.topk_ids = np.empty((room, num_topk), np.int32)
        self.topk_logprobs = np.empty((room, num_topk), np.float32)
        self.sampled = np.ones(room, np.bool_)
        """False for the tokens of a turn."""
        self.num_tokens = 0
        self.finish: Finish | None = None
        self._grown = asyncio.Event()

    @property
    def num_sampled(self) -> int:
        """Of the tokens so far, those that are the student's."""
        return int(self.sampled[: self.num_tokens].sum())

    def extend(self, delta: Delta) -> None:
        """Adds what the sampler handed out."""
        start, end = self.num_tokens, self.num_tokens + len(delta)
        self.token_ids[start:end] = delta.token_ids
        self.logprobs[start:end] = delta.logprobs
        self.topk_ids[start:end] = delta.topk_ids
        self.topk_logprobs[start:end] = delta.topk_logprobs
        self.num_tokens = end
        self._grown.set()

    def has_room_after(self, turn_ids: NDArray[np.int32]) -> bool:
        """Whether a turn fits, and one token of an answer to it."""
        return self.num_tokens + len(turn_ids) < len(self.token_ids)

    def extend_by_turn(self, turn_ids: NDArray[np.int32]) -> None:
        """Adds what somebody else says."""
        start, end = self.num_tokens, self.num_tokens + len(turn_ids)
        self.token_ids[start:end] = turn_ids
        self.logprobs[start:end] = 0.0
        self.topk_ids[start:end] = self.topk_ids[start - 1]
        self.topk_logprobs[start:end] = 0.0
        self.sampled[start:end] = False
        self.num_tokens = end
        self._grown.set()

    def counted(self, specials: SpecialTokens, end: int) -> NDArray[np.bool_]:
        """[end] True where a token counts: the student's, and not masked as special."""
        counted = self.sampled[:end].copy()
        counted[counted] = specials.mask(self.token_ids[:end][counted])
        return counted

    def last_answer_ids(self) -> NDArray[np.int32]:
        """What the student said last."""
        end = self.num_tokens
        return last_answer_ids(self.token_ids[:end], self.sampled[:end]).copy()

    def end(self, finish: Finish) -> None:
        """No more tokens will come."""
        self.finish = finish
        self._grown.set()

    async def wait_for(self, num_tokens: int) -> int:
        """Tokens there are, once there are `num_tokens` or no more will come."""
        while self.num_tokens < num_tokens and self.finish is None:
            self._grown.clear()
            await self._grown.wait()
        return self.num_tokens


class Generation:
    """Fills a growing response: an answer to the prompt, and one to each of its turns.

    It is over when the student does not end an answer, when the budget has no room for a turn and a
    token after it, when it is stopped, and after the answer to the last turn.
    """

    def __init__(
        self, prompt: Prompt, *, request_id: str, options: SamplingOptions, sampler: Sampler
    ) -> None:
        self._prompt = prompt
        self._request_id = request_id
        self._options = options
        self._sampler = sampler
        self._stopped = False
        self.growing = GrowingResponse(options, num_prompt=len(prompt.teacher_prompt_ids))

    async def run(self) -> None:
        """Returns when no more tokens will come, of itself or because of `stop`."""
        growing, first_id, finish = self.growing, self._request_id, Finish.LENGTH
        try:
            finish = await self._answer(first_id, self._options)
            for number, turn_ids in enumerate(self._prompt.turns, 1):
                if finish is not Finish.STOP or self._stopped:
                    break
                turn_ids = self._after_the_end(turn_ids)
                if not growing.has_room_after(turn_ids):
                    finish = Finish.LENGTH
                    break
                growing.extend_by_turn(turn_ids)
                finish = await self._answer(f"{first_id}.{number}", self._rest(number))
        finally:
            growing.end(finish)

    async def stop(self) -> None:
        """Ends the generation soon."""
        self._stopped = True
        await self._sampler.abort([self._request_id])

    async def _answer(self, request_id: str, options: SamplingOptions) -> Finish:
        growing, finish = self.growing, Finish.LENGTH
        is_first = request_id == self._request_id
        self._request_id = request_id
        so_far = growing.token_ids[: growing.num_tokens]
        prompt_ids = np.concatenate([self._prompt.token_ids, so_far])
        async for delta in self._sampler.generate(request_id, prompt_ids, options):
            growing.extend(delta)
            finish = delta.finish or finish
            if self._stopped and not is_first and delta.finish is None:
                # A stop may have come before the sampler knew of this answer.
                await self._sampler.abort([request_id])
        return finish

    def _after_the_end(self, turn_ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """A turn begins with what ends an answer, which the student has said unless it ended at
        another token or at a stop string."""
        last = self.growing.token_ids[self.growing.num_tokens - 1]
        return turn_ids[1:] if len(turn_ids) and turn_ids[0] == last else turn_ids

    def _rest(self, number: int) -> SamplingOptions:
        """What is left of the budget, and a seed of its own."""
        options = self._options
        seed = None if options.seed is None else (options.seed + number) % _SEEDS
        room = options.max_tokens - self.growing.num_tokens
        return replace(options, max_tokens=room, seed=seed)
