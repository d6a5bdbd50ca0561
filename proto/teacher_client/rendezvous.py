"""Which of several servers a key belongs to, by rendezvous (highest random weight) hashing. Pure.

Every client computes the same order from the same names, without talking to anybody. When a server
goes, only its keys move, each to its own second choice, so that the others share them evenly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def ranked(key: str, servers: Iterable[str]) -> list[str]:
    """The servers in the order in which a key prefers them; the order they come in is of no
    matter."""
    return sorted(servers, key=lambda server: (_weight(key, server), server), reverse=True)


def _weight(key: str, server: str) -> bytes:
    # Not hash(): Python seeds that anew in every process.
    return hashlib.blake2b(f"{server}\n{key}".encode(), digest_size=8).digest()
