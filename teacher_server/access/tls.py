"""Certificate and key of a server, for gRPC and for HTTP, read again when a file changes.

New connections get the new certificate and are checked against the new client CA; those that live
go on. A broken new set is logged and the old one stays.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from teacher_server.access.secret_files import stamp_of
from teacher_server.settings import ConfigError
from teacher_wire.secret_files import why_refused

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files."""

    cert: Path
    """The server's certificate, then its intermediates."""
    key: Path
    """Its private key, not encrypted."""
    client_ca: Path | None
    """Whom clients' certificates must come from; None asks for no certificate."""


class TlsMaterial:
    """What the files hold now."""

    def __init__(self, files: TlsFiles) -> None:
        """Reads the files. Raises ConfigError."""
        self._files = files
        self._paths = [p for p in (files.cert, files.key, files.client_ca) if p is not None]
        self._stamp = stamp_of(self._paths)
        self._grpc, self._context = _load(files)
        self.http_context = _server_context(files)
        """A context that follows the files. A client without a certificate gets through the
        handshake, so that probes do; the HTTP edge refuses it elsewhere."""
        self.http_context.sni_callback = self._use_current

    def _use_current(self, connection: Any, _name: str | None, _outer: ssl.SSLContext) -> None:
        # Called in every handshake, server name or not. Loading a chain into the live context would
        # do for the certificate, but a client CA cannot be taken out of a context again.
        connection.context = self._context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files."""
        given = self._grpc

        def changed() -> grpc.ServerCertificateConfiguration | None:
            # Asked in every handshake. What it returns replaces what other handshakes may be about
            # to use, which gRPC does not guard (grpc/grpc#36693): None while nothing is new.
            nonlocal given
            if self._grpc is given:
                return None
            given = self._grpc
            return given

        asks_for_certificate = self._files.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(
            given,
            changed,  # type: ignore[arg-type]  # the stub knows no None
            asks_for_certificate,
        )

    def poll(self, *, force: bool = False) -> bool:
        """Reads the files again if they look changed, or in any case; True when they were read."""
        stamp = stamp_of(self._paths)
        if stamp == self._stamp and not force:
            return False
        self._stamp = stamp
        try:
            self._grpc, self._context = _load(self._files)
        except ConfigError as error:
            log.error("the certificate stays as it was: %s", error)
            return False
        log.info("certificate read from %s", self._files.cert)
        return True


def _load(files: TlsFiles) -> tuple[grpc.ServerCertificateConfiguration, ssl.SSLContext]:
    cert, key = _read("tls_cert", files.cert), _read("tls_key", files.key)
    ca = None if files.client_ca is None else _read("tls_client_ca", files.client_ca)
    context = _server_context(files)
    if why := why_refused(files.key, "the server's private key"):
        raise ConfigError(f"tls_key: {why}")
    return grpc.ssl_server_certificate_configuration([(key, cert)], ca), context


def _server_context(files: TlsFiles) -> ssl.SSLContext:
    """Checks files that can be read by using them. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A resumed session would skip the check against the current client CA; TLS 1.3 without tickets
    # cannot resume.
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    try:
        context.load_cert_chain(files.cert, files.key, password=lambda: _refuse_encrypted(files))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            text = f"tls_key {files.key} does not match the certificate tls_cert {files.cert}"
        else:
            text = f"{_no_pem(files)}: {error.reason or 'it cannot be read'}"
        raise ConfigError(text) from error
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except ssl.SSLError as error:
            text = f"tls_client_ca {files.client_ca} must be PEM certificates: {error.reason}"
            raise ConfigError(text) from error
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _no_pem(files: TlsFiles) -> str:
    """Which of the two it is: a certificate by itself is read for whom it would be trusted."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(files.cert)
    except ssl.SSLError:
        return f"tls_cert {files.cert} must be PEM certificates"
    return f"tls_key {files.key} must be the PEM key of tls_cert {files.cert}"


def _refuse_encrypted(files: TlsFiles) -> str:
    raise ConfigError(f"tls_key {files.key} is encrypted, must be a key without a passphrase")


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} is {str(path)!r}: {error.strerror}") from error
