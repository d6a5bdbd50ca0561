"""The page for people: static files, the same for everybody.

Its modules and styles lie in teacher_server/http/page, without a build step; the plotting library
is d3 as the installed package mpld3 carries it. Nothing of it comes from another host, and the
policy lets nothing come from one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from teacher_server.http.deps import HttpDeps, not_json
from teacher_server.http.middleware import PAGE_FILES

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""`blob:` is for the picture that is saved, and `data:` for the icon that there is not."""
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
_PLOTTING = "d3.js"
_PLOTTING_FILE = ("js", "d3.v5.min.js")


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def routes(deps: HttpDeps) -> APIRouter:
    """/ and /page/..."""
    del deps  # it is the same for every server
    router = APIRouter()
    files = _files()

    @router.get("/", **not_json("text/html"))
    async def show_page(request: Request) -> Response:
        return _answer(files["index.html"], request)

    @router.get(PAGE_FILES + "{name}", include_in_schema=False)
    async def page_file(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404, "the page has no such file")
        return _answer(files[name], request)

    return router


def _answer(file: _File, request: Request) -> Response:
    # Asked for again each time, but sent only when it is another: after an upgrade no file is old.
    headers = {
        "content-security-policy": POLICY,
        "cache-control": "no-cache",
        "etag": file.etag,
    }
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _files() -> dict[str, _File]:
    """Every file of the page by its name."""
    folder = resources.files("teacher_server.http").joinpath("page")
    contents = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
    contents[_PLOTTING] = _plotting_library()
    return {
        name: _File(
            content,
            _MEDIA_TYPES[Path(name).suffix],
            f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        )
        for name, content in contents.items()
        if Path(name).suffix in _MEDIA_TYPES
    }


def _plotting_library() -> bytes:
    """d3, read without importing the package, which would import matplotlib."""
    spec = find_spec("mpld3")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the page needs the package mpld3, which carries d3")
    return Path(spec.submodule_search_locations[0], *_PLOTTING_FILE).read_bytes()
