"""Routes whose body is JSON, parsed and checked away from the loop that carries the streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from teacher_wire.errors import InvalidRequestError


class JsonRoute(APIRoute):
    """Gives a handler its body as FastAPI does, in a thread; a body of another kind is refused by
    the name of its header."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        annotation: Any = self.body_field.field_info.annotation
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)

        async def parsed(request: Request) -> Response:
            _refuse_unless_json(request.headers.get("content-type", ""))
            raw = await request.body()
            try:
                body = await asyncio.to_thread(adapter.validate_json, raw)
            except ValidationError as error:
                details = [
                    {**detail, "loc": ("body", *detail["loc"])}
                    for detail in error.errors(include_url=False, include_context=False)
                ]
                raise RequestValidationError(details) from error
            return await handle(_Parsed(request, body))

        return parsed


class _Parsed(Request):
    """A request whose body has been read into its model already, which FastAPI lets pass."""

    def __init__(self, request: Request, body: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._body = b"{}"  # read: FastAPI asks for the JSON of a body that is not empty
        self._json = body


def _refuse_unless_json(content_type: str) -> None:
    """A page of another origin can send any other type without asking."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    given = f"is {kind!r}" if kind else "is missing"
    raise InvalidRequestError(
        f"the header content-type {given}, must be application/json: with curl, "
        "-H 'content-type: application/json'"
    )
