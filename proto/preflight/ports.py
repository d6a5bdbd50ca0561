"""Whether an address can be listened on, tried by listening."""

from __future__ import annotations

import socket


def listener(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError, socket.gaierror for a host that has no address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        # Two sockets may be bound to one port until one of them listens.
        made.listen()
    except UnicodeError as error:  # of a name that cannot be one, `a..b`
        made.close()
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
    except OSError:
        made.close()
        raise
    return made


def shown(host: str, port: int) -> str:
    """As it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
