"""What schemathesis checks of every answer besides its own list; loaded by SCHEMATHESIS_HOOKS."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.check
def no_traceback(ctx: Any, response: Any, case: Any) -> None:
    """No answer shows the server's insides."""
    for leak in ("Traceback", 'File "', "site-packages"):
        assert leak not in response.text, f"a client was told {response.text!r}"
