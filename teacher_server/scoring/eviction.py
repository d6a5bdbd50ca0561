"""Whose session goes, and who still gets in, when the table of sessions is full.

Pure functions of how many sessions each tenant has open and how much it weighs.
"""

from __future__ import annotations

from collections.abc import Mapping

_BEYOND = 8
"""One place for so many of the limit, beyond it, for tenants below their even share."""


def givers(num_open: Mapping[str, int], weights: Mapping[str, float], asking: str) -> list[str]:
    """Tenants whose idle sessions may make room for one more of `asking`, in the order to look.

    Whoever has the most by weight comes first; never a tenant that has less than the one that asks
    would have then.
    """
    shares = {name: n / weights[name] for name, n in num_open.items()}
    then = (num_open.get(asking, 0) + 1) / weights[asking]
    shares[asking] = then
    ranked = sorted(shares, key=shares.__getitem__, reverse=True)
    return [name for name in ranked if shares[name] >= then]


def fits_beyond(
    limit: int, num_open: Mapping[str, int], weights: Mapping[str, float], asking: str
) -> bool:
    """Whether a tenant below its even share still finds a place when nobody's session is idle.

    The others' sessions may be in use for as long as they last, and give their places back one by
    one; until then the table passes its limit by an eighth at most.
    """
    even_share = limit * weights[asking] / sum(weights.values())
    below = num_open.get(asking, 0) < even_share
    return below and sum(num_open.values()) < limit + max(1, limit // _BEYOND)
