"""The paths that other trainers' clients ask, and how a failure looks on them."""

from __future__ import annotations

from typing import Any

HEALTH_PATHS = ("/health", "/health/", "/ping")
"""Open to everybody, as probes are. TRL up to 1.10 asks with the slash."""
TRL_PATH = "/get_sequence_logprobs/"
SHAPED_PATHS = frozenset(
    {
        *HEALTH_PATHS,
        "/version",
        "/tokenize",
        "/v1/models",
        "/v1/completions",
        "/inference/v1/generate",
        "/generate",
        TRL_PATH,
    }
)
"""Those whose failures have OpenAI's shape."""
CHALLENGE = 'Bearer, Basic realm="driftline", charset="UTF-8"'
"""`www-authenticate` of those: a client that cannot send a header gives the token as the URL's
user. Elsewhere Basic is not offered, or a browser would ask for a password over the page."""

_TYPES = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


def shaped_error(status: int, message: str) -> dict[str, Any]:
    """A failure as vLLM's server tells it."""
    usual = "BadRequestError" if status < 500 else "InternalServerError"
    kind = _TYPES.get(status, usual)
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
