"""Which tokens end a response, by what tokenizers and configurations say. Both sides ask."""

from __future__ import annotations

from collections.abc import Sequence


def united(*ends: int | Sequence[int] | None) -> tuple[int, ...]:
    """Every id once, in order; each of the arguments names none, one, or several."""
    ids = [
        token_id
        for named in ends
        if named is not None
        for token_id in ([named] if isinstance(named, int) else named)
    ]
    return tuple(dict.fromkeys(int(token_id) for token_id in ids))
