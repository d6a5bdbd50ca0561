"""The tenants file: what it may hold, how tokens are compared, and mistakes that name themselves.

Run: pytest tests/teacher/access/test_tenants_file.py
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from pathlib import Path

import pytest

from teacher_server.access.tenants import Tenant
from teacher_server.access.tenants_file import TenantsFile, read_tenants
from teacher_server.settings import ConfigError
from teacher_wire.errors import UnauthenticatedError


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


A, B, C = digest("a"), digest("b"), digest("c")
WHOLE = f"""
[tenants.vision]
token_sha256 = ["{A}", "{B.upper()}"]
weight = 2
max_sessions = 3
max_tokens_in_flight = 4
tokens_per_minute = 5
expires = 2030-01-31T00:00:00+02:00

[tenants.text]
token_sha256 = ["{C}"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "tenants.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_every_token_names_its_tenant_and_the_limits_are_those_of_the_file(tmp_path: Path) -> None:
    tenants = TenantsFile(written(tmp_path, WHOLE), clock=lambda: 1.8e9)
    assert [tenants.tenant_of(token) for token in "abc"] == ["vision", "vision", "text"]
    assert tenants.get("vision") == Tenant(
        name="vision",
        weight=2.0,
        max_sessions=3,
        max_tokens_in_flight=4,
        tokens_per_minute=5,
    )
    assert tenants.get("text") == Tenant(name="text")
    for token in ("", "A", "a ", A, "d"):
        with pytest.raises(UnauthenticatedError, match="not known"):
            tenants.tenant_of(token)


def test_tokens_expire_at_the_instant_of_the_file(tmp_path: Path) -> None:
    now = [1_896_040_799.9]  # 2030-01-30T21:59:59.9Z
    tenants = TenantsFile(written(tmp_path, WHOLE), clock=lambda: now[0])
    assert tenants.tenant_of("a") == "vision"
    now[0] += 0.1
    with pytest.raises(UnauthenticatedError, match="expired at 2030-01-31T00:00:00"):
        tenants.tenant_of("a")
    assert tenants.tenant_of("c") == "text"


@pytest.mark.parametrize("token", ["a", "b", "c", "d"])
def test_every_hash_is_compared_in_constant_time_whatever_is_found(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants = TenantsFile(written(tmp_path, WHOLE), clock=lambda: 0.0)
    compared = []

    def counting(given: bytes, known: bytes) -> bool:
        compared.append(known.hex())
        return given == known

    monkeypatch.setattr(hmac, "compare_digest", counting)
    if token == "d":
        with pytest.raises(UnauthenticatedError):
            tenants.tenant_of(token)
    else:
        tenants.tenant_of(token)
    assert compared == [A, B, C]


HASH = f'token_sha256 = ["{A}"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tenants is empty, must hold at least one table"),
        ("tenants = 3", "tenants is empty, must hold at least one table"),
        (f"[tenant.a]\n{HASH}", "unknown key 'tenant', did you mean 'tenants'?"),
        (
            f"[tenants.a]\n{HASH}max_sesions = 1",
            "unknown key 'tenants.a.max_sesions', did you mean 'max_sessions'?",
        ),
        (f'[tenants."a b"]\n{HASH}', "the tenant name 'a b' must be 1 to 64 letters"),
        (f'[tenants."a/b"]\n{HASH}', "the tenant name 'a/b' must be"),
        ("[tenants]\na = 3", "tenants.a is 3, must be a table"),
        ("[tenants.a]", "tenants.a.token_sha256 must be a list of at least one hash"),
        ("[tenants.a]\ntoken_sha256 = []", "must be a list of at least one hash"),
        ("[tenants.a]\ntoken_sha256 = [3]", "token_sha256[0] is no text, must be 64 hexadecimal"),
        (
            f'[tenants.a]\ntoken_sha256 = ["{A}", "{A[:-1]}g"]',
            "token_sha256[1] has 64 characters, must be 64 hexadecimal digits",
        ),
        (f'[tenants.a]\ntoken_sha256 = ["{A}0"]', "has 65 characters, must be 64 hexadecimal"),
        (
            f"[tenants.a]\n{HASH}[tenants.b]\n{HASH.upper().lower()}",
            "tenants.b.token_sha256 has a hash of tenants.a, each must occur once",
        ),
        (f"[tenants.a]\n{HASH}weight = -1.5", "tenants.a.weight is -1.5, must be more than 0"),
        (f"[tenants.a]\n{HASH}weight = 0", "tenants.a.weight is 0, must be more than 0"),
        (f"[tenants.a]\n{HASH}weight = nan", "tenants.a.weight is nan, must be more than 0"),
        (f"[tenants.a]\n{HASH}weight = inf", "tenants.a.weight is inf, must be more than 0"),
        (f"[tenants.a]\n{HASH}weight = true", "tenants.a.weight is True, must be a number"),
        (f"[tenants.a]\n{HASH}max_sessions = 0", "tenants.a.max_sessions is 0, must be at least 1"),
        (f"[tenants.a]\n{HASH}tokens_per_minute = 1.5", "is 1.5, must be a whole number"),
        (
            f"[tenants.a]\n{HASH}expires = 2030-01-31T00:00:00",
            "tenants.a.expires is 2030-01-31 00:00:00, must be a date and time with an offset",
        ),
        (f"[tenants.a]\n{HASH}expires = 2030-01-31", "must be a date and time with an offset"),
        ("[tenants.a", "tenants.toml"),
    ],
)
def test_a_mistake_names_file_key_value_and_limit(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_tenants(path)
    assert message in str(caught.value)
    assert f"tenants_file {path}" in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        TenantsFile(tmp_path / "absent.toml")
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"tenants_file .*binary\.toml"):
        TenantsFile(path)


def test_a_token_in_place_of_its_hash_is_not_repeated(tmp_path: Path) -> None:
    path = written(tmp_path, '[tenants.a]\ntoken_sha256 = ["my-secret-token"]')
    with pytest.raises(ConfigError) as caught:
        read_tenants(path)
    assert "my-secret-token" not in str(caught.value)


def test_a_file_that_everybody_may_read_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, WHOLE)
    read_tenants(path)
    assert caplog.text == ""
    path.chmod(0o604)
    read_tenants(path)
    assert f"{path} can be read by every user of this machine" in caplog.text


def test_a_changed_file_is_read_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, WHOLE)
    tenants = TenantsFile(path, clock=lambda: 0.0)
    assert not tenants.poll()
    path.write_text("[tenants.text]\n" + HASH)
    assert tenants.poll()
    assert tenants.tenant_of("a") == "text"
    with pytest.raises(UnauthenticatedError):
        tenants.tenant_of("c")
    for broken in ("[tenants.x]\n", None):
        path.write_text(broken) if broken else path.unlink()
        assert not tenants.poll()
        assert tenants.tenant_of("a") == "text"
        assert not tenants.poll()
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 2
    path.write_text(WHOLE)
    assert tenants.poll()


def test_a_forced_read_sees_what_size_and_time_hide(tmp_path: Path) -> None:
    path = written(tmp_path, f"[tenants.a]\n{HASH}")
    tenants = TenantsFile(path)
    before = path.stat()
    path.write_text(f"[tenants.b]\n{HASH}")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not tenants.poll()
    assert tenants.poll(force=True)
    assert tenants.tenant_of("a") == "b"
