"""Continuous batching over one transformers model: rows that come and go, one forward pass a step.

A request joins at any step: the keys and values of its prompt but for the last token are computed,
together with those of others that join, and once for all that have the same prompt; the last token
is then its row's first one in the step of all. It leaves when it ends or is aborted. No row depends
on the others but for rounding: positions and mask are its own, and so are the numbers it is drawn
by. No thread, no asyncio.

Legend: n = live rows, I = tokens handed out at once, J = student top-k.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from student_trainer.learner.families import decoder_of
from student_trainer.records import Delta, Finish, SamplingOptions
from student_trainer.rollouts.samplers.outbox import Outbox
from student_trainer.rollouts.samplers.sampling import Uniforms, drawn
from student_trainer.rollouts.samplers.slot_cache import SlotCache, States, columns_for

PREFILL_TOKENS = 4096
"""Of a forward pass over prompts, padding included, unless one alone is longer."""


@dataclass(eq=False, slots=True)
class Request:
    """One generation."""

    prompt_ids: NDArray[np.int32]
    options: SamplingOptions
    uniforms: Uniforms = field(init=False)
    alike: SamplingOptions = field(init=False)
    """Equal for requests that are drawn for in the same way."""
    said: list[NDArray[np.int32]] = field(init=False, default_factory=list)
    """What was handed out of it."""

    def __post_init__(self) -> None:
        self.uniforms = Uniforms(self.options.seed)
        self.alike = replace(self.options, max_tokens=1, seed=None)

    @property
    def longest(self) -> int:
        """Tokens that its row may come to."""
        return len(self.prompt_ids) + self.options.max_tokens


Events = list[tuple[Request, Delta]]


class RunningBatch:
    """Requests under way, and those that wait, in order."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_num_seqs: int,
        stream_interval: int,
        max_cache_bytes: float,
        end_ids: Collection[int],
    ) -> None:
        """`end_ids` end a generation. The model is in evaluation mode at every step."""
        self._model = model
        self._device = model.device
        self._max_num_seqs = max_num_seqs
        self._max_cache_bytes = max_cache_bytes
        self._end_ids = np.array(sorted(end_ids), np.int64)
        self._cache = SlotCache(_past_of(model, torch.zeros(1, 1, dtype=torch.long)))
        self._waiting: deque[Request] = deque()
        self._rows: list[Request] = []
        self._last_ids = np.zeros(max_num_seqs, np.int64)
        """[slots] of each row, what the next step reads."""
        self._left = np.zeros(max_num_seqs, np.int64)
        """[slots] of each row, tokens that it may still say."""
        self._outbox = Outbox(max_num_seqs, stream_interval)
        self._alike: list[tuple[SamplingOptions, NDArray[np.int64] | None]] = []

    @property
    def is_idle(self) -> bool:
        return not self._rows and not self._waiting

    @property
    def num_rows(self) -> int:
        """Requests that the next step computes, those that wait left out."""
        return len(self._rows)

    @property
    def longest_request(self) -> int:
        """Tokens, prompt included, that a request may have to fit into the cache alone."""
        return int(self._max_cache_bytes // self._cache.bytes_per_token) - columns_for(0)

    def add(self, request: Request) -> None:
        """It joins at the next step that has room. It is not longer than `longest_request`."""
        self._waiting.append(request)

    def abort(self, requests: Collection[Request]) -> Events:
        """Ends them, with what they have; those that are not here are passed over."""
        waiting = [request for request in requests if request in self._waiting]
        for request in waiting:
            self._waiting.remove(request)
        slots = [slot for slot, row in enumerate(self._rows) if row in requests]
        return [
            *((request, _nothing(request)) for request in waiting),
            *self._leave(dict.fromkeys(slots, Finish.TRUNCATED)),
        ]

    def compute_anew(self) -> None:
        """Keys and values of all that the rows have, after the model's weights have changed."""
        ids = [
            np.concatenate([row.prompt_ids, *row.said, self._outbox.said(slot)])
            for slot, row in enumerate(self._rows)
        ]
        self._cache.clear()
        if not ids:
            return
        longest = max(row.longest for row in self._rows)
        self._cache.make_room(len(ids), longest, self._most_rows(longest))
        for part in _in_passes(ids):
            past = _past_of(self._model, _padded(part))
            for number, row_ids in enumerate(part):
                states = [(keys[number], values[number]) for keys, values in past]
                self._cache.add(states, len(row_ids) - 1, 1)

    def clear(self) -> None:
        """Drops all of them without a word."""
        self._waiting.clear()
        self._rows.clear()
        self._cache.clear()

    @torch.no_grad()
    def step(self) -> Events:
        """A token more for every row, after those that can have joined; what is handed out."""
        self._join()
        n = len(self._rows)
        mask = self._cache.open_step()
        logits_nV = self._model(
            input_ids=self._on_device(self._last_ids[:n, None]),
            attention_mask=None if mask is None else mask.to(self._device),
            position_ids=self._on_device(self._cache.lengths[:n, None]),
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        self._cache.close_step()
        for options, slots in self._alike:
            self._draw(logits_nV.float(), options, slots)
        self._left[:n] -= 1
        is_end = np.isin(self._last_ids[:n], self._end_ids)
        events: Events = []
        for slot in self._outbox.full(n):
            if not is_end[slot] and self._left[slot] > 0:
                row = self._rows[slot]
                events.append((row, self._taken(slot, None)))
                self._outbox.refill(slot, row.uniforms)
        over = np.flatnonzero(is_end | (self._left[:n] <= 0)).tolist()
        return events + self._leave(
            {slot: Finish.STOP if is_end[slot] else Finish.LENGTH for slot in over}
        )

    def _on_device(self, array: NDArray[np.int64]) -> Tensor:
        return torch.tensor(array, device=self._device)

    def _draw(
        self, logits_nV: Tensor, options: SamplingOptions, slots: NDArray[np.int64] | None
    ) -> None:
        """For the rows that are alike: all of them, or those in some slots."""
        n = len(logits_nV)
        if slots is not None:
            logits_nV = logits_nV[torch.from_numpy(slots).to(self._device)]
        where: NDArray[np.int64] | slice = slice(n) if slots is None else slots
        got = drawn(logits_nV, options, torch.from_numpy(self._outbox.uniforms(where)))
        self._last_ids[where] = self._outbox.put(where, got.cpu())

    def _join(self) -> None:
        """As many of those that wait, in order, as have room to the end of all of them."""
        joining: list[Request] = []
        longest = max((row.longest for row in self._rows), default=0)
        most_rows = self._max_num_seqs
        while self._waiting:
            longest_with = max(longest, self._waiting[0].longest)
            num_rows = len(self._rows) + len(joining) + 1
            if num_rows > (most_with := self._most_rows(longest_with)):
                break
            longest, most_rows = longest_with, most_with
            joining.append(self._waiting.popleft())
        if not joining:
            return
        self._cache.make_room(len(self._rows) + len(joining), longest, most_rows)
        self._outbox.make_room(max(request.options.num_topk for request in joining))
        here = {row.prompt_ids.tobytes(): slot for slot, row in enumerate(self._rows)}
        new: list[list[Request]] = []
        for group in _grouped(joining):
            if (slot := here.get(group[0].prompt_ids.tobytes())) is None:
                new.append(group)
            else:
                self._sit_down(group, self._cache.states(slot))
        for groups in _prefills(new):
            past = _past_of(self._model, _padded([group[0].prompt_ids for group in groups]))
            for number, group in enumerate(groups):
                self._sit_down(group, [(keys[number], values[number]) for keys, values in past])
        self._find_alike()

    def _most_rows(self, longest: int) -> int:
        """That the cache may hold when one has so many tokens."""
        row_bytes = columns_for(longest) * self._cache.bytes_per_token
        return min(self._max_num_seqs, int(self._max_cache_bytes // row_bytes))

    def _sit_down(self, group: Sequence[Request], states: States) -> None:
        """Requests with the same prompt, of which keys and values are there."""
        prompt_ids = group[0].prompt_ids
        slots = self._cache.add(states, len(prompt_ids) - 1, len(group))
        self._rows += group
        for slot, request in zip(slots, group, strict=True):
            self._last_ids[slot] = prompt_ids[-1]
            self._left[slot] = request.options.max_tokens
            self._outbox.refill(slot, request.uniforms)

    def _leave(self, finishes: dict[int, Finish]) -> Events:
        """Rows by slot, and why they end."""
        if not finishes:
            return []
        events = [
            (self._rows[slot], self._taken(slot, finish)) for slot, finish in finishes.items()
        ]
        for origin, to in self._cache.remove(finishes):
            self._rows[to] = self._rows[origin]
            self._last_ids[to] = self._last_ids[origin]
            self._left[to] = self._left[origin]
            self._outbox.move(origin, to)
        del self._rows[self._cache.num_rows :]
        self._find_alike()
        return events

    def _taken(self, slot: int, finish: Finish | None) -> Delta:
        row = self._rows[slot]
        delta = self._outbox.take(slot, row.options.num_topk, finish)
        row.said.append(delta.token_ids)
        return delta

    def _find_alike(self) -> None:
        kinds = {row.alike for row in self._rows}
        self._alike = [
            (
                kind,
                np.array([slot for slot, row in enumerate(self._rows) if row.alike == kind])
                if len(kinds) > 1
                else None,
            )
            for kind in kinds
        ]


def _nothing(request: Request) -> Delta:
    """What a request hands out that is aborted before its turn."""
    empty = Outbox(1, 1)
    empty.make_room(request.options.num_topk)
    return empty.take(0, request.options.num_topk, Finish.TRUNCATED)


def _grouped(requests: Sequence[Request]) -> list[list[Request]]:
    """Those with the same prompt together, in the order of their first ones."""
    groups: dict[bytes, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.prompt_ids.tobytes(), []).append(request)
    return [*groups.values()]


def _prefills(groups: Sequence[list[Request]]) -> list[list[list[Request]]]:
    """Prompts of like length together, as many as a forward pass takes."""
    batches: list[list[list[Request]]] = []
    for group in sorted(groups, key=lambda group: len(group[0].prompt_ids)):
        length = len(group[0].prompt_ids)
        if batches and (len(batches[-1]) + 1) * length <= PREFILL_TOKENS:
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches


def _in_passes(rows: Sequence[NDArray[np.int32]]) -> list[list[NDArray[np.int32]]]:
    """In their order, as many together as a forward pass takes."""
    passes: list[list[NDArray[np.int32]]] = []
    for ids in rows:
        together = [*passes[-1], ids] if passes else []
        if together and len(together) * max(map(len, together)) <= PREFILL_TOKENS:
            passes[-1].append(ids)
        else:
            passes.append([ids])
    return passes


def _padded(prompts: Sequence[NDArray[np.int32]]) -> Tensor:
    """[prompts, longest less one] without their last tokens, padded on the right; at least one
    column, because no model takes none."""
    ids = np.zeros((len(prompts), max(1, max(map(len, prompts)) - 1)), np.int64)
    for row, prompt_ids in zip(ids, prompts, strict=True):
        row[: len(prompt_ids) - 1] = prompt_ids[:-1]
    return torch.from_numpy(ids)


@torch.no_grad()
def _past_of(model: PreTrainedModel, ids: Tensor) -> States:
    """[rows, H, tokens, D] of ids [rows, tokens], padded on the right: a causal model needs no mask
    of that. The cache does not know the config, so that layers with a window keep all of it."""
    past = DynamicCache()
    decoder_of(model)(input_ids=ids.to(model.device), past_key_values=past, use_cache=True)
    return [(keys, values) for keys, values, *_ in past]
