"""Which copy of the model a session stays with.

Run: python -m pytest tests/teacher/engine/test_data_ranks.py
"""

from __future__ import annotations

from teacher_server.engine.data_ranks import DataRanks


def test_a_session_stays_with_its_copy_and_new_ones_go_where_there_are_fewest() -> None:
    ranks = DataRanks(3)
    assert [ranks.of(name) for name in "abcd"] == [0, 1, 2, 0]
    assert [ranks.of(name) for name in "dcba"] == [0, 2, 1, 0]
    ranks.forget("b")
    ranks.forget("b")
    ranks.forget("never seen")
    assert ranks.of("e") == 1


def test_without_a_session_or_with_one_copy_it_is_for_vllm_to_choose() -> None:
    assert DataRanks(2).of(None) is None
    assert DataRanks(1).of("a") is None
