"""What a certificate says, read by a handshake with itself in memory: names, how long it lasts."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from preflight.findings import Finding, ok, problem, warning

SOON_S = 14 * 86_400
"""A certificate that ends within two weeks is warned of."""
NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL: one that has ended is read too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The first of a chain."""

    names: tuple[str, ...]
    """Hosts and addresses that it is for; of one without any, its common name."""
    not_before: float
    """Seconds since 1970."""
    not_after: float

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Certificate:
        """From what a connection's getpeercert() gives."""
        names = [value for _, value in told.get("subjectAltName", ())]
        common = [v for part in told.get("subject", ()) for k, v in part if k == "commonName"]
        return cls(
            names=tuple(names or common),
            not_before=float(ssl.cert_time_to_seconds(told["notBefore"])),
            not_after=float(ssl.cert_time_to_seconds(told["notAfter"])),
        )


def trusting_itself(cert: Path) -> ssl.SSLContext:
    """A client's context that takes this certificate, and no other, for good, at any time."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(NO_CHECK_TIME)
    context.load_verify_locations(cert)
    return context


def read(cert: Path, key: Path) -> Certificate:
    """A certificate that fits its key. Raises OSError, ssl.SSLError among them."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(cert, key, password="")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting_itself(cert).wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    told = client.getpeercert()
    assert told, "the client asks for a certificate"
    return Certificate.of(told)


def lasting(check: str, certificate: Certificate, what: str, remedy: str) -> Iterator[Finding]:
    """Whether it is valid now, and for how long; `what` it is called."""
    now = time.time()
    names = ", ".join(certificate.names) or "no name"
    until = day(certificate.not_after)
    if certificate.not_after <= now:
        yield problem(check, f"{what} ({names}) ended on {until}", f"now is {day(now)}", remedy)
    elif certificate.not_before > now:
        begins = day(certificate.not_before)
        yield problem(
            check,
            f"{what} ({names}) is not valid before {begins}",
            f"now is {day(now)}",
            "set the clock, or issue it anew",
        )
    elif certificate.not_after - now < SOON_S:
        yield warning(check, f"{what} ({names}) ends on {until}", f"now is {day(now)}", remedy)
    else:
        yield ok(check, f"{what} is for {names}, until {until}")


def day(seconds: float) -> str:
    """In UTC, to the minute."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
