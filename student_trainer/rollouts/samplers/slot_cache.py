"""Keys and values of a batch whose rows come and go: a slot a row, reused, and none left empty.

Every row ends at the same column, whatever its length:

    row 0    . . a b c d      its tokens stand in the last `lengths[row]` columns before `end`
    row 1    . . . . e f
    row 2    g h i j k l

So a step writes one column for all of them, its attention reads from the first token of the longest
row on, and to the model it is a batch that is padded on the left. Live rows are the first ones: the
last one moves into a slot that becomes free. Sliding windows are the mask's business: every layer
keeps all columns. What stands before a row's first token is masked but must be numbers, because
nought times NaN is NaN: buffers begin as zeros, and are dropped when a row fails. Knows neither
requests nor sampling.

Legend: S = slots, H = heads of keys and values, C = columns, D = their width, n = live rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

States: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Keys and values, layer by layer."""
SPARE_COLUMNS = 64
"""Beyond the longest row: as many steps go by before the columns are moved back to the front."""


def kinds_of_state(config: PretrainedConfig) -> set[str]:
    """What a model keeps of its past besides plain keys and values, by transformers' names."""
    layers = DynamicCache(config=config).layers
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return {type(layer).__name__ for layer in layers if type(layer) not in plain}


class _Columns:
    """Which part of the buffers is in use; one for all layers."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.first = 0
        """Of the longest row."""
        self.end = 0


class _SlotLayer(CacheLayerMixin):
    """Buffers [S, H, C, D] of one layer."""

    def __init__(self, like: tuple[Tensor, Tensor], columns: _Columns) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self.buffers = [states.new_zeros(0, *states.shape[1:]) for states in like]
        self._columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The buffers are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[n, H, 1, D] of a step's tokens in; all that the rows have out."""
        rows, end = slice(self._columns.num_rows), self._columns.end
        keys, values = self.buffers
        keys[rows, :, end : end + 1] = key_states
        values[rows, :, end : end + 1] = value_states
        used = slice(self._columns.first, end + 1)
        return keys[rows, :, used], values[rows, :, used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._columns.end - self._columns.first

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """What transformers' models read and write in one step of a batch."""

    def __init__(self, example: States) -> None:
        """Its heads, widths and arithmetic are those of some states [1, H, 1, D]."""
        self._columns = _Columns()
        self._slots = [_SlotLayer(like, self._columns) for like in example]
        super().__init__(layers=[*self._slots])
        self._capacity = (0, 0)
        self.lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        """[S] tokens of each row."""
        self.bytes_per_token = sum(
            states.shape[1] * states.shape[3] * states.element_size()
            for like in example
            for states in like
        )

    @property
    def num_rows(self) -> int:
        return self._columns.num_rows

    def make_room(self, num_rows: int, longest: int, most_rows: int) -> None:
        """For so many rows, and for one that will have so many tokens.

        Where the buffers must grow they may be for `most_rows`, not for more.
        """
        columns, (has_rows, has_columns) = columns_for(longest), self._capacity
        if num_rows <= has_rows and columns <= has_columns:
            return
        num_slots = min(most_rows, max(num_rows, 2 * has_rows))
        live = self.lengths[: self.num_rows]
        self._move_to(int(live.max(initial=0)), (num_slots, columns))
        self.lengths = np.zeros(num_slots, np.int64)
        self.lengths[: len(live)] = live

    def add(self, states: States, length: int, count: int) -> range:
        """New rows with the same first `length` tokens, given as [H, length or more, D]; returns
        their slots. There is room for them."""
        if length > self._columns.end:
            self._move_to(length, self._capacity)
        slots = range(self.num_rows, self.num_rows + count)
        self._columns.num_rows += count
        self.lengths[slots.start : slots.stop] = length
        end = self._columns.end
        for layer, like in zip(self._slots, states, strict=True):
            for buffer, given in zip(layer.buffers, like, strict=True):
                buffer[slots.start : slots.stop, :, end - length : end] = given[:, :length]
        return slots

    def states(self, slot: int) -> States:
        """[H, its length, D] of a row."""
        used = slice(self._columns.end - int(self.lengths[slot]), self._columns.end)
        both = (layer.buffers for layer in self._slots)
        return [(keys[slot, :, used], values[slot, :, used]) for keys, values in both]

    def remove(self, slots: Collection[int]) -> list[tuple[int, int]]:
        """Drops rows; returns which slots moved to which, so that the live ones are the first."""
        left = self.num_rows - len(slots)
        gone = set(slots)
        movers = [slot for slot in range(left, self.num_rows) if slot not in gone]
        moves = list(zip(movers, sorted(slot for slot in gone if slot < left), strict=True))
        for origin, to in moves:
            length = int(self.lengths[origin])
            used = slice(self._columns.end - length, self._columns.end)
            for layer in self._slots:
                for buffer in layer.buffers:
                    buffer[to, :, used] = buffer[origin, :, used]
            self.lengths[to] = length
        self._columns.num_rows = left
        return moves

    def clear(self) -> None:
        """Drops rows and buffers."""
        self._columns.num_rows = 0
        self._move_to(0, (0, 0))
        self.lengths = self.lengths[:0]

    def open_step(self) -> Tensor | None:
        """Makes the next column the one that is written to. Returns [n, columns in use] True where
        a row has a token, the new one included; None where all have the same length."""
        lengths = self.lengths[: self.num_rows]
        longest = int(lengths.max())
        if self._columns.end == self._capacity[1]:
            self._move_to(longest, self._capacity)
        self._columns.first = self._columns.end - longest
        if lengths.min() == longest:
            return None
        starts = torch.from_numpy(longest - lengths)
        return torch.arange(longest + 1) >= starts[:, None]

    def close_step(self) -> None:
        """The column that was opened is written."""
        self._columns.end += 1
        self.lengths[: self.num_rows] += 1

    def _move_to(self, end: int, capacity: tuple[int, int]) -> None:
        """The live rows so that they end at column `end`, which the longest of them fits."""
        columns, (num_slots, num_columns) = self._columns, capacity
        rows = slice(columns.num_rows)
        longest = int(self.lengths[rows].max(initial=0))
        for layer in self._slots:
            for number, before in enumerate(layer.buffers):
                live = before[rows, :, columns.end - longest : columns.end]
                if capacity == self._capacity:
                    live, after = live.clone(), before
                else:
                    heads, width = before.shape[1], before.shape[3]
                    after = before.new_zeros(num_slots, heads, num_columns, width)
                    layer.buffers[number] = after
                after[rows, :, end - longest : end] = live
        columns.end, self._capacity = end, capacity


def columns_for(longest: int) -> int:
    """Columns of the buffers for rows of at most so many tokens."""
    return longest + SPARE_COLUMNS
