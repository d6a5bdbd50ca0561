"""Ranges of ids, and where two vocabularies differ. Run: pytest tests/wire"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from teacher_wire.errors import InvalidRequestError
from teacher_wire.id_ranges import (
    MAX_RANGES,
    IdRanges,
    check_ranges,
    inside,
    num_ids,
    ranges_of,
    united,
    within,
)
from teacher_wire.records import ScoreOptions
from teacher_wire.vocabulary import BLOCK_IDS, MAX_TOKENS_ASKED, Vocabulary, differing_ranges

PROPERTY = settings(max_examples=60, deadline=None)
id_sets = st.sets(st.integers(0, 40), max_size=20)


@PROPERTY
@example(left={0, 1}, right=set(), start=1, length=0)
@given(left=id_sets, right=id_sets, start=st.integers(0, 20), length=st.integers(0, 30))
def test_ranges_are_sets_of_ids(left: set[int], right: set[int], start: int, length: int) -> None:
    def held(ranges: IdRanges) -> set[int]:
        check_ranges(ranges)
        assert num_ids(ranges) == sum(len(range(*span)) for span in ranges)
        return {i for span in ranges for i in range(*span)}

    ranges = ranges_of(left)
    assert held(ranges) == left
    assert all(end < start for (_, end), (start, _) in pairwise(ranges))
    assert held(united(ranges, ranges_of(right))) == left | right
    cut = held(within(ranges, start, start + length))
    assert cut == {i - start for i in left if start <= i < start + length}
    ids = np.arange(48, dtype=np.int32).reshape(6, 8)
    assert inside(ranges, ids).tolist() == [[i in left for i in row] for row in ids.tolist()]


@pytest.mark.parametrize(
    ("ranges", "text"),
    [
        (((5, 5),), "the range 5..5"),
        (((7, 3),), "the range 7..3"),
        (((-1, 3),), "the range -1..3"),
        (((4, 8), (1, 2)), "from 1 on behind one up to 8"),
        (((1, 5), (4, 8)), "from 4 on behind one up to 5"),
        (tuple((2 * i, 2 * i + 1) for i in range(MAX_RANGES + 1)), "1025 ranges, the limit is"),
    ],
)
def test_ranges_that_are_none_are_refused(ranges: IdRanges, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        ScoreOptions(k=1, excluded_ids=ranges)


class Named:
    """A tokenizer, as far as it is asked."""

    def __init__(self, tokens: dict[str, int]) -> None:
        self._tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return self._tokens


def test_tokens_are_by_id_and_an_id_may_have_none() -> None:
    vocabulary = Vocabulary.of(Named({"b": 3, "a": 0}))
    assert vocabulary.tokens == ("a", None, None, "b")
    assert (vocabulary.num_named, vocabulary[3], vocabulary[2]) == (2, "b", None)
    assert vocabulary[4] is vocabulary[-1] is None
    assert vocabulary.named(1, 100) == {3: "b"}
    empty = Vocabulary.of(Named({}))
    assert (empty.fingerprint, empty.digests) == ("", ())
    assert len(vocabulary.fingerprint) == 64


def test_only_the_blocks_that_differ_are_asked_for() -> None:
    size = 20 * BLOCK_IDS - 7
    own = {f"t{i}": i for i in range(size)}
    theirs = own | {"u": size + BLOCK_IDS}  # one block that only they have, and one without any
    del theirs["t5"], theirs[f"t{3 * BLOCK_IDS}"], theirs[f"t{4 * BLOCK_IDS - 1}"]
    left, right = Vocabulary.of(Named(own)), Vocabulary.of(Named(theirs))
    assert len(left.digests) == 20
    assert {len(digest) for digest in left.digests} == {16}
    expected = [(0, BLOCK_IDS), (3 * BLOCK_IDS, BLOCK_IDS), (20 * BLOCK_IDS, BLOCK_IDS)]
    assert differing_ranges(left.digests, right.digests) == expected
    assert differing_ranges(left.digests, left.digests) == []
    for first, second in ((left, Vocabulary()), (Vocabulary(), left)):
        parts = differing_ranges(first.digests, second.digests)
        assert [count for _, count in parts] == [MAX_TOKENS_ASKED] * 2 + [4 * BLOCK_IDS]
        assert [start for start, _ in parts] == [0, MAX_TOKENS_ASKED, 2 * MAX_TOKENS_ASKED]
