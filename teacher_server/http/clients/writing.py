"""How answers are written: compact JSON, long ones piece by piece in a thread."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse

JSON = "application/json"


def dumps(content: Any) -> str:
    """Raises ValueError for a number that JSON has not."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=False)


def json_reply(content: Any) -> Response:
    """A short answer."""
    return Response(dumps(content), media_type=JSON)


def json_stream(pieces: Iterator[str]) -> Response:
    """A long one, made in a thread, because this loop also carries the streams of trainers. Nothing
    that can fail is left to it."""

    async def chunks() -> AsyncIterator[str]:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    return StreamingResponse(chunks(), media_type=JSON)


def usage(num_tokens: int, num_kept: int) -> dict[str, Any]:
    """OpenAI's, of an answer that generated nothing."""
    return {
        "prompt_tokens": num_tokens,
        "total_tokens": num_tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": num_kept},
        "completion_tokens_details": None,
    }
