"""The clock: whether the kernel takes it for synchronised, and how far another machine's is off."""

from __future__ import annotations

import ctypes
import time
import urllib.request
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http.client import HTTPException, InvalidURL
from urllib.error import HTTPError
from urllib.parse import urlsplit

from preflight.certificates import day
from preflight.findings import Finding, ok, skipped, warning

MAX_SKEW_S = 5.0
"""Certificates and tokens begin and end by the second; a Date header is whole seconds."""
TIMEOUT_S = 5.0
_UNSYNCHRONISED = 5
"""TIME_ERROR of adjtimex(2)."""
_TIMEX_BYTES = 1024
"""More than struct timex has."""
HOW = "let NTP set it (chronyd, systemd-timesyncd)"


def synchronised() -> bool | None:
    """What the kernel says, which NTP has told; None where it is not to be asked."""
    try:
        call = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    state = call(ctypes.create_string_buffer(_TIMEX_BYTES))  # modes 0: it only asks
    return None if state < 0 else state != _UNSYNCHRONISED


def own() -> Iterator[Finding]:
    """This machine's clock by itself."""
    now = day(time.time())
    state = synchronised()
    if state is None:
        yield skipped("clock", f"{now}; the kernel does not say whether it is synchronised")
    elif state:
        yield ok("clock", f"{now}, synchronised")
    else:
        yield warning("clock", f"{now}, and the kernel says that nobody synchronises it", "", HOW)


def against(url: str) -> Iterator[Finding]:
    """Beside the Date header of an HTTP server: half of the way there and back is its due."""
    began = time.time()
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError("it begins with neither http:// nor https://")
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply:
            told = reply.headers.get("Date")
    except HTTPError as error:  # it has a Date all the same
        told = error.headers.get("Date")
        error.close()
    except (ValueError, InvalidURL) as error:
        yield warning("clock", f"{url!r} is no URL: {error}", "", "http://HOST:8080")
        return
    except (OSError, HTTPException) as error:
        yield skipped("clock", f"{url} does not answer: {error or type(error).__name__}")
        return
    ended = time.time()
    if told is None:
        yield skipped("clock", f"{url} tells no Date")
        return
    try:
        date_s = parsedate_to_datetime(told).timestamp()
    except ValueError:
        yield skipped("clock", f"{url} tells {told!r}, which is no Date")
        return
    # A header of whole seconds was half a second later in the mean.
    skew_s = (began + ended) / 2 - (date_s + 0.5)
    seen = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} {url}"
    limit = f"at most {MAX_SKEW_S:.0f} s"
    if abs(skew_s) > MAX_SKEW_S + (ended - began) / 2:
        yield warning("clock", seen, limit, f"{HOW}, here and there")
    else:
        yield ok("clock", seen, limit)
