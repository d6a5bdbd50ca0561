"""Which of an engine's several copies of the model a session stays with: each has a cache of its
own, and elsewhere the session's whole text would be computed again."""

from __future__ import annotations


class DataRanks:
    """Sessions over the copies, as evenly as they come and go."""

    def __init__(self, num_ranks: int) -> None:
        self._num_sessions = [0] * num_ranks
        self._of: dict[str, int] = {}

    def of(self, session: str | None) -> int | None:
        """The copy for a query; None where it does not matter, and vLLM takes the least busy."""
        if session is None or len(self._num_sessions) == 1:
            return None
        if (rank := self._of.get(session)) is None:
            rank = self._num_sessions.index(min(self._num_sessions))
            self._of[session] = rank
            self._num_sessions[rank] += 1
        return rank

    def forget(self, session: str) -> None:
        """Of one that has ended, or never was."""
        if (rank := self._of.pop(session, None)) is not None:
            self._num_sessions[rank] -= 1
