"""How a trainer shows who it is to a teacher, and makes sure of whom it talks to. No torch.

Files are read at each connection, so a new token or certificate is used from the next one on.
"""

from __future__ import annotations

import ipaddress
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from teacher_wire.secret_files import why_refused

log = logging.getLogger(__name__)
TOKEN_VARIABLE = "DRIFTLINE_TEACHER_TOKEN"
"""Holds the token when no file does."""
TOKEN_FILE_VARIABLE = "DRIFTLINE_TEACHER_TOKEN_FILE"
"""Names the file when the settings do not, as container platforms do for a secret."""


class AccessError(ValueError):
    """A token or certificate that cannot be used; the message names the setting and the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAccess:
    """Token and certificates; with none of them the connection is open and unauthenticated."""

    token_file: Path | None = None
    token: str = field(default="", repr=False)
    """Used when there is no file."""
    tls_ca: Path | None = None
    """PEM file of the CA of the teacher's certificate; None: no TLS."""
    tls_cert: Path | None = None
    """PEM file of the trainer's own certificate, for a teacher that asks for one."""
    tls_key: Path | None = None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries. Raises AccessError, which never repeats the token."""
        token, source = self.token, TOKEN_VARIABLE
        if self.token_file is not None:
            token = _read("token_file", self.token_file).decode("utf-8", "replace").strip()
            source = f"teacher.token_file {str(self.token_file)!r}"
            if not token:
                raise AccessError(f"{source} is empty, must hold a token")
        if not token:
            return ()
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise AccessError(
                f"{source} holds {len(token)} characters, must be one token without white space"
            )
        return (("authorization", f"Bearer {token}"),)

    def why_exposed(self) -> str | None:
        """Why a file of ours is everybody's, with the remedy; None where none is. It is asked once,
        before a run begins. Raises AccessError."""
        for name, path, what in (
            ("token_file", self.token_file, "the token"),
            ("tls_key", self.tls_key, "the private key"),
        ):
            try:
                if path is not None and (why := why_refused(path, what)):
                    return f"teacher.{name}: {why}"
            except OSError as error:
                raise AccessError(f"teacher.{name} is {str(path)!r}: {error.strerror}") from error
        return None

    def channel(self, endpoint: str, options: Sequence[tuple[str, int]]) -> grpc.aio.Channel:
        """A channel to a teacher, not connected yet. Raises AccessError."""
        if self.tls_ca is None:
            self.warn_in_the_clear(endpoint)
            return grpc.aio.insecure_channel(endpoint, options=options)
        key = None if self.tls_key is None else _read("tls_key", self.tls_key)
        cert = None if self.tls_cert is None else _read("tls_cert", self.tls_cert)
        credentials = grpc.ssl_channel_credentials(_read("tls_ca", self.tls_ca), key, cert)
        return grpc.aio.secure_channel(endpoint, credentials, options=options)

    def ssl_context(self) -> ssl.SSLContext | None:
        """The same trust for HTTPS; None without tls_ca. Raises AccessError."""
        if self.tls_ca is None:
            return None
        # Comments of a PEM file may be of any letters, the rest is ASCII.
        authority = _read("tls_ca", self.tls_ca).decode("ascii", "ignore")
        # ssl.create_default_context would trust every CA of the system when the file is empty.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cadata=authority)
            if self.tls_cert is not None:
                context.load_cert_chain(self.tls_cert, self.tls_key, self._refuse_encrypted)
        except AccessError:
            raise
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = ", ".join(str(p) for p in (self.tls_ca, self.tls_cert, self.tls_key) if p)
            raise AccessError(f"no TLS with {files}: {error}") from error
        return context

    def _refuse_encrypted(self) -> str:
        raise AccessError(
            f"teacher.tls_key {self.tls_key} is encrypted, must be a key without a passphrase"
        )

    def warn_in_the_clear(self, endpoint: str) -> None:
        """Says so when a token crosses the network without TLS."""
        if (self.token or self.token_file) and not _is_loopback(endpoint):
            log.warning("the token crosses the network to %s in the clear: no tls_ca", endpoint)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AccessError(f"teacher.{name} is {str(path)!r}: {error.strerror}") from error


def _is_loopback(endpoint: str) -> bool:
    host = endpoint.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
