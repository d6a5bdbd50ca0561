"""Whether it was the network that failed, which passes: told by what lies beneath an error."""

from __future__ import annotations

_NAMES = {
    "ConnectError",
    "ConnectTimeout",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "ProxyError",
}
"""Of HTTP clients, whose classes are not imported for their sake."""
TOO_MANY_REQUESTS, SERVERS_OWN = 429, 500


def is_network(error: BaseException) -> bool:
    """Whether a connection, or the server at its other end, is beneath an error."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        status = getattr(getattr(one, "response", None), "status_code", 0)
        if isinstance(one, ConnectionError | TimeoutError) or type(one).__name__ in _NAMES:
            return True
        if status == TOO_MANY_REQUESTS or status >= SERVERS_OWN:
            return True
        waiting += [one.__cause__, one.__context__]
    return False
