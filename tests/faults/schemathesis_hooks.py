"""What schemathesis checks of every answer besides its own list; loaded by SCHEMATHESIS_HOOKS."""

from __future__ import annotations

from typing import Any

import schemathesis

from tests.faults.fuzz_cases import LEAKS


@schemathesis.check
def no_traceback(ctx: Any, response: Any, case: Any) -> None:
    """No answer shows the server's insides."""
    for leak in LEAKS:
        assert leak not in response.text, f"a client was told {response.text!r}"
