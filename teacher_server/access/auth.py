"""Who calls: a bearer token of the tenants file, a client's certificate, or nobody in particular.

One rule for gRPC and HTTP. With a tenants file the token names the tenant, as Bearer, or as the
user of Basic, which is what clients make of a URL's user part; without one, but with a
client CA, the common name of the client's certificate does; without both every caller is who its
run_id says, which is for loopback and trusted networks.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Sequence
from pathlib import Path

from teacher_server.access.caller import Caller
from teacher_server.access.tenants import OpenTenants, Tenants
from teacher_server.access.tenants_file import TenantsFile
from teacher_server.access.tls import TlsFiles, TlsMaterial
from teacher_server.settings import TeacherConfig, is_loopback
from teacher_wire.errors import PermissionDeniedError, UnauthenticatedError

log = logging.getLogger(__name__)
MAX_TOKEN_CHARACTERS = 4096
HOW_TO_SEND = (
    "send the header `authorization: Bearer TOKEN`, or over HTTP the token as the user of the URL, "
    "http://TOKEN:@HOST:PORT"
)


class Access:
    """What the settings say of callers, and the files behind it."""

    def __init__(
        self,
        *,
        tenants: TenantsFile | None = None,
        tls: TlsMaterial | None = None,
        mutual: bool = False,
    ) -> None:
        """`mutual`: clients show a certificate, which the handshake has verified."""
        self._file = tenants
        self.tls = tls
        self._mutual = mutual
        self.tenants: Tenants = tenants or OpenTenants()

    @classmethod
    def from_config(cls, config: TeacherConfig) -> Access:
        """Reads the files of the settings. Raises ConfigError."""
        tls = None
        if config.tls_cert:
            client_ca = Path(config.tls_client_ca) if config.tls_client_ca else None
            files = TlsFiles(
                cert=Path(config.tls_cert), key=Path(config.tls_key), client_ca=client_ca
            )
            tls = TlsMaterial(files)
        tenants = TenantsFile(Path(config.tenants_file)) if config.tenants_file else None
        if tenants is not None and tls is None and not is_loopback(config.host):
            log.warning(
                "bearer tokens cross the network in the clear at %s: set tls_cert", config.host
            )
        return cls(tenants=tenants, tls=tls, mutual=bool(config.tls_client_ca))

    @property
    def has_files(self) -> bool:
        """There is something to reload."""
        return self._file is not None or self.tls is not None

    @property
    def required(self) -> bool:
        """Not everybody may call."""
        return self._file is not None or self._mutual

    def admit(self, authorization: Sequence[str]) -> None:
        """Raises UnauthenticatedError for a call that has no good token where one is needed."""
        if self._file is not None:
            self._file.tenant_of(_bearer(authorization))

    def tenant_of(self, caller: Caller) -> str:
        """The tenant of a call.

        Raises UnauthenticatedError, or PermissionDeniedError for a certificate that names nobody.
        """
        if self._mutual and caller.certificate_name is None:
            raise UnauthenticatedError("no client certificate: this teacher asks for one")
        if self._file is not None:
            return self._file.tenant_of(_bearer(caller.authorization))
        if not self._mutual:
            return caller.claimed
        if not caller.certificate_name:
            raise PermissionDeniedError("the client's certificate has no common name")
        return caller.certificate_name

    def poll(self, *, force: bool = False) -> None:
        """Reads the files again that look changed, or all of them."""
        if self._file is not None:
            self._file.poll(force=force)
        if self.tls is not None:
            self.tls.poll(force=force)


def _bearer(authorization: Sequence[str]) -> str:
    """The token of the one Authorization header. No message repeats what it held."""
    if not authorization:
        raise UnauthenticatedError(f"no bearer token: {HOW_TO_SEND}")
    if len(authorization) > 1:
        raise UnauthenticatedError(f"{len(authorization)} authorization headers, must be one")
    scheme, _, token = authorization[0].partition(" ")
    if scheme.lower() == "basic":
        token = _user_of(token)
    elif scheme.lower() != "bearer":
        raise UnauthenticatedError(
            f"the authorization scheme is not Bearer and not Basic: {HOW_TO_SEND}"
        )
    if not token or len(token) > MAX_TOKEN_CHARACTERS:
        raise UnauthenticatedError(
            f"the bearer token has {len(token)} characters, must have 1 to {MAX_TOKEN_CHARACTERS}"
        )
    return token


def _user_of(credentials: str) -> str:
    """The user of Basic credentials, whose password must be empty."""
    if len(credentials) > 2 * MAX_TOKEN_CHARACTERS:
        raise UnauthenticatedError(f"the Basic credentials have {len(credentials)} characters")
    try:
        text = base64.b64decode(credentials, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise UnauthenticatedError(
            f"the Basic credentials are no base64 of USER:PASSWORD: {HOW_TO_SEND}"
        ) from None
    user, _, password = text.partition(":")
    if password:
        raise UnauthenticatedError(f"the Basic password is not empty: {HOW_TO_SEND}")
    return user
