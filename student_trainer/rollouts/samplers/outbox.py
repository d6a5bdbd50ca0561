"""What rows have said since they were last handed out, and the numbers that they will be drawn by.

Legend: S = slots, I = tokens handed out at once, J = student top-k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from student_trainer.records import Delta, Finish
from student_trainer.rollouts.samplers.sampling import Drawn, Uniforms

Where = NDArray[np.int64] | slice


class Outbox:
    """A few columns a row, filled a token at a time for all rows at once."""

    def __init__(self, num_slots: int, stream_interval: int) -> None:
        shape = (num_slots, stream_interval)
        self._uniforms = np.zeros(shape, np.float64)
        self._token_ids = np.zeros(shape, np.int32)
        self._logprobs = np.zeros(shape, np.float32)
        self._topk_ids = np.zeros((*shape, 0), np.int32)
        self._topk_logprobs = np.zeros((*shape, 0), np.float32)
        self._filled = np.zeros(num_slots, np.int64)

    def make_room(self, num_topk: int) -> None:
        """For so many ids a token."""
        missing = num_topk - self._topk_ids.shape[2]
        if missing > 0:
            wider = ((0, 0), (0, 0), (0, missing))
            self._topk_ids = np.pad(self._topk_ids, wider)
            self._topk_logprobs = np.pad(self._topk_logprobs, wider)

    def refill(self, slot: int, uniforms: Uniforms) -> None:
        """The numbers of a row's next tokens; it has nothing to hand out."""
        self._uniforms[slot] = uniforms.take(self._uniforms.shape[1]).numpy()
        self._filled[slot] = 0

    def uniforms(self, where: Where) -> NDArray[np.float64]:
        """[rows] of their next tokens."""
        rows = np.arange(len(self._filled))[where]
        numbers: NDArray[np.float64] = self._uniforms[rows, self._filled[rows]]
        return numbers

    def put(self, where: Where, drawn: Drawn) -> NDArray[np.int64]:
        """Takes a token of each of these rows, on the CPU; returns their ids."""
        rows = np.arange(len(self._filled))[where]
        columns, num_topk = self._filled[rows], drawn.topk_ids.shape[-1]
        token_ids: NDArray[np.int64] = drawn.token_ids.numpy()
        self._token_ids[rows, columns] = token_ids
        self._logprobs[rows, columns] = drawn.logprobs.numpy()
        self._topk_ids[rows, columns, :num_topk] = drawn.topk_ids.numpy()
        self._topk_logprobs[rows, columns, :num_topk] = drawn.topk_logprobs.numpy()
        self._filled[rows] += 1
        return token_ids

    def full(self, num_rows: int) -> list[int]:
        """Of the first rows, those that must hand out before they say more."""
        found: list[int] = np.flatnonzero(
            self._filled[:num_rows] == self._token_ids.shape[1]
        ).tolist()
        return found

    def said(self, slot: int) -> NDArray[np.int32]:
        """What a row has that was not handed out."""
        return self._token_ids[slot, : self._filled[slot]]

    def take(self, slot: int, num_topk: int, finish: Finish | None) -> Delta:
        """What a row has said since the last time."""
        filled = self._filled[slot]
        self._filled[slot] = 0
        return Delta(
            token_ids=self._token_ids[slot, :filled].copy(),
            logprobs=self._logprobs[slot, :filled].copy(),
            topk_ids=self._topk_ids[slot, :filled, :num_topk].copy(),
            topk_logprobs=self._topk_logprobs[slot, :filled, :num_topk].copy(),
            finish=finish,
        )

    def move(self, origin: int, to: int) -> None:
        """A row into another slot."""
        for array in (
            self._uniforms,
            self._token_ids,
            self._logprobs,
            self._topk_ids,
            self._topk_logprobs,
            self._filled,
        ):
            array[to] = array[origin]
