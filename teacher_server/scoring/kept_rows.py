"""Rows of texts that were scored before, so that a text which goes on from one costs its new rows.

Rows are kept in blocks of BLOCK_TOKENS tokens. A block is found by a hash over everything that its
rows depend on: the tenant, the options, and every token and candidate up to its end. Texts that
begin alike share blocks, and nobody sees another tenant's, not even by the time of an answer.

Memory is bounded. The tenant that holds most gives first, of its blocks the one that was used least
recently; the end of a text goes before its beginning, without which it could not be found.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_wire.records import MODEL_COLUMNS, ModelRows, ScoreOptions

BLOCK_TOKENS = 32
OBJECT_BYTES = 1024
"""What a block takes besides its numbers."""


@dataclass(slots=True, eq=False)
class _Block:
    """The rows of BLOCK_TOKENS tokens; the first block of a text has one less: a first token has no
    row."""

    rows: ModelRows
    num_bytes: int
    name: str = ""
    """By which the engine knows the text that ends in here; empty: it knows none."""


def block_keys(
    tenant: str,
    options: ScoreOptions,
    token_ids: NDArray[np.int32],
    candidate_ids: NDArray[np.int32] | None,
) -> list[bytes]:
    """One key for each whole block of a text.

    `candidate_ids` [L - 1, C] are those of every token but the first.
    """
    width = None if candidate_ids is None else candidate_ids.shape[1]
    key = repr((tenant, options, width)).encode()
    tokens = np.ascontiguousarray(token_ids, "<i4")
    keys = []
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        start = end - BLOCK_TOKENS
        digest = hashlib.sha256(key)
        digest.update(tokens[start:end].tobytes())
        if candidate_ids is not None:
            rows = candidate_ids[max(0, start - 1) : end - 1]
            digest.update(np.ascontiguousarray(rows, "<i4").tobytes())
        key = digest.digest()
        keys.append(key)
    return keys


class KeptRows:
    """Blocks of rows by tenant and key."""

    def __init__(self, max_bytes: int, *, forget: Callable[[str, str], None]) -> None:
        """`forget` is told tenant and name of a text whose end is no longer kept."""
        self._max_bytes = max_bytes
        self._forget = forget
        self._blocks: dict[str, OrderedDict[bytes, _Block]] = {}
        """By tenant, least recently used first."""
        self._bytes: dict[str, int] = {}

    @property
    def num_bytes(self) -> int:
        """Of all blocks."""
        return sum(self._bytes.values())

    def take(self, tenant: str, keys: Sequence[bytes]) -> tuple[list[ModelRows], str]:
        """The rows of the leading blocks that are kept, and the name of the text that ends there.

        The name is the caller's until `keep`: two that go on from one text do not share it.
        """
        blocks = self._blocks.get(tenant, OrderedDict())
        found = []
        for key in keys:
            if (block := blocks.get(key)) is None:
                break
            found.append(block)
        _touch(blocks, keys[: len(found)])
        name = ""
        if found:
            name, found[-1].name = found[-1].name, ""
        return [block.rows for block in found], name

    def keep(self, tenant: str, keys: Sequence[bytes], rows: ModelRows, name: str) -> None:
        """Keeps the blocks of a text, of whose rows `rows` [L - 1] has all, and its name."""
        if not keys:
            self._forget(tenant, name)
            return
        blocks = self._blocks.setdefault(tenant, OrderedDict())
        for index, key in enumerate(keys):
            if key not in blocks:
                block = _block(rows, index)
                blocks[key] = block
                self._bytes[tenant] = self._bytes.get(tenant, 0) + block.num_bytes
        _touch(blocks, keys)
        if blocks[keys[-1]].name:
            self._forget(tenant, name)
        else:
            blocks[keys[-1]].name = name
        self._shrink()

    def _shrink(self) -> None:
        while self.num_bytes > self._max_bytes:
            tenant = max(self._bytes, key=self._bytes.__getitem__)
            blocks = self._blocks[tenant]
            _, block = blocks.popitem(last=False)
            self._bytes[tenant] -= block.num_bytes
            if block.name:
                self._forget(tenant, block.name)
            if not blocks:
                del self._blocks[tenant], self._bytes[tenant]


def _touch(blocks: OrderedDict[bytes, _Block], keys: Sequence[bytes]) -> None:
    """The beginning of a text becomes the most recent of it."""
    for key in reversed(keys):
        blocks.move_to_end(key)


def _block(rows: ModelRows, index: int) -> _Block:
    """A copy: a view would keep the rows of the whole text."""
    end = (index + 1) * BLOCK_TOKENS - 1
    where = slice(max(0, end - BLOCK_TOKENS), end)
    cut: dict[str, Any] = {
        name: None if array is None else array.copy()
        for name, array in MODEL_COLUMNS.cut(rows, where).items()
    }
    num_bytes = sum(array.nbytes for array in cut.values() if array is not None)
    return _Block(ModelRows(**cut), num_bytes + OBJECT_BYTES)
