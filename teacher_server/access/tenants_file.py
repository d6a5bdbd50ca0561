"""The tenants file: who may use a teacher, by the SHA-256 of each bearer token. Knows no transport.

    [tenants.vision]
    token_sha256 = ["9f86d081..."]          # `teacher-server token vision` prints one
    weight = 2.0
    max_sessions = 256
    runs = true                             # sees recorded rollouts
    expires = 2027-01-31T00:00:00Z

A token is 256 random bits, so one round of SHA-256 is enough: there is nothing to guess.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import logging
import math
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from teacher_server.access.secret_files import Stamp, stamp_of, warn_if_readable_by_others
from teacher_server.access.tenants import Tenant
from teacher_server.settings import ConfigError
from teacher_wire.errors import UnauthenticatedError

log = logging.getLogger(__name__)
NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HASH_PATTERN = re.compile(r"[0-9a-fA-F]{64}")
_COUNTS = ("max_sessions", "max_tokens_in_flight", "tokens_per_minute")
_KEYS = ("token_sha256", "weight", *_COUNTS, "expires", "runs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tenant of the file."""

    tenant: Tenant
    hashes: tuple[bytes, ...]
    """SHA-256 of each of its tokens."""
    expires: datetime | None
    """From then on its tokens are refused."""


class TenantsFile:
    """The tenants of one file, read again when it changes; a broken new file changes nothing."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Reads the file. Raises ConfigError."""
        self._path = path
        self._clock = clock
        self._stamp: Stamp = stamp_of([path])
        self._entries = read_tenants(path)

    def get(self, name: str) -> Tenant:
        """The tenant; one that has left the file while at work has no limits of its own."""
        entry = self._entries.get(name)
        return entry.tenant if entry is not None else Tenant(name=name)

    def tenant_of(self, token: str) -> str:
        """The tenant whose token this is. Raises UnauthenticatedError.

        Takes the same time whichever token of the file it is, or none.
        """
        given = hashlib.sha256(token.encode()).digest()
        found: Entry | None = None
        for entry in self._entries.values():
            for known in entry.hashes:
                if hmac.compare_digest(given, known):
                    found = entry
        if found is None:
            raise UnauthenticatedError("the bearer token is not known")
        if found.expires is not None and self._clock() >= found.expires.timestamp():
            raise UnauthenticatedError(f"the bearer token expired at {found.expires.isoformat()}")
        return found.tenant.name

    def poll(self, *, force: bool = False) -> bool:
        """Reads the file again if it looks changed, or in any case; True when tenants are new."""
        stamp = stamp_of([self._path])
        if stamp == self._stamp and not force:
            return False
        self._stamp = stamp
        try:
            entries = read_tenants(self._path)
        except ConfigError as error:
            log.error("the tenants stay as they were: %s", error)
            return False
        changed = entries != self._entries
        self._entries = entries
        log.info("%d tenants read from %s", len(entries), self._path)
        return changed


def read_tenants(path: Path) -> dict[str, Entry]:
    """The tenants of a file by name. Raises ConfigError with the key, its value and the limit."""
    try:
        with path.open("rb") as stream:
            content = tomllib.load(stream)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"tenants_file {path}: {error}") from error
    try:
        entries = _entries(content)
    except ConfigError as error:
        raise ConfigError(f"tenants_file {path}: {error}") from None
    warn_if_readable_by_others(path)
    return entries


def _entries(content: Mapping[str, Any]) -> dict[str, Entry]:
    _refuse_unknown(content, ("tenants",), "")
    tables = content.get("tenants", {})
    if not isinstance(tables, dict) or not tables:
        raise ConfigError("tenants is empty, must hold at least one table [tenants.NAME]")
    entries = {name: _entry(name, table) for name, table in tables.items()}
    owners: dict[bytes, str] = {}
    for name, entry in entries.items():
        for known in entry.hashes:
            if known in owners:
                raise ConfigError(
                    f"tenants.{name}.token_sha256 has a hash of tenants.{owners[known]}, "
                    "each must occur once"
                )
            owners[known] = name
    return entries


def _entry(name: str, table: object) -> Entry:
    check_name(name)
    where = f"tenants.{name}"
    if not isinstance(table, dict):
        raise ConfigError(f"{where} is {table!r}, must be a table")
    _refuse_unknown(table, _KEYS, f"{where}.")
    counts = {key: _count(f"{where}.{key}", table[key]) for key in _COUNTS if key in table}
    weight = table.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f"{where}.weight is {weight!r}, must be a number")
    if not (weight > 0 and math.isfinite(weight)):
        raise ConfigError(f"{where}.weight is {weight}, must be more than 0 and finite")
    runs = table.get("runs", False)
    if not isinstance(runs, bool):
        raise ConfigError(f"{where}.runs is {runs!r}, must be true or false")
    return Entry(
        tenant=Tenant(name=name, weight=float(weight), runs=runs, **counts),
        hashes=_hashes(f"{where}.token_sha256", table.get("token_sha256")),
        expires=_instant(f"{where}.expires", table.get("expires")),
    )


def check_name(name: str) -> None:
    """Raises ConfigError for a name that no tenant can have."""
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"the tenant name {name!r} must be 1 to 64 letters, digits, underscores or hyphens"
        )


def _hashes(where: str, value: object) -> tuple[bytes, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} must be a list of at least one hash")
    for position, text in enumerate(value):
        if not isinstance(text, str) or not _HASH_PATTERN.fullmatch(text):
            # Not the value: it may be a token that was pasted in place of its hash.
            size = f"has {len(text)} characters" if isinstance(text, str) else "is no text"
            raise ConfigError(f"{where}[{position}] {size}, must be 64 hexadecimal digits")
    return tuple(bytes.fromhex(text) for text in value)


def _count(where: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where} is {value!r}, must be a whole number")
    if value < 1:
        raise ConfigError(f"{where} is {value}, must be at least 1")
    return value


def _instant(where: str, value: object) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ConfigError(
            f"{where} is {value}, must be a date and time with an offset, like 2027-01-31T00:00:00Z"
        )
    return value


def _refuse_unknown(table: Iterable[str], known: tuple[str, ...], prefix: str) -> None:
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"unknown key {prefix + key!r}{hint}")


def new_token(name: str) -> tuple[str, str]:
    """A fresh token, and the lines of the tenants file that admit it. Raises ConfigError."""
    check_name(name)
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    return token, f'[tenants.{name}]\ntoken_sha256 = ["{digest}"]\n'
