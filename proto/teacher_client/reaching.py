"""Whether a teacher can be reached, and why not, in words of what to mend: gRPC itself says little
of a handshake that fails. One connection by hand, as far as the first frame of HTTP/2."""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from teacher_client.access import AccessError, TeacherAccess

TIMEOUT_S = 10.0
"""For each of two connections; who is not there at all is known at once."""
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""What a client of HTTP/2 says first: the preface and settings without any."""
_SETTINGS = 4
_FRAME_BYTES = 9
_EXPIRED, _NOT_YET = 10, 9
_OTHER_NAME = (62, 64)
"""X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH."""
_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What came of one connection."""

    endpoint: str
    absent: str = ""
    """Why nobody is there, which time may mend; empty where somebody is."""
    certificate: dict[str, Any] | None = None
    """As ssl's getpeercert() gives it; None without TLS."""


def reach(endpoint: str, access: TeacherAccess, timeout_s: float = TIMEOUT_S) -> Reached:
    """Connects, shakes hands, and waits for the first frame.

    Raises AccessError for what only a change of settings or certificates mends: TLS on one side
    alone, a certificate of another CA or name, out of its time, or none of our own.
    """
    context = access.ssl_context()
    host, _, port = endpoint.rpartition(":")
    place = (host.strip("[]"), int(port))
    try:
        with socket.create_connection(place, timeout_s) as connection:
            if context is None:
                return _in_the_clear(endpoint, place, _first_frame(connection))
            return _shaken(endpoint, place[0], connection, context, access)
    except AccessError:
        raise
    except ssl.SSLCertVerificationError as error:
        raise AccessError(_untrusted(endpoint, place, access, error)) from error
    except ssl.SSLError as error:
        raise AccessError(_not_tls(endpoint, error)) from error
    except OSError as error:
        return Reached(endpoint=endpoint, absent=error.strerror or str(error))
    except ValueError as error:  # no name of a host, `a..b`
        raise AccessError(f"{endpoint} is no address: {error}") from error


def _shaken(
    endpoint: str,
    host: str,
    connection: socket.socket,
    context: ssl.SSLContext,
    access: TeacherAccess,
) -> Reached:
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(connection, server_hostname=host) as secured:
        told: Any = secured.getpeercert()
        try:
            # In TLS 1.3 a server says only now what it thinks of a client's certificate.
            answer = _first_frame(secured)
        except ssl.SSLError as error:
            raise AccessError(_turned_away(endpoint, access, error)) from error
        if not answer:
            raise AccessError(_turned_away(endpoint, access, None))
    return Reached(endpoint=endpoint, certificate=told)


def _first_frame(connection: socket.socket) -> bytes:
    connection.sendall(_HELLO)
    try:
        return connection.recv(_FRAME_BYTES)
    except ConnectionError:
        return b""


def _in_the_clear(endpoint: str, place: tuple[str, int], answer: bytes) -> Reached:
    if len(answer) == _FRAME_BYTES and answer[3] == _SETTINGS:
        return Reached(endpoint=endpoint)
    if _speaks_tls(place):
        raise AccessError(
            f"{endpoint} speaks TLS, and teacher.tls_ca is not set: name the CA of its "
            "certificate there"
        )
    if not answer:
        return Reached(endpoint=endpoint, absent="it ends the connection at once")
    raise AccessError(
        f"{endpoint} answers, and not as gRPC does: teacher.endpoints wants the gRPC port"
    )


def _speaks_tls(place: tuple[str, int]) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(place, TIMEOUT_S) as connection:
            context.wrap_socket(connection).close()
    except OSError:  # ssl.SSLError is one
        return False
    return True


def _turned_away(endpoint: str, access: TeacherAccess, error: ssl.SSLError | None) -> str:
    why = "" if error is None else f" ({error.reason})"
    if access.tls_cert is None:
        return (
            f"{endpoint} ends the connection after the handshake{why}: it asks for a client's "
            "certificate, set teacher.tls_cert and teacher.tls_key"
        )
    return (
        f"{endpoint} does not take the certificate {access.tls_cert}{why}: it must be of the "
        "teacher's tls_client_ca, and in its time"
    )


def _not_tls(endpoint: str, error: ssl.SSLError) -> str:
    if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return (
            f"{endpoint} does not speak TLS, and teacher.tls_ca is set: start the teacher with "
            "tls_cert and tls_key, or leave tls_ca out"
        )
    return f"{endpoint}: the TLS handshake failed: {error.reason or error}"


def _untrusted(
    endpoint: str,
    place: tuple[str, int],
    access: TeacherAccess,
    error: ssl.SSLCertVerificationError,
) -> str:
    if error.verify_code in _OTHER_NAME:
        names = ", ".join(_names_of(place, access)) or "other names"
        return (
            f"the certificate of {endpoint} is for {names}, not for {place[0]}: name the teacher "
            "so in teacher.endpoints, or issue it for that name"
        )
    if error.verify_code in (_EXPIRED, _NOT_YET):
        return (
            f"the certificate of {endpoint}: {error.verify_message} (now is "
            f"{datetime.fromtimestamp(time.time(), UTC):%Y-%m-%d %H:%M} UTC): issue it anew, or "
            "set the clock"
        )
    return (
        f"the certificate of {endpoint} is not of the CA in teacher.tls_ca {access.tls_ca}: "
        f"{error.verify_message}; take the CA that issued it"
    )


def _names_of(place: tuple[str, int], access: TeacherAccess) -> list[str]:
    """For which names a certificate of the right CA is."""
    context = access.ssl_context()
    if context is None:
        return []
    context.check_hostname = False
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    try:
        with (
            socket.create_connection(place, TIMEOUT_S) as connection,
            context.wrap_socket(connection) as secured,
        ):
            told: Any = secured.getpeercert()
    except OSError:
        return []
    return [str(value) for _, value in told.get("subjectAltName", ())]
